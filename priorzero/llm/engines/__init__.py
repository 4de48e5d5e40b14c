"""Engines that turn prompts into action priors."""

from priorzero.llm.engines.base import PriorBuilder
from priorzero.llm.engines.hf import TransformersEngine
from priorzero.llm.engines.retry import PriorStatistics, RetryingPrior
from priorzero.llm.engines.vllm import VLLMEngine, cores_for_training

__all__ = ["PriorBuilder", "PriorStatistics", "RetryingPrior", "TransformersEngine", "VLLMEngine", "cores_for_training"]
