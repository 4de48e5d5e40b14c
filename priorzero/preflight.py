"""What a run needs before its models are loaded: checks, the path of the run's folder, and the games' processes.

This module imports neither torch nor LightZero, which take seconds. So a wrong input is reported at once, and the games
start while the packages are imported.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priorzero.envs import (
    GameSpec,
    GameWorker,
    check_max_score,
    check_names,
    make_workers,
    resolve_games,
    try_registered_games,
)
from priorzero.envs.games import is_z_machine_name
from priorzero.envs.limits import check_step_names, default_action_space_size, resolve_limits
from priorzero.llm.engine_choice import choose_engine
from priorzero.llm.model_files import ModelFiles, check_encoder, check_llm
from priorzero.runs.checkpoint import Checkpoint
from priorzero.runs.folder import check_run_folder, new_run_folder
from priorzero.runs.loggers import check_loggers
from priorzero.runs.resume import check_same_settings, keep_limits, prepare_resume
from priorzero.runs.saved import agent_settings, check_modes, find_agent, was_trained_on
from priorzero.runtime.activity import announced
from priorzero.runtime.gpu import gpu_is_ruled_out, no_gpu_error
from priorzero.runtime.paths import check_free_space, user_cache_dir, user_path
from priorzero.settings import MODES_WITHOUT_LLM, EvalMode, LLMSettings, Settings
from priorzero.types import UserError

FLOAT32 = 4  # bytes
# Bytes per parameter in a checkpoint: the parameter itself and AdamW's two moments.
TRAINED = 3 * FLOAT32


@dataclass(frozen=True)
class Preparation:
    """A run whose settings and files were checked.

    Attributes:
        settings: a copy of all settings.
        games: games of ``run.env_id``.
        unseen: games of ``eval.unseen``.
        folder: the run's, which exists and is locked.
        checkpoint: the run is resumed from it; None for a new run.
        workers: the games that are played for collection. Their processes are starting.
    """

    settings: Settings
    games: Sequence[GameSpec]
    unseen: Sequence[GameSpec]
    folder: Path
    checkpoint: Checkpoint | None
    workers: Sequence[GameWorker]


@contextlib.contextmanager
def prepare(settings: Settings, *, checkpoint: Checkpoint | None = None) -> Iterator[Preparation]:
    """Check everything that can be checked before the models are loaded, and launch the games.

    The run's folder is locked until the end of the block. At the end, the games are ended if they still run, and the
    folder of a new run is removed if nothing was written into it.

    Raises:
        UserError: an error that the user can correct; no file is left behind.
    """
    if not isinstance(settings, Settings):
        raise TypeError(
            f"settings is a {type(settings).__name__}; make settings with priorzero.config.resolve_settings"
        )
    settings = settings.model_copy(deep=True)
    if checkpoint is not None:
        settings.run.output_dir = str(checkpoint.run_folder.parent)
        keep_limits(settings, checkpoint.settings)
        check_same_settings(checkpoint, settings)  # before the advice of other checks, which may be to change these
    else:
        check_run_folder(settings)
    games, unseen = check_inputs(settings)
    if checkpoint is None:
        check_step_names(settings.env, (*games, *unseen))
    resolve_limits(settings.env, games, unseen=unseen)
    with _run_folder(settings, games, checkpoint) as folder:
        workers = make_workers(settings, games, count=settings.env.collector_env_num, first_seed=settings.run.seed)
        try:
            for worker in workers:
                worker.launch()
            yield Preparation(settings, games, unseen, folder, checkpoint, workers)
        finally:
            for worker in workers:
                worker.kill()


@dataclass(frozen=True)
class AgentPreparation:
    """A trained agent whose checkpoint was found, and the games that it is to play. Nothing is loaded yet.

    Attributes:
        checkpoint: the agent's.
        settings: the settings that it plays with. ``run.env_id`` and ``eval.unseen`` name the games.
        trained: the games that it was trained on.
        unseen: the other games.
    """

    checkpoint: Checkpoint
    settings: Settings
    trained: Sequence[GameSpec]
    unseen: Sequence[GameSpec]

    @property
    def games(self) -> list[GameSpec]:
        """All games."""
        return [*self.trained, *self.unseen]


def prepare_agent(
    where: str | Path | Checkpoint,
    *,
    what: str = "",
    games: str | None = None,
    modes: Sequence[EvalMode] | None = None,
    overrides: Sequence[Mapping[str, Mapping[str, Any]]] = (),
) -> AgentPreparation:
    """Find a trained agent, and check everything that can be checked before its models are loaded.

    The LLM is left out if no mode needs it.

    Args:
        where: the folder of a run or of a checkpoint, or what :func:`~priorzero.runs.saved.find_agent` has found there.
        what: the command, as the beginning of messages.
        games: names of the games that the agent plays, separated by commas; None for those of its run,
            ``run.env_id`` and ``eval.unseen``.
        modes: the modes in which it plays; None for ``eval.modes``.
        overrides: layers of settings that win over those of the run.

    Raises:
        UserError: an error that the user can correct. No file was written in the run's folder.
    """
    checkpoint = where if isinstance(where, Checkpoint) else find_agent(where, what=what)
    if modes is not None:
        check_modes(checkpoint, modes, overrides)
        overrides = [*overrides, {"eval": {"modes": list(modes)}}]
    settings = agent_settings(checkpoint, overrides)
    if set(settings.eval.modes) <= set(MODES_WITHOUT_LLM):
        settings.prior.enabled = False
    if games is not None:
        settings.run.env_id, settings.eval.unseen = games, ""
        if not any("max_score" in layer.get("env", {}) for layer in overrides):
            settings.env.max_score = 0  # it belongs to the game of the run
    settings.env.collector_env_num = max(1, len(check_names(settings.run.env_id)))  # nothing is collected
    seen, unseen = check_inputs(settings)
    if any("max_episode_steps" in layer.get("env", {}) for layer in overrides):
        check_step_names(settings.env, (*seen, *unseen))
    resolve_limits(settings.env, seen, unseen=unseen)
    named = [*seen, *unseen]
    trained = [game for game in named if was_trained_on(checkpoint, game)]
    return AgentPreparation(checkpoint, settings, trained, [game for game in named if game not in trained])


@contextlib.contextmanager
def _run_folder(settings: Settings, games: Sequence[GameSpec], checkpoint: Checkpoint | None) -> Iterator[Path]:
    """Within the block, the run's folder is locked: a new one, or that of the checkpoint."""
    if checkpoint is None:
        with new_run_folder(settings, games) as folder:
            settings.run.output_dir = str(folder.parent)
            yield folder
    else:
        with prepare_resume(checkpoint, settings, games=games):
            yield checkpoint.run_folder


def check_inputs(settings: Settings, *, with_models: bool = True) -> tuple[list[GameSpec], list[GameSpec]]:
    """Check the games and the loggers, and the models and the machine with :func:`check_models`.

    Args:
        settings: all settings.
        with_models: False if the models are loaded on other machines.

    Returns:
        The games of ``run.env_id`` and of ``eval.unseen``.

    Raises:
        UserError: the first problem.
    """
    check_game_names(settings)
    check_loggers(settings.run)
    if with_models:
        check_models(settings)
    with announced("preparing the games"):
        games, unseen = resolve_games(settings.run.env_id), resolve_games(settings.eval.unseen)
    check_games(settings, games=games, unseen=unseen)
    return games, unseen


def check_game_names(settings: Settings) -> None:
    """Check the games of a run as far as this is possible before TextWorld games are generated.

    Raises:
        UserError: as :func:`check_names` and :func:`check_games`.
    """
    games, unseen = check_names(settings.run.env_id), check_names(settings.eval.unseen)
    _check_selection(settings, games=games, unseen=unseen)


def check_games(settings: Settings, *, games: Sequence[GameSpec], unseen: Sequence[GameSpec]) -> None:
    """Check the games of a run.

    Raises:
        UserError: there is none, their number does not divide the environments, an unseen game is trained on,
            ``env.max_score`` is given without need, or a registered game cannot be opened.
    """
    names, unseen_names = ({game.md5: game.env_id for game in group} for group in (games, unseen))
    _check_selection(settings, games=names, unseen=unseen_names)
    check_max_score(settings.env.max_score, games=games, unseen=unseen)
    try_registered_games(settings, [*games, *unseen])


def _check_selection(settings: Settings, *, games: Mapping[str, str], unseen: Mapping[str, str]) -> None:
    """As :func:`check_games`, for the names of the games by identifiers: equal games have equal ones."""
    if not games:
        raise UserError("run.env_id is empty; name a game, such as zork1.z5 or textworld:simple?seed=7")
    if settings.env.collector_env_num % len(games):
        raise UserError(
            f"env.collector_env_num={settings.env.collector_env_num} must be a multiple of the {len(games)} games of "
            f"run.env_id; type --set env.collector_env_num={len(games)}"
        )
    both = [name for game, name in unseen.items() if game in games]
    if both:
        raise UserError(f"eval.unseen contains games of run.env_id: {', '.join(both)}; give other games")


def check_models(settings: Settings) -> None:
    """Check the device, the engine, the models' files, and the disk space for a checkpoint.

    Raises:
        UserError: the first problem.
    """
    device = settings.run.device
    if gpu_is_ruled_out():
        if device == "cuda":
            raise no_gpu_error()
        device = "cpu"
    llm = None
    if settings.prior.enabled:
        if device != "auto" or settings.prior.engine != "auto":  # otherwise torch must first look for a GPU
            engine = choose_engine(settings, device="cpu" if device == "cpu" else "cuda")
            if engine == "vllm":
                user_cache_dir()  # vLLM has a cache, too, and would otherwise write into a folder called "~"
        llm = check_llm(settings.llm)
    encoder = check_encoder(settings.encoder.path)
    if settings.run.max_env_step > 0:
        check_disk(settings, llm=llm, encoder=encoder)


# ---- disk ----


def checkpoint_size(settings: Settings, *, llm: ModelFiles | None, encoder: ModelFiles | None) -> int:
    """Estimated size in bytes of a checkpoint, without the replay buffer.

    Args:
        settings: all settings.
        llm: the LLM; None without an LLM, or if its size is not known yet. It is left out then.
        encoder: the text encoder; likewise.
    """
    size = _world_model_parameters(settings, encoder=encoder) * (TRAINED + FLOAT32)  # and the target network
    if llm is None:
        return size
    trained = TRAINED * num_trained(settings.llm, llm)
    return size + (trained if settings.llm.use_lora or trained else FLOAT32 * llm.num_parameters)


def num_trained(cfg: LLMSettings, llm: ModelFiles) -> int:
    """Estimated number of the LLM's parameters that are trained; ``llm.trained_layers`` is not considered."""
    if cfg.use_lora and llm.adapter_shapes:
        return sum(map(math.prod, llm.adapter_shapes.values()))
    if cfg.use_lora:
        matrices = [shape for name, shape in llm.shapes.items() if len(shape) == 2 and not name.startswith("lm_head")]
        vocab_size = llm.text_config.get("vocab_size")
        return cfg.lora_r * sum(sum(shape) for shape in matrices if shape[0] != vocab_size)
    return llm.num_parameters if cfg.enable_sft or cfg.enable_rft else 0


def llm_memory(settings: Settings, llm: ModelFiles) -> int:
    """Estimated size in bytes of the LLM in memory, without activations and without vLLM's copy.

    It consists of the parameters in float32, of a gradient and AdamW's two moments of each trained one, and of the copy
    for the KL penalty.
    """
    cfg = settings.llm
    copies = 2 if cfg.kl_weight > 0 and not cfg.use_lora else 1
    return FLOAT32 * copies * llm.num_parameters + TRAINED * num_trained(cfg, llm)


def _world_model_parameters(settings: Settings, *, encoder: ModelFiles | None) -> int:
    """Number of parameters of UniZero, without biases: encoder, transformer, action embeddings and four heads."""
    wm, actions = settings.world_model, settings.env.action_space_size
    if isinstance(actions, str):  # auto; TextWorld games are not generated yet
        names = settings.run.env_id.split(",")
        actions = default_action_space_size(sum(is_z_machine_name(name.strip()) for name in names))
    embedding_size = int(encoder.config.get("hidden_size", 0)) if encoder is not None else 0
    feature_size = embedding_size * (3 if settings.env.look_and_inventory else 1)
    support = 2 * wm.support_scale + 1
    rows = feature_size + (12 * wm.num_layers + 6) * wm.embed_dim + 2 * (actions + support)
    return rows * wm.embed_dim


def check_disk(settings: Settings, *, llm: ModelFiles | None, encoder: ModelFiles | None) -> None:
    """Raise UserError if the disk of ``run.output_dir`` has no space for a checkpoint."""
    output_dir = user_path(settings.run.output_dir, what="run.output_dir=")
    check_free_space(
        output_dir,
        size=checkpoint_size(settings, llm=llm, encoder=encoder),
        what=f"run.output_dir={output_dir}",
        content="a checkpoint",
        advice="give a folder on another disk: --set run.output_dir=FOLDER",
    )
