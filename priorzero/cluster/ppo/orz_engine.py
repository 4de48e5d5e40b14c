"""PPO by Open-Reasoner-Zero's ``RayPPOTrainer``, one step at a time. It needs their package and CUDA GPUs.

This adapter was written against the trainer's source code and is tested with a stub that has the same methods. It has
never been run with the real trainer.

The trainer learns from texts. Each decision is a sample: a prompt and an action, whose last token gets the discounted
return of the decision as its reward. The trainer does not know the other valid actions, and it assumes that the LLM
sampled the action.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from loguru import logger

from priorzero.cluster.connection import Share
from priorzero.cluster.ppo.engine import PPOResult, SendParameters
from priorzero.cluster.ppo.trajectories import Trajectory, scaled_rewards
from priorzero.llm.chat_template import turn_end
from priorzero.llm.model_files import resolve_model
from priorzero.llm.models import load_tokenizer
from priorzero.llm.prompts import completion_text, prompt_style
from priorzero.settings import Settings
from priorzero.types import UserError
from priorzero.world_model.returns import returns_to_go


def jericho_reward_trainer(base: Any) -> Any:
    """``JerichoRewardTrainer``: a subclass of ``base``, ORZ's ``RayPPOTrainer``, for decisions of finished episodes."""

    class JerichoRewardTrainer(base):
        def build_dataloader(self, dataset: Any) -> list[Any]:
            """There is no data set: each step gets its prompts."""
            self.num_update_steps_per_episodes = 1
            self._max_steps = 1
            return []

        async def generate_vllm(
            self, gen_func: Any, prompts: list[str], extras: list[dict[str, Any]] | None = None, **kwargs: Any
        ) -> list[str]:
            """The actions that were taken. The LLM generates nothing."""
            assert extras is not None and len(extras) == len(prompts)
            return [extra["completion"] for extra in extras]

        async def custom_reward_fn(
            self, prompts: list[str], outputs: list[str], extras: list[dict[str, Any]], reward_model_fn: Any
        ) -> tuple[list[str], list[str], list[torch.Tensor]]:
            """One reward for each token: the decision's for the last token, 0 for the others."""
            tokens = self._tokenize(outputs, self.cfg.generate_max_len, padding=False)["input_ids"]
            rewards = []
            for ids, extra in zip(tokens, extras, strict=True):
                reward = torch.zeros(len(ids))
                reward[-1] = extra["reward"]
                rewards.append(reward)
            return prompts, outputs, rewards

    return JerichoRewardTrainer


class OrzPPOEngine:
    """Implements :class:`~priorzero.cluster.ppo.engine.PPOEngine` with ORZ's trainer.

    ``share`` is not used, since ORZ places its own actors. ``make_trainer`` builds the trainer and its models; tests
    replace it.
    """

    resumable = False

    def __init__(
        self,
        settings: Settings,
        *,
        share: Share,
        send_parameters: SendParameters,
        make_trainer: Callable[[Settings], Awaitable[Any]] | None = None,
    ) -> None:
        self._settings = settings
        self._style = prompt_style(settings)
        self._send_parameters = send_parameters
        self._make_trainer = make_trainer or _make_trainer
        self._trainer: Any = None
        self._step_id, self._version = 0, 0
        self._result = PPOResult({})

    async def start(self) -> None:
        self._trainer = await self._make_trainer(self._settings)

    async def ppo_step(self, trajectories: Sequence[Trajectory], step_id: int) -> PPOResult:
        if step_id == self._step_id:
            return self._result
        inputs, num_stale = self._inputs(trajectories)
        metrics = {"ppo/samples": float(len(inputs)), "ppo/stale": float(num_stale)}
        if inputs:
            await self._trainer.make_experience(inputs)
        if inputs and len(self._trainer.replay_buffer) > 0:
            metrics |= await self._train(step_id)
        self._step_id, self._result = step_id, PPOResult(metrics)
        return self._result

    def _inputs(self, trajectories: Sequence[Trajectory]) -> tuple[list[tuple[str, dict[str, Any]]], int]:
        """``(prompt, extra)`` of each decision, for ``make_experience``; and the number of stale decisions."""
        inputs, num_stale = [], 0
        for trajectory in trajectories:
            rewards = scaled_rewards(trajectory.records, cfg=self._settings.ppo)
            returns = returns_to_go(rewards, discount=self._settings.search.discount_factor)
            for record, value in zip(trajectory.records, returns, strict=True):
                if record.prior is None or record.prior.source != "score":
                    continue
                if self._version - record.prior.version > self._settings.ppo.max_staleness:
                    num_stale += 1
                    continue
                completion = completion_text(record.action_text, style=self._style)
                if self._style.ends_turn:
                    completion += turn_end(self._trainer.tokenizer)
                inputs.append((record.prompt, {"completion": completion, "reward": float(value)}))
        return inputs, num_stale

    async def _train(self, step_id: int) -> dict[str, float]:
        """Train both models on the trainer's replay buffer, and empty it; returns the metrics."""
        trainer, cfg = self._trainer, self._trainer.cfg
        if cfg.advantage_normalize:
            from orz.ppo.utils import normalize_advantages

            trainer.replay_buffer = normalize_advantages(trainer.replay_buffer)
        actor_batches = trainer.replay_buffer.split_to_n_batches(cfg.actor_num_nodes * cfg.actor_num_gpus_per_node)
        critic_batches = trainer.replay_buffer.split_to_n_batches(cfg.critic_num_nodes * cfg.critic_num_gpus_per_node)
        critic_status = await trainer.ppo_local_train_critic(critic_batches, step_id)
        actor_status = await trainer.ppo_local_train_policy(actor_batches, step_id)  # None while only the critic learns
        trainer.replay_buffer.clear()
        metrics = {"ppo/value_loss": float(critic_status.get("critic_loss", 0.0))}
        if actor_status is not None:
            self._version += 1
            metrics["train/llm_loss"] = float(actor_status.get("policy_loss", 0.0))
        return metrics

    async def publish(self) -> int:
        """Through the folder that the trainer writes, since its own vLLM engines are not the prior servers."""
        from safetensors.torch import load_file

        trainer = self._trainer
        await trainer.policy_model.async_save_model(trainer.tokenizer, self._step_id)
        folder = Path(trainer.cfg.save_path, f"iter{self._step_id}", "policy")
        state = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
        if not state:
            raise UserError(f"{folder}: Open-Reasoner-Zero wrote no .safetensors file there")
        await self._send_parameters(self._version, ray.put(state))
        return self._version

    async def save(self, folder: Path) -> None:
        logger.warning("ppo.engine=orz saves only its actor, in a folder of its own; a run cannot continue from it")
        await self._trainer.policy_model.async_save_model(self._trainer.tokenizer, self._step_id)

    async def load(self, folder: Path) -> None:
        raise UserError("ppo.engine=orz cannot load a state; start a new run with llm.path=FOLDER/policy")

    async def export(self, folder: Path) -> None:
        """Rename the folder that the trainer writes."""
        trainer = self._trainer
        await trainer.policy_model.async_save_model(trainer.tokenizer, self._step_id)
        folder.parent.mkdir(parents=True, exist_ok=True)
        Path(trainer.cfg.save_path, f"iter{self._step_id}", "policy").rename(folder)

    async def kill(self) -> None:
        """Its actors end with the run."""
        self._trainer = None


def orz_config(settings: Settings) -> dict[str, Any]:
    """The settings under the names of ORZ's ``BasePPOExpConfig``; the others keep ORZ's defaults."""
    model = resolve_model(settings.llm.path, setting="llm.path")
    learners = settings.cluster.num_learners
    return {
        "pretrain": model,
        "critic_pretrain": model,
        "reward_pretrain": None,
        "actor_num_gpus_per_node": learners,
        "critic_num_gpus_per_node": learners,
        "ref_num_gpus_per_node": learners,
        "vllm_num_engines": 1,
        "actor_learning_rate": settings.llm.learning_rate,
        "critic_learning_rate": settings.ppo.critic_learning_rate,
        "prompt_max_len": settings.llm.prompt_max_len,
        "generate_max_len": settings.llm.generate_max_len,
        "packing_max_len": settings.llm.prompt_max_len + settings.llm.generate_max_len,
        "micro_train_batch_size": settings.llm.micro_batch_size,
        "max_epochs": settings.ppo.epochs,
        "eps_clip": settings.ppo.clip,
        "value_clip": settings.ppo.value_clip,
        "gamma": 1.0,  # within an action; the returns are already discounted over the actions
        "lambd": 1.0,
        "max_norm": settings.llm.grad_clip,
        "freezing_actor_steps": settings.ppo.critic_warmup_steps,
        "n_samples_per_prompt": 1,
        "use_kl_loss": settings.llm.kl_weight > 0,
        "kl_loss_coef": settings.llm.kl_weight,
        "init_kl_coef": 0.0,
        "use_compute_reward_fn": True,
        "save_path": str(Path(settings.run.output_dir, "orz")),
        "tensorboard_log_dir": str(Path(settings.run.output_dir, "orz", "charts")),
    }


async def _make_trainer(settings: Settings) -> Any:
    from orz.exps.examples.ppo.ppo_base_exp import BasePPOExpConfig
    from orz.ppo.actors import CriticRayActor, PolicyRayActor, RefRayActor
    from orz.ppo.trainer import RayPPOTrainer
    from orz.ppo.utils import create_vllm_engines, get_strategy

    cfg = BasePPOExpConfig()
    for name, value in orz_config(settings).items():
        setattr(cfg, name, value)
    engines = create_vllm_engines(
        cfg.vllm_num_engines,
        cfg.vllm_tensor_parallel_size,
        cfg.pretrain,
        cfg.seed,
        cfg.enable_prefix_caching,
        cfg.enforce_eager,
        cfg.max_len,
        cfg.colocate_all,
        cfg.enable_chunked_prefill,
        cfg.max_num_batched_tokens,
        cfg.gpu_memory_utilization,
        cfg.micro_rollout_batch_size,
        None,
    )
    trainer = jericho_reward_trainer(RayPPOTrainer)(
        cfg=cfg,
        strategy=get_strategy(cfg),
        tokenizer=load_tokenizer(settings.llm),
        train_dataset=[],
        vllm_engines=engines,
    )
    await trainer.build_models(PolicyRayActor, CriticRayActor, RefRayActor)
    await trainer.policy_model.async_run_method("_init_vllm_engines_actor_group", engines)
    return trainer
