"""Engines that turn prompts into action priors."""

from priorzero.engines.answers import PriorMaker
from priorzero.engines.in_process import TransformersEngine
from priorzero.engines.robust import PriorStatistics, RobustPrior
from priorzero.engines.vllm import VLLMEngine, cores_for_training

__all__ = ["PriorMaker", "PriorStatistics", "RobustPrior", "TransformersEngine", "VLLMEngine", "cores_for_training"]
