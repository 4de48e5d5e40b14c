"""PPO for the language model: what it learns from, the learner, and the engines that run it on several processes."""
