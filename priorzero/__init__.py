"""PriorZero: language-model priors for world-model planning in text games."""

__version__ = "0.1.0"
