"""Finds the checkpoint that a trained agent is loaded from, and the settings that it plays with. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from priorzero.config import resolve_settings
from priorzero.envs import GameSpec
from priorzero.runs.checkpoint import Checkpoint, read_checkpoint
from priorzero.runs.files import CHECKPOINTS, LLM_FOLDER, MANIFEST
from priorzero.runs.folder import given_folder
from priorzero.runs.resume import check_is_run, check_trusted, newest_intact, note_changed_versions
from priorzero.runtime.paths import user_path
from priorzero.settings import MODES_WITHOUT_LLM, EvalMode, Settings
from priorzero.types import UserError

# Settings that the parameters of the world model depend on.
ARCHITECTURE = (
    "env.action_space_size",
    "env.look_and_inventory",
    "encoder.path",
    "world_model.num_layers",
    "world_model.num_heads",
    "world_model.embed_dim",
    "world_model.num_unroll_steps",
    "world_model.support_scale",
)


def find_agent(where: str | Path, *, what: str = "") -> Checkpoint:
    """The checkpoint of a trained agent, from either training loop. No file is changed.

    Args:
        where: a run's folder, whose newest intact checkpoint is taken; the folder of a checkpoint, or of an exported
            agent.
        what: the command, as the beginning of messages.

    Raises:
        UserError: there is no intact checkpoint.
    """
    folder = given_folder(where, what=what)
    if folder.name == CHECKPOINTS and folder.is_dir():
        folder = folder.parent
    advice = "name a run's folder, a folder RUN/checkpoints/iteration_N, or an exported agent"
    try:
        if (folder / MANIFEST).is_file():
            checkpoint = read_checkpoint(folder, resumable=False)
        else:
            check_is_run(folder, what=f"{what}{where}", advice=advice)
            checkpoint = newest_intact(folder, resumable=False)
    except ValueError as error:
        raise UserError(f"{what}{where}: {error}; {advice}") from error
    note_changed_versions(checkpoint)
    return checkpoint


def was_removed(checkpoint: Checkpoint) -> bool:
    """Whether a run in progress has removed the checkpoint since it was found (``run.keep_checkpoints``)."""
    return not (checkpoint.folder / MANIFEST).is_file()


def agent_settings(checkpoint: Checkpoint, overrides: Sequence[Mapping[str, Mapping[str, Any]]] = ()) -> Settings:
    """The settings that a trained agent plays with: those of its run, with the LLM of the checkpoint.

    Nothing is trained or logged, so the copy of the LLM for the KL penalty and Weights & Biases are left out.

    Args:
        checkpoint: the agent's.
        overrides: layers as of :func:`~priorzero.config.resolve_settings`, which win. Another ``llm.path`` replaces the
            LLM of the checkpoint.

    Raises:
        UserError: the settings are invalid, change the world model's architecture, or contain code of others that
            nobody has allowed to run; or the agent was exported without its LLM.
    """
    check_trusted(checkpoint, overrides)
    exported_llm = checkpoint.manifest.get("llm")  # only exported agents have this entry
    if exported_llm == "none" and checkpoint.settings.prior.enabled:
        raise UserError(
            f"{checkpoint.folder}: this agent was exported without its LLM, so it cannot play; export it again without "
            "--llm none. load_world_model loads its world model"
        )
    llm: dict[str, Any] = {"kl_weight": 0.0, "imitation_share": 0.0}
    if (checkpoint.folder / LLM_FOLDER).is_dir():
        llm |= {"path": str((checkpoint.folder / LLM_FOLDER).absolute()), "adapter": ""}
    if exported_llm == "merged":
        llm["use_lora"] = False
    run = {"max_env_step": 0, "loggers": ["tensorboard"]}
    settings = resolve_settings(checkpoint.settings, {"llm": llm, "run": run}, *overrides)
    _check_architecture(settings, saved=checkpoint.settings)
    return settings


def _check_architecture(settings: Settings, *, saved: Settings) -> None:
    """Raise UserError if the parameters of the world model do not fit the settings.

    A copy of the text encoder in another folder may be named.
    """
    now, before = settings.model_dump(), saved.model_dump()
    for name in ARCHITECTURE:
        group, key = name.split(".")
        value = now[group][key]
        is_folder = name == "encoder.path" and user_path(value, what="encoder.path=").is_dir()
        if value != before[group][key] and not is_folder:
            raise UserError(
                f"{name}={value}: the architecture of a trained agent cannot change; {name} is {before[group][key]} in "
                f"this checkpoint. Leave it out"
            )


def plays_with_llm(checkpoint: Checkpoint, overrides: Sequence[Mapping[str, Mapping[str, Any]]] = ()) -> bool:
    """Whether a trained agent has an LLM, and layers of settings do not disable it (``prior.enabled``)."""
    given = [layer["prior"]["enabled"] for layer in overrides if "enabled" in layer.get("prior", {})]
    return bool([checkpoint.settings.prior.enabled, *given][-1])


def check_modes(
    checkpoint: Checkpoint, modes: Sequence[EvalMode], overrides: Sequence[Mapping[str, Mapping[str, Any]]] = ()
) -> None:
    """Raise UserError if one of ``modes`` needs an LLM, and the agent plays without one."""
    wrong = [mode for mode in modes if mode not in MODES_WITHOUT_LLM]
    if wrong and not plays_with_llm(checkpoint, overrides):
        raise UserError(
            f"the mode {wrong[0]} needs an LLM, but the agent of {checkpoint.folder} plays without one "
            f"(prior.enabled=false); the modes without an LLM are {', '.join(MODES_WITHOUT_LLM)}"
        )


def was_trained_on(checkpoint: Checkpoint, game: GameSpec) -> bool:
    """Whether the agent was trained on a game: the same name and the same file.

    The checkpoints of runs on a Ray cluster do not contain the files. There the names in ``run.env_id`` are compared.
    """
    games = checkpoint.manifest.get("games")
    if games is not None:
        return bool(games.get(game.name) == game.md5)
    return game.env_id in [name.strip() for name in checkpoint.settings.run.env_id.split(",")]
