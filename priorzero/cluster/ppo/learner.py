"""PPO's learner: an actor, which is the language model that makes the prior, and a critic of its own parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from priorzero.cluster.ppo.losses import clipped_value_loss, generalised_advantages
from priorzero.cluster.ppo.trajectories import Trajectory, credit_weights, newest, turn_rewards
from priorzero.llm.fine_tuning import LLMLearner, LLMSample
from priorzero.llm.losses import gradient_norm, normalised_advantages
from priorzero.llm.models import LanguageModel
from priorzero.llm.prompts import PromptStyle
from priorzero.runtime.process_group import ProcessGroup
from priorzero.settings import Settings
from priorzero.types import NonFiniteError


class Critic(nn.Module):
    """The value of a prompt: a copy of the LLM's transformer, and a linear layer on its output at the last token.

    Args:
        llm: what is copied; with adapters, these are trained as well, and the rest of the copy.
    """

    def __init__(self, llm: LanguageModel) -> None:
        super().__init__()
        model = llm.model.get_base_model() if hasattr(llm.model, "peft_config") else llm.model
        self.backbone = copy.deepcopy(model.base_model).requires_grad_(True)
        self.head = nn.Linear(model.config.hidden_size, 1, device=llm.device)
        nn.init.zeros_(self.head.weight)  # a new critic expects nothing
        nn.init.zeros_(self.head.bias)
        self._llm: Any = llm

    def forward(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Values ``[n]`` of prompts as token ids; those that do not fit into the model lose their beginning."""
        longest = self._llm.max_length
        prompts = [prompt[-longest:] if longest is not None else prompt for prompt in prompts]
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):  # padded on the right, where a causal model does not look
            ids[row, : len(prompt)] = torch.as_tensor(prompt)
            mask[row, : len(prompt)] = 1
        with self._llm.autocast():
            output = self.backbone(
                input_ids=ids.to(self._llm.device), attention_mask=mask.to(self._llm.device), use_cache=False
            )
            last = output.last_hidden_state[torch.arange(len(prompts)), [len(prompt) - 1 for prompt in prompts]]
            return self.head(last).float().sum(dim=1)  # no view: FSDP would have to copy it


class PPOLearner:
    """One learner of several, or the only one. All are given the same trajectories and cut them up among themselves.

    A step computes the critic's values of all decisions, generalised advantages along each trajectory, and then makes
    ``ppo.epochs`` passes of optimiser steps over ``llm.batch_size`` decisions each: PPO's clipped surrogate on the
    command that was played, one unit a decision (the prior over the valid commands is the policy; the game's text is
    only ever read), the KL penalty ``llm.kl_weight`` towards the LLM as it was loaded, and clipped value losses. In the
    first ``ppo.critic_warmup_steps`` steps only the critic learns.

    Args:
        llm: the actor.
        settings: all settings.
        style: of the prompt.
        group: the learners.

    Attributes:
        step_id: of the last step that was made.
        version: steps that have changed the actor.
    """

    def __init__(self, llm: LanguageModel, settings: Settings, *, style: PromptStyle, group: ProcessGroup) -> None:
        self.llm = llm
        self.cfg = settings.ppo
        self.settings = settings
        self.group = group
        actor_cfg = settings.llm.model_copy(
            update={"enable_sft": False, "enable_rft": True, "rft_loss_weight": 1.0, "rft_clip": settings.ppo.clip}
        )
        critic = Critic(llm)
        self.actor = LLMLearner(
            llm,
            actor_cfg,
            style=style,
            temperature=settings.prior.temperature,
            group=group,
        )
        self.critic = group.wrap(critic)
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=self.cfg.critic_learning_rate, weight_decay=0.0
        )
        self.step_id = 0
        self.version = 0
        self._stats: dict[str, Any] = {}

    def step(self, trajectories: Sequence[Trajectory], *, step_id: int) -> dict[str, Any]:
        """One PPO step.

        Args:
            trajectories: the same for all learners.
            step_id: one more than the last; a step that was made already is not made again, and tells the same.

        Returns:
            Scalars under ``ppo/`` and ``train/``; ``left_out``: what was not finite, or "".

        Raises:
            ValueError: a step is missing, or is older than the last.
        """
        if step_id == self.step_id:
            return dict(self._stats)
        if step_id != self.step_id + 1:
            raise ValueError(f"PPO step {step_id} after step {self.step_id}")
        try:
            stats: dict[str, Any] = {**self._learn(trajectories), "left_out": ""}
        except NonFiniteError as error:
            stats = {"left_out": str(error)}
        self.step_id, self._stats = step_id, stats
        return dict(stats)

    def _learn(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        given = sum(len(trajectory.records) for trajectory in trajectories)
        trajectories = newest(trajectories, limit=self.cfg.max_decisions)
        records = [record for trajectory in trajectories for record in trajectory.records]
        staleness = [self.version - record.prior.version if record.prior is not None else 0 for record in records]
        values, ends = self._values(trajectories)
        advantages, targets = self._advantages(trajectories, values, ends)
        weights = credit_weights(records, cfg=self.cfg)
        samples, kept = self.actor.prepare(records)
        fresh = [n for n, i in enumerate(kept) if weights[i] > 0 and staleness[i] <= self.cfg.max_staleness]
        usable = len(fresh) // self.group.size * self.group.size  # the others must have as much to do
        fresh = fresh[:usable]
        chosen = np.array([kept[n] for n in fresh], dtype=np.int64)
        stats: dict[str, float] = {
            "ppo/decisions": float(given),
            "ppo/left_over": float(given - len(records)),
            "ppo/samples": float(usable),
            "ppo/stale": float(sum(s > self.cfg.max_staleness for s in staleness)),
            "ppo/without_prior": float(len(records) - int((weights > 0).sum())),
            "ppo/staleness_mean": float(np.mean(staleness)) if staleness else 0.0,
            "ppo/reward_mean": float(np.mean(turn_rewards(records, cfg=self.cfg))) if records else 0.0,
            "ppo/value_mean": float(values.mean()) if len(values) else 0.0,
            "ppo/explained_variance": _explained(values, targets),
        }
        if usable:
            scaled = weights[chosen] * normalised_advantages(advantages[chosen], np.zeros(usable))
            learning = self.actor.with_advantages([samples[n] for n in fresh], scaled)
            stats["ppo/credit_weight_mean"] = float(weights[chosen].mean())
            stats |= self._passes(learning, values[chosen], targets[chosen])
        stats["train/llm_version"] = float(self.version)
        return stats

    def _values(self, trajectories: Sequence[Trajectory]) -> tuple[np.ndarray, np.ndarray]:
        """The critic's values of all decisions, ``[n]``, and of what follows each trajectory (0 if the game ended)."""
        prompts = [record.prompt for trajectory in trajectories for record in trajectory.records]
        ends = [trajectory.bootstrap_prompt for trajectory in trajectories]
        known = self._values_of([*prompts, *(prompt for prompt in ends if prompt is not None)])
        following = iter(known[len(prompts) :])
        return known[: len(prompts)], np.array([0.0 if prompt is None else next(following) for prompt in ends])

    @torch.no_grad()
    def _values_of(self, prompts: Sequence[str]) -> np.ndarray:
        ids = [self._ids(prompt) for prompt in prompts]
        if not ids:
            return np.zeros(0)
        shared = self.group.shard(ids + ids[:1] * (-len(ids) % self.group.size))  # all have the same number
        size = self.settings.llm.micro_batch_size
        own = [v for i in range(0, len(shared), size) for v in self.critic(shared[i : i + size]).tolist()]
        return np.array(self.group.gather(own)[: len(ids)])

    def _ids(self, prompt: str) -> list[int]:
        ids: list[int] = self.llm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids or [self.llm.tokenizer.eos_token_id]

    def _advantages(
        self, trajectories: Sequence[Trajectory], values: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Advantages and lambda-returns of all decisions, ``[n]`` each."""
        advantages, start = [np.zeros(0)], 0
        for trajectory, end in zip(trajectories, ends, strict=True):
            own = values[start : start + len(trajectory.records)]
            rewards = turn_rewards(trajectory.records, cfg=self.cfg)
            discount = self.settings.search.discount_factor
            advantages.append(
                generalised_advantages(rewards, np.append(own, end), discount=discount, lam=self.cfg.gae_lambda)
            )
            start += len(own)
        together = np.concatenate(advantages)
        return together, together + values

    def _passes(self, samples: Sequence[LLMSample], values: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        warming_up, version = self.step_id < self.cfg.critic_warmup_steps, self.version
        limit = self.cfg.value_clip * float(targets.std())
        size = self.settings.llm.batch_size
        told: list[dict[str, float]] = []
        for epoch in range(self.cfg.epochs):
            order = np.random.default_rng([self.settings.run.seed, self.step_id, epoch]).permutation(len(samples))
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                batch = batch[: len(batch) // self.group.size * self.group.size]
                own = self.group.shard(list(batch))
                stats = self._critic_step([samples[n] for n in own], values[own], targets[own], clip=limit)
                if not warming_up:
                    result = self.actor.learn([samples[n] for n in own])
                    self.version = version + 1  # here: a step that is not finite further on has changed the actor
                    stats |= {
                        "ppo/policy_loss": result["rft_loss"],
                        "train/llm_kl_loss": result["kl_loss"],
                        "train/llm_sft_loss": result["sft_loss"],
                        "train/llm_loss": result["loss"],
                        "train/llm_grad_norm": result["grad_norm"],
                    }
                told.append(stats)
        return {name: float(np.mean([stats[name] for stats in told])) for name in told[0]}

    def _critic_step(
        self, samples: Sequence[LLMSample], values: np.ndarray, targets: np.ndarray, *, clip: float
    ) -> dict[str, float]:
        """One optimiser step of the critic on this learner's part of a batch."""
        num_samples = self.group.sum({"n": float(len(samples))})["n"]
        size, total = self.settings.llm.micro_batch_size, 0.0
        self.critic_optimizer.zero_grad(set_to_none=True)
        device = self.llm.device
        for start in range(0, len(samples), size):
            part = slice(start, start + size)
            with self.group.accumulate(self.critic, last=start + size >= len(samples)):
                now = self.critic([s.row.prompt_ids for s in samples[part]])
                loss, _ = clipped_value_loss(
                    now,
                    torch.as_tensor(values[part], dtype=torch.float32, device=device),
                    torch.as_tensor(targets[part], dtype=torch.float32, device=device),
                    clip=clip,
                )
                (self.group.size * loss / num_samples).backward()
            total += loss.item()
        total = self.group.sum({"loss": total})["loss"] / num_samples
        norm = gradient_norm(list(self.critic.parameters()), max_norm=self.settings.llm.grad_clip)
        if not (math.isfinite(total) and math.isfinite(norm)):
            self.critic_optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(
                f"the critic's loss is {total} and the norm of its gradient {norm}; lower ppo.critic_learning_rate="
                f"{self.cfg.critic_learning_rate:g} or ppo.reward_scale={self.cfg.reward_scale:g}"
            )
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad(set_to_none=True)
        return {"ppo/value_loss": total, "ppo/critic_grad_norm": norm}

    def actor_state(self) -> dict[str, torch.Tensor]:
        """The actor's trained parameters (adapters alone if there are any), whole, on the CPU; all learners call it."""
        state: dict[str, torch.Tensor] = self.group.state_dict(self.actor.scorer, self.actor.optimizer)["model"]
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, whole, on the CPU; all learners call it."""
        return {
            "actor": self.group.state_dict(self.actor.scorer, self.actor.optimizer),
            "critic": self.group.state_dict(self.critic, self.critic_optimizer),
            "step_id": self.step_id,
            "version": self.version,
            "stats": self._stats,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; all learners call it."""
        self.group.load_state_dict(self.actor.scorer, self.actor.optimizer, state["actor"])
        self.group.load_state_dict(self.critic, self.critic_optimizer, state["critic"])
        self.step_id, self.version, self._stats = state["step_id"], state["version"], state["stats"]


def _explained(values: np.ndarray, targets: np.ndarray) -> float:
    """Share of the targets' variance that the values explain; 0 where they do not vary."""
    variance = float(targets.var()) if len(targets) else 0.0
    return 1.0 - float((targets - values).var()) / variance if variance > 1e-12 else 0.0
