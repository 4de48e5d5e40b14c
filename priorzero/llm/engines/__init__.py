"""Engines that compute action priors with the language model."""

from priorzero.llm.engines.base import PriorBuilder
from priorzero.llm.engines.hf import TransformersEngine
from priorzero.llm.engines.retry import PriorStatistics, RetryingPrior
from priorzero.llm.engines.vllm import VLLMEngine
from priorzero.llm.engines.vllm_process import cores_for_training

__all__ = ["PriorBuilder", "PriorStatistics", "RetryingPrior", "TransformersEngine", "VLLMEngine", "cores_for_training"]
