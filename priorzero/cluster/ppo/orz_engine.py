"""PPO by Open-Reasoner-Zero's ``RayPPOTrainer``, driven a step at a time. Needs its package and CUDA GPUs.

It was written against the trainer's source and is tested against a double with the same methods; it was not run.
The trainer learns from texts: a decision is a sample of its own, prompt and command, whose last token is rewarded with
the decision's discounted return. It knows nothing of the other valid commands, and takes what is played for its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from loguru import logger

from priorzero.cluster.ppo.engine import Capabilities
from priorzero.cluster.ppo.trajectories import Trajectory, turn_rewards
from priorzero.cluster.resources import Share
from priorzero.llm.models import load_tokenizer, resolve_model
from priorzero.llm.prompts import completion_text, prompt_style
from priorzero.settings import Settings
from priorzero.types import UserError
from priorzero.world_model.returns import returns_to_go

# What of the trainer is called or overridden, and the names of the parameters that are relied on.
SEAM = {
    "__init__": ("cfg", "strategy", "tokenizer", "train_dataset", "vllm_engines"),
    "build_dataloader": ("dataset",),
    "build_models": ("PolicyRayActor", "CriticRayActor", "RefRayActor"),
    "make_experience": ("all_inputs",),
    "generate_vllm": ("gen_func", "prompts", "extras"),
    "custom_reward_fn": ("prompts", "outputs", "extras", "reward_model_fn"),
    "ppo_local_train_policy": ("replay_buffers", "global_steps"),
    "ppo_local_train_critic": ("replay_buffers", "global_steps"),
    "_tokenize": ("texts", "max_length", "padding"),
}


def why_not_orz(settings: Settings) -> str:
    """Why ``ppo.engine=orz`` cannot be used here, and what to do; "" if it can be tried."""
    if settings.ppo.credit != "none" or settings.llm.use_lora:
        return (
            "ppo.engine=orz needs ppo.credit=none and llm.use_lora=false: its trainer has neither sample weights "
            "nor adapters"
        )
    if settings.replay.segment_length < settings.env.max_episode_steps:
        return (
            "ppo.engine=orz needs whole episodes for its returns: "
            f"replay.segment_length={settings.replay.segment_length} must be at least "
            f"env.max_episode_steps={settings.env.max_episode_steps}"
        )
    how = (
        "get https://github.com/Open-Reasoner-Zero/Open-Reasoner-Zero, type pip install -e . in it (it wants Python "
        "3.10, vllm 0.6.5, ray 2.40, deepspeed and CUDA), or type --ppo_engine torch"
    )
    try:
        found = importlib.util.find_spec("orz.ppo.trainer")
    except ModuleNotFoundError:  # no orz, or another package of that name
        found = None
    if found is None:
        return f"ppo.engine=orz: orz.ppo.trainer cannot be imported; {how}"
    if not torch.cuda.is_available():
        return "ppo.engine=orz: torch sees no GPU here, and Open-Reasoner-Zero needs CUDA; type --ppo_engine torch"
    return ""


def jericho_reward_trainer(base: Any) -> Any:
    """``JerichoRewardTrainer``: a subclass of ORZ's ``RayPPOTrainer`` for decisions that have been played already.

    Args:
        base: the trainer's class.
    """

    class JerichoRewardTrainer(base):
        def build_dataloader(self, dataset: Any) -> list[Any]:
            """Prompts come step by step; there is no data set."""
            self.num_update_steps_per_episodes = 1
            self._max_steps = 1
            return []

        async def generate_vllm(
            self, gen_func: Any, prompts: list[str], extras: list[dict[str, Any]] | None = None, **kwargs: Any
        ) -> list[str]:
            """What was played, in place of what the LLM would write now."""
            assert extras is not None and len(extras) == len(prompts)
            return [extra["command"] for extra in extras]

        async def custom_reward_fn(
            self, prompts: list[str], outputs: list[str], extras: list[dict[str, Any]], reward_model_fn: Any
        ) -> tuple[list[str], list[str], list[torch.Tensor]]:
            """A reward a token: zero but for the last one's, which is the decision's."""
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

    Args:
        settings: all settings.
        share: not used: ORZ places its own actors.
        hand_on: given a version and Ray's reference to the parameters, makes all servers take them over.
        make_trainer: builds the trainer with its models; another one for tests.
    """

    capabilities = Capabilities(
        advantages_over_turns=False,
        valid_actions_only=False,
        drops_stale_samples=True,
        resumable=False,
        needs_gpu=True,
    )

    def __init__(
        self,
        settings: Settings,
        *,
        share: Share,
        hand_on: Callable[[int, Any], Awaitable[None]],
        make_trainer: Callable[[Any], Awaitable[Any]] | None = None,
    ) -> None:
        self._settings = settings
        self._style = prompt_style(settings)
        self._hand_on = hand_on
        self._make_trainer = make_trainer or _make_trainer
        self._trainer: Any = None
        self._step_id, self._version = 0, 0
        self._stats: dict[str, Any] = {}

    async def start(self) -> None:
        self._trainer = await self._make_trainer(self._settings)

    def inputs(self, trajectories: Sequence[Trajectory]) -> tuple[list[tuple[str, dict[str, Any]]], int]:
        """``(prompt, extra)`` of each decision as ``make_experience`` takes them, and how many were too old."""
        made, stale = [], 0
        for trajectory in trajectories:
            rewards = turn_rewards(trajectory.records, cfg=self._settings.ppo)
            returns = returns_to_go(rewards, discount=self._settings.search.discount_factor)
            for record, value in zip(trajectory.records, returns, strict=True):
                if record.prior is None or record.prior.source != "score":
                    continue
                if self._version - record.prior.version > self._settings.ppo.max_staleness:
                    stale += 1
                    continue
                command = completion_text(record.action_text, style=self._style)
                if self._style.ends_turn:
                    command += self._trainer.tokenizer.eos_token
                made.append((record.prompt, {"command": command, "reward": float(value)}))
        return made, stale

    async def ppo_step(self, trajectories: Sequence[Trajectory], step_id: int) -> dict[str, Any]:
        if step_id == self._step_id:
            return dict(self._stats)
        trainer = self._trainer
        inputs, stale = self.inputs(trajectories)
        stats: dict[str, Any] = {"left_out": "", "ppo/samples": float(len(inputs)), "ppo/stale": float(stale)}
        if inputs:
            await trainer.make_experience(inputs)
        if inputs and len(trainer.replay_buffer) > 0:
            if trainer.cfg.advantage_normalize:
                from orz.ppo.utils import normalize_advantages

                trainer.replay_buffer = normalize_advantages(trainer.replay_buffer)
            cfg = trainer.cfg
            policy = trainer.replay_buffer.split_to_n_batches(cfg.actor_num_nodes * cfg.actor_num_gpus_per_node)
            critic = trainer.replay_buffer.split_to_n_batches(cfg.critic_num_nodes * cfg.critic_num_gpus_per_node)
            of_critic = await trainer.ppo_local_train_critic(critic, step_id)
            of_policy = await trainer.ppo_local_train_policy(policy, step_id)  # None while only the critic learns
            trainer.replay_buffer.clear()
            stats["ppo/value_loss"] = float(of_critic.get("critic_loss", 0.0))
            if of_policy is not None:
                self._version += 1
                stats["train/llm_loss"] = float(of_policy.get("policy_loss", 0.0))
        self._step_id, self._stats = step_id, stats
        return dict(stats)

    async def publish(self) -> int:
        """Through the folder that the trainer writes: its own vLLM engines are not the prior servers."""
        from safetensors.torch import load_file

        trainer = self._trainer
        await trainer.policy_model.async_save_model(trainer.tokenizer, self._step_id)
        folder = Path(trainer.cfg.save_path, f"iter{self._step_id}", "policy")
        state = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
        if not state:
            raise UserError(f"{folder}: Open-Reasoner-Zero wrote no .safetensors file there")
        await self._hand_on(self._version, ray.put(state))
        return self._version

    async def save(self, folder: Path) -> None:
        logger.warning("ppo.engine=orz saves its actor alone, below its own folder; a run cannot go on from it")
        await self._trainer.policy_model.async_save_model(self._trainer.tokenizer, self._step_id)

    async def load(self, folder: Path) -> None:
        raise UserError("ppo.engine=orz cannot go on from a saved state; start a new run with llm.path=FOLDER/policy")

    async def export(self, folder: Path) -> None:
        """The folder that the trainer writes becomes ``folder``."""
        trainer = self._trainer
        await trainer.policy_model.async_save_model(trainer.tokenizer, self._step_id)
        folder.parent.mkdir(parents=True, exist_ok=True)
        Path(trainer.cfg.save_path, f"iter{self._step_id}", "policy").rename(folder)

    async def kill(self) -> None:
        """Its actors end with the run."""
        self._trainer = None


def orz_config(settings: Settings) -> dict[str, Any]:
    """Our settings under the names of ORZ's ``BasePPOExpConfig``; what is not named keeps ORZ's default."""
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
        "gamma": 1.0,  # within a command; over commands the return is discounted here
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
