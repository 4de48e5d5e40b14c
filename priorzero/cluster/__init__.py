"""Training on a Ray cluster. :mod:`priorzero.cluster.train` is the loop."""
