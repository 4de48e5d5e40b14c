"""The language model: prompts, priors, fine-tuning and the engines that run it."""
