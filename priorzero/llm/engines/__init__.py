"""Engines that turn prompts into action priors."""

from priorzero.llm.engines.base import PriorMaker
from priorzero.llm.engines.hf import TransformersEngine
from priorzero.llm.engines.retry import PriorStatistics, RobustPrior
from priorzero.llm.engines.vllm import VLLMEngine, cores_for_training

__all__ = ["PriorMaker", "PriorStatistics", "RobustPrior", "TransformersEngine", "VLLMEngine", "cores_for_training"]
