"""Training on a Ray cluster: collectors, prior servers and learners in processes of their own."""
