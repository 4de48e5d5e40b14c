"""Engines that turn prompts into action priors."""

from priorzero.engines.in_process import TransformersEngine
from priorzero.engines.robust import PriorStatistics, RobustPrior

__all__ = ["PriorStatistics", "RobustPrior", "TransformersEngine"]
