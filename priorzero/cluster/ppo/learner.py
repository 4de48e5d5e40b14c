"""PPO's learner: an actor, the language model whose prior is the policy, and a critic with parameters of its own."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from priorzero.cluster.ppo.engine import PPOResult
from priorzero.cluster.ppo.trajectories import (
    Trajectory,
    credit_weights,
    generalised_advantages,
    newest,
    scaled_rewards,
)
from priorzero.llm.fine_tuning import LLMLearner, LLMSample
from priorzero.llm.losses import gradient_norm, normalised_advantages
from priorzero.llm.models import LanguageModel
from priorzero.llm.prompts import PromptStyle
from priorzero.runtime.process_group import ProcessGroup
from priorzero.settings import Settings
from priorzero.types import NonFiniteError, Plain


class Critic(nn.Module):
    """The value of a prompt: a copy of the LLM's transformer, and a linear layer on its output at the last token.

    All parameters of the copy are trained, also if the LLM has adapters.
    """

    def __init__(self, llm: LanguageModel) -> None:
        super().__init__()
        model = llm.model.get_base_model() if hasattr(llm.model, "peft_config") else llm.model
        self.backbone = copy.deepcopy(model.base_model).requires_grad_(True)
        self.head = nn.Linear(model.config.get_text_config(decoder=True).hidden_size, 1, device=llm.device)
        nn.init.zeros_(self.head.weight)  # all values are 0 at first
        nn.init.zeros_(self.head.bias)
        self._llm: Any = llm

    def forward(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Values ``[n]`` of n prompts, given as token ids. A prompt that is too long loses its beginning."""
        longest = self._llm.max_length
        prompts = [prompt[-longest:] if longest is not None else prompt for prompt in prompts]
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):  # padded on the right, which a causal model does not attend to
            ids[row, : len(prompt)] = torch.as_tensor(prompt)
            mask[row, : len(prompt)] = 1
        with self._llm.autocast():
            output = self.backbone(
                input_ids=ids.to(self._llm.device), attention_mask=mask.to(self._llm.device), use_cache=False
            )
            last = output.last_hidden_state[torch.arange(len(prompts)), [len(prompt) - 1 for prompt in prompts]]
            return self.head(last).float().sum(dim=1)  # not squeeze: FSDP would have to copy a view


class PPOLearner:
    """One of several learners, or the only one. All learners get the same trajectories and divide them.

    A step computes the critic's values of all decisions and generalised advantages along each trajectory. Then it makes
    ``ppo.epochs`` passes of optimiser steps with ``llm.batch_size`` decisions each. The losses are PPO's clipped
    surrogate (Schulman et al. 2017, eq. 7) on the prior over the valid actions, the KL penalty towards the LLM as it
    was loaded (``llm.kl_weight``), and the clipped value loss. In the first ``ppo.critic_warmup_steps`` steps only the
    critic learns.
    """

    def __init__(self, llm: LanguageModel, settings: Settings, *, style: PromptStyle, group: ProcessGroup) -> None:
        self.llm = llm
        self.cfg = settings.ppo
        self.settings = settings
        self.group = group
        actor_cfg = settings.llm.model_copy(
            update={"enable_sft": False, "enable_rft": True, "rft_loss_weight": 1.0, "rft_clip": settings.ppo.clip}
        )
        critic = Critic(llm)  # before the actor is wrapped
        self.actor = LLMLearner(llm, actor_cfg, style=style, temperature=settings.prior.temperature, group=group)
        self.critic = group.wrap(critic)
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=self.cfg.critic_learning_rate, weight_decay=0.0
        )
        self.step_id = 0  # of the last step
        self.version = 0  # number of steps that have changed the actor
        self._result = PPOResult({})

    def step(self, trajectories: Sequence[Trajectory], *, step_id: int) -> PPOResult:
        """One PPO step. ``step_id`` is one more than the last; with the last one, the last result is returned."""
        if step_id == self.step_id:
            return self._result
        if step_id != self.step_id + 1:
            raise ValueError(f"PPO step {step_id} after step {self.step_id}; expected step {self.step_id + 1}")
        try:
            result = PPOResult(self._learn(trajectories))
        except NonFiniteError as error:
            result = PPOResult({}, nonfinite=str(error))
        self.step_id, self._result = step_id, result
        return result

    def _learn(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        num_given = sum(len(trajectory.records) for trajectory in trajectories)
        trajectories = newest(trajectories, limit=self.cfg.max_decisions)
        records = [record for trajectory in trajectories for record in trajectory.records]
        staleness = [self.version - record.prior.version if record.prior is not None else 0 for record in records]
        values, end_values = self._values(trajectories)
        advantages, returns = self._advantages(trajectories, values, end_values)
        weights = credit_weights(records, cfg=self.cfg)
        samples, kept = self.actor.prepare(records)
        used = [n for n, i in enumerate(kept) if weights[i] > 0 and staleness[i] <= self.cfg.max_staleness]
        used = used[: len(used) // self.group.size * self.group.size]  # all learners get the same number
        metrics = {
            "ppo/decisions": float(num_given),
            "ppo/left_over": float(num_given - len(records)),
            "ppo/samples": float(len(used)),
            "ppo/stale": float(sum(s > self.cfg.max_staleness for s in staleness)),
            "ppo/without_prior": float(len(records) - int((weights > 0).sum())),
            "ppo/staleness_mean": float(np.mean(staleness)) if staleness else 0.0,
            "ppo/reward_mean": float(np.mean(scaled_rewards(records, cfg=self.cfg))) if records else 0.0,
            "ppo/value_mean": float(values.mean()) if len(values) else 0.0,
            "ppo/explained_variance": _explained_variance(values, returns),
        }
        if used:
            positions = np.array([kept[n] for n in used], dtype=np.int64)
            weighted = weights[positions] * normalised_advantages(advantages[positions], np.zeros(len(used)))
            learning = self.actor.with_advantages([samples[n] for n in used], weighted)
            metrics["ppo/credit_weight_mean"] = float(weights[positions].mean())
            metrics |= self._update(learning, values[positions], returns[positions])
        metrics["train/llm_version"] = float(self.version)
        return metrics

    # ---- advantages ----

    def _values(self, trajectories: Sequence[Trajectory]) -> tuple[np.ndarray, np.ndarray]:
        """The critic's values of all decisions ``[n]`` and of the state after each trajectory (0 if the game ended)."""
        prompts = [record.prompt for trajectory in trajectories for record in trajectory.records]
        ends = [trajectory.bootstrap_prompt for trajectory in trajectories]
        values = self._values_of([*prompts, *(prompt for prompt in ends if prompt is not None)])
        bootstrap_values = iter(values[len(prompts) :])
        end_values = np.array([0.0 if prompt is None else next(bootstrap_values) for prompt in ends])
        return values[: len(prompts)], end_values

    @torch.no_grad()
    def _values_of(self, prompts: Sequence[str]) -> np.ndarray:
        """Values ``[n]`` of n prompts; the learners divide them."""
        ids = [self._token_ids(prompt) for prompt in prompts]
        if not ids:
            return np.zeros(0)
        own = self.group.shard(ids + ids[:1] * (-len(ids) % self.group.size))  # all shards have the same length
        size = self.settings.llm.micro_batch_size
        values = [v for i in range(0, len(own), size) for v in self.critic(own[i : i + size]).tolist()]
        return np.array(self.group.gather(values)[: len(ids)])

    def _token_ids(self, prompt: str) -> list[int]:
        ids: list[int] = self.llm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids or self.llm.stop_ids[:1]

    def _advantages(
        self, trajectories: Sequence[Trajectory], values: np.ndarray, end_values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Advantages and lambda-returns of all decisions, ``[n]`` each."""
        parts, start = [np.zeros(0)], 0
        for trajectory, end_value in zip(trajectories, end_values, strict=True):
            own = values[start : start + len(trajectory.records)]
            parts.append(
                generalised_advantages(
                    scaled_rewards(trajectory.records, cfg=self.cfg),
                    np.append(own, end_value),
                    discount=self.settings.search.discount_factor,
                    lam=self.cfg.gae_lambda,
                )
            )
            start += len(own)
        advantages = np.concatenate(parts)
        return advantages, advantages + values

    # ---- updates ----

    def _update(self, samples: Sequence[LLMSample], values: np.ndarray, returns: np.ndarray) -> dict[str, float]:
        """The passes of a step; returns the means of the metrics over the optimiser steps.

        ``values`` ``[n]`` are those before the step, ``returns`` ``[n]`` are lambda-returns.
        """
        is_warming_up, version = self.step_id < self.cfg.critic_warmup_steps, self.version
        clip = self.cfg.value_clip * float(returns.std())
        size = self.settings.llm.batch_size
        all_metrics: list[dict[str, float]] = []
        for epoch in range(self.cfg.epochs):
            rng = np.random.default_rng([self.settings.run.seed, self.step_id, epoch])
            order = shuffled_runs(len(samples), run_length=self.settings.llm.run_length, rng=rng)
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                batch = batch[: len(batch) // self.group.size * self.group.size]
                own = self.group.shard(list(batch))
                batch_samples = [samples[n] for n in own]
                metrics = self._critic_step(batch_samples, values[own], returns[own], clip=clip)
                if not is_warming_up:
                    metrics |= self._actor_step(batch_samples)
                    self.version = version + 1  # now, since a later optimiser step may be non-finite
                all_metrics.append(metrics)
        return {name: float(np.mean([metrics[name] for metrics in all_metrics])) for name in all_metrics[0]}

    def _actor_step(self, samples: Sequence[LLMSample]) -> dict[str, float]:
        result = self.actor.learn(samples)
        return {
            "ppo/policy_loss": result["rft_loss"],
            "train/llm_kl_loss": result["kl_loss"],
            "train/llm_sft_loss": result["sft_loss"],
            "train/llm_loss": result["loss"],
            "train/llm_grad_norm": result["grad_norm"],
        }

    def _critic_step(
        self, samples: Sequence[LLMSample], values: np.ndarray, returns: np.ndarray, *, clip: float
    ) -> dict[str, float]:
        """One optimiser step of the critic on this learner's part of a batch."""
        num_samples = self.group.sum({"n": float(len(samples))})["n"]
        size, total = self.settings.llm.micro_batch_size, 0.0
        self.critic_optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(samples), size):
            part = slice(start, start + size)
            with self.group.accumulate(self.critic, last=start + size >= len(samples)):
                loss, _ = clipped_value_loss(
                    self.critic([s.row.prompt_ids for s in samples[part]]),
                    torch.as_tensor(values[part], dtype=torch.float32, device=self.llm.device),
                    torch.as_tensor(returns[part], dtype=torch.float32, device=self.llm.device),
                    clip=clip,
                )
                # The group averages the gradients; each learner divides by the samples of all.
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

    # ---- state; all learners must make these calls ----

    def actor_state(self) -> dict[str, torch.Tensor]:
        """The full trained parameters of the actor on the CPU; only the adapters if there are any."""
        state: dict[str, torch.Tensor] = self.group.state_dict(self.actor.scorer, self.actor.optimizer)["model"]
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}

    def state_dict(self) -> Plain:
        """Everything that the next step depends on, in full, on the CPU."""
        return {
            "actor": self.group.state_dict(self.actor.scorer, self.actor.optimizer),
            "critic": self.group.state_dict(self.critic, self.critic_optimizer),
            "step_id": self.step_id,
            "version": self.version,
            "result": dataclasses.asdict(self._result),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.group.load_state_dict(self.actor.scorer, self.actor.optimizer, state["actor"])
        self.group.load_state_dict(self.critic, self.critic_optimizer, state["critic"])
        self.step_id, self.version = state["step_id"], state["version"]
        self._result = PPOResult(**state["result"])


def shuffled_runs(count: int, *, run_length: int, rng: np.random.Generator) -> np.ndarray:
    """The numbers below ``count`` in random order, ``[count]``; runs of ``run_length`` numbers stay together.

    Consecutive decisions share most of their prompts, so they are computed faster in one batch.
    """
    runs = [np.arange(start, min(start + run_length, count)) for start in range(0, count, run_length)]
    return np.concatenate([runs[n] for n in rng.permutation(len(runs))])


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Half the squared error of the value or of the clipped value, whichever is larger.

    :math:`\sum \tfrac12 \max((V - R)^2, (V_\mathrm{old} + \mathrm{clip}(V - V_\mathrm{old}, \pm\epsilon) - R)^2)`, as
    in OpenAI's baselines (Engstrom et al. 2020, "Implementation Matters", section 3).

    All arguments are ``[n]``. ``old_values`` are the values before the first update on this batch; they and the returns
    have no gradient. ``clip`` is :math:`\epsilon`; 0 gives the plain squared error. Returns the summed loss, and n.
    """
    returns, old_values = returns.detach(), old_values.detach()
    error = (values - returns) ** 2
    if clip > 0:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * error.sum(), torch.tensor(float(len(values)))


def _explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """Share of the variance of the returns that the values explain; 0 if the returns are constant."""
    variance = float(returns.var()) if len(returns) else 0.0
    return 1.0 - float((returns - values).var()) / variance if variance > 1e-12 else 0.0
