"""Exports a trained agent: checks everything, writes the folder as a whole, and uploads it to the hub."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from loguru import logger

from priorzero.config import dump_settings
from priorzero.exporting.llm import base_model, choose_form, is_adapter, llm_size, published_base_model, write_llm
from priorzero.exporting.plan import ExportPlan
from priorzero.llm.hub import check_upload, upload
from priorzero.llm.model_card import CARD
from priorzero.runs.checkpoint import save_export
from priorzero.runs.exported import (
    is_exported,
    read_play_state,
    read_world_model,
    write_world_model,
)
from priorzero.runs.files import (
    ACTIONS,
    CHECKPOINTS,
    CONFIG,
    EXPORTED_WORLD_MODEL,
    LLM_FOLDER,
    MANIFEST,
    PLAY_STATE,
    WORLD_MODEL,
)
from priorzero.runs.resume import check_trusted
from priorzero.runs.saved import find_agent
from priorzero.runtime.activity import announced
from priorzero.runtime.paths import check_free_space, user_path
from priorzero.types import UserError

LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # an identifier that the hub accepts
SMALL_FILES = 10_000_000  # bytes; action vocabulary, tokenizer, card and others


def plan_export(
    where: str,
    *,
    to: str,
    form: str | None = None,
    base: str = "",
    licence: str = "",
    push: str = "",
    private: bool = False,
    trust_remote_code: bool = False,
) -> ExportPlan:
    """Find the agent and check everything that can be checked before the export. Nothing is written.

    Args:
        where: the folder of a run or of a checkpoint.
        to: the folder to write; it must not exist, or be empty, and not be part of a run's checkpoints or of an export.
        form: of the LLM: ``merged``, ``adapter`` or ``none``; None chooses.
        base: what the card and an adapter name as the base model; "" for that of the run.
        licence: for the card; "" if it is not known.
        push: USER/NAME of a repository on the hub; "" for none.
        private: a new repository is private.
        trust_remote_code: code that comes with the LLM may run when the adapter is merged.

    Raises:
        UserError: the first problem.
    """
    if licence and not LICENCE.fullmatch(licence):
        raise UserError(
            f"--license {licence!r}: give one identifier of letters, digits, '-', '.' and '_', such as apache-2.0"
        )
    out = user_path(to, what="--to ").absolute()
    _check_out(out, to=to)
    checkpoint = find_agent(where, what="export ")
    if is_exported(checkpoint.folder):
        raise UserError(
            f"export {where}: this folder is an exported agent already; to upload it, type hf upload USER/NAME "
            f"{shlex.quote(where)} ."
        )
    form = choose_form(checkpoint, form)
    if base and form == "none":
        raise UserError(f"--base_model {base}: no LLM is exported; leave --base_model out")
    if not base and form != "none":
        base = base_model(checkpoint.settings.llm)
    if form == "merged" and is_adapter(checkpoint.folder / LLM_FOLDER):  # otherwise, the LLM is not loaded
        flags = [{"llm": {"trust_remote_code": True}}] if trust_remote_code else []
        check_trusted(checkpoint, flags, flag="--trust_remote_code")
    size = (checkpoint.folder / WORLD_MODEL).stat().st_size + SMALL_FILES
    size += llm_size(checkpoint, form=form, trust_remote_code=trust_remote_code)
    check_free_space(out, size=size, what=f"--to {to}", content="the export", advice="give a folder on another disk")
    if push:
        check_upload(push, private=private, marker=EXPORTED_WORLD_MODEL)
    elif private:
        raise UserError("--private has no effect without --push USER/NAME; add it, or leave --private out")
    return ExportPlan(checkpoint, out, form, base, licence, push, private, trust_remote_code)


def _check_out(out: Path, *, to: str) -> None:
    """Raise UserError if a folder cannot be written to ``out``, contains files, or is part of a run's checkpoints."""
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--to {to}: {existing} is a file; give another folder")
    if existing == out and any(out.iterdir()):
        raise UserError(f"--to {to}: this folder is not empty; give a new folder, or remove this one")
    for parent in out.resolve().parents:
        if (parent / MANIFEST).is_file():
            raise UserError(f"--to {to}: {parent} is a checkpoint or an exported agent; give a folder outside of it")
    for folder in (out.resolve(), *out.resolve().parents):
        if folder.name == CHECKPOINTS and (folder.parent / CONFIG).is_file():
            raise UserError(f"--to {to}: {folder} contains the checkpoints of a run; give a folder outside of it")


def export(plan: ExportPlan) -> str | None:
    """Write the folder, and upload it if the plan says so.

    Returns:
        The address of the repository; None if nothing was uploaded.

    Raises:
        OSError: a file cannot be read or written. Nothing of the folder remains.
        UserError: the LLM cannot be merged; or the upload failed, and the folder is complete.
    """
    for note in plan.checkpoint.notes:
        logger.warning(note)
    _warn_of_local_paths(plan)
    manifest = plan.checkpoint.manifest
    about: dict[str, Any] = {
        "llm": plan.form,
        "source": plan.checkpoint.folder.name,
        **{name: manifest[name] for name in ("counters", "games") if name in manifest},
        "run_versions": manifest["versions"],
    }
    save_export(plan.out, write=lambda folder: _write(plan, folder), about=about, unverified={CARD})
    if not plan.push:
        return None
    with announced("uploading"):
        return upload(plan.out, plan.push, private=plan.private, message=f"Export of {plan.checkpoint.folder.name}")


def _write(plan: ExportPlan, folder: Path) -> None:
    from priorzero.exporting.card import card_text, last_evaluation

    checkpoint = plan.checkpoint
    with announced("exporting the world model"):
        write_world_model(folder, read_world_model(checkpoint.folder))
        shutil.copyfile(checkpoint.folder / ACTIONS, folder / ACTIONS)
        (folder / CONFIG).write_text(dump_settings(plan.settings), encoding="utf-8")
        play_state = read_play_state(checkpoint.folder, checkpoint.manifest)
        (folder / PLAY_STATE).write_text(play_state.to_json(), encoding="utf-8")
    if plan.form != "none":
        with announced("exporting the LLM"):
            write_llm(
                checkpoint,
                folder / LLM_FOLDER,
                form=plan.form,
                base=plan.base,
                trust_remote_code=plan.trust_remote_code,
            )
    evaluations = last_evaluation(checkpoint.run_folder, env_step=checkpoint.manifest["counters"]["env_step"])
    (folder / CARD).write_text(card_text(plan, evaluations), encoding="utf-8")


def _warn_of_local_paths(plan: ExportPlan) -> None:
    """Log which names of folders become public, and that the card has no base model for the hub."""
    paths = plan.local_paths()
    if paths:
        named = ", ".join(f"{name}={value}" for name, value in paths.items())
        logger.warning(f"{CONFIG} names folders of this machine ({named}); others cannot use them")
    if plan.form != "none" and published_base_model(plan.base) is None:
        logger.warning(
            f"the base model {plan.base} is not the id of a model on the hub, so the metadata of {CARD} name no base "
            "model; --base_model USER/NAME names one"
        )
