"""PPO for the language model: trajectories, the learner, and the engines that run it on several processes."""
