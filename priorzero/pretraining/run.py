"""Makes the data if necessary, trains, and writes the result."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from priorzero.llm.adapter_files import write_prompt_settings
from priorzero.llm.model_files import base_and_adapter, warn_of_other_prompt
from priorzero.llm.models import LanguageModel, choose_device, load_language_model, warn_of_long_prompts
from priorzero.llm.prompts import prompt_style
from priorzero.pretraining.card import save_model, write_card, write_figures
from priorzero.pretraining.collect import collect
from priorzero.pretraining.data import Episode, describe, load_episodes
from priorzero.pretraining.evaluation import table
from priorzero.pretraining.games import HELD_OUT, RESERVED, Split, check_trainable, jericho_games, textworld_games
from priorzero.pretraining.plan import PretrainingPlan
from priorzero.pretraining.training import Pretrainer, load_training, save_training
from priorzero.settings import Settings
from priorzero.types import UserError

SAVED_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PretrainingRun:
    """The arguments of :func:`pretrain`, besides the settings.

    Attributes:
        plan: how the LLM is trained.
        data: folder of the data. Games that it lacks are played if ``collects``.
        out: folder of the result.
        collects: make what is missing in ``data``.
        seconds_per_game: time for the search of valid actions in a game that is learnt from.
        tune: hold the validation games back from the training, and evaluate on them instead of on the held-out games.
        games: names of the games to learn from; empty: all.
        resume: continue the training in ``out``.
        base_model: what an adapter names as its base model; "": ``llm.path``, or what an adapter in it names.
        save_dtype: floating-point type of a saved adapter.
        command: the command line, for the model card.
    """

    plan: PretrainingPlan
    data: Path
    out: Path
    collects: bool = True
    seconds_per_game: float = 90.0
    tune: bool = False
    games: tuple[str, ...] = ()
    resume: bool = False
    base_model: str = ""
    save_dtype: str = "float32"
    command: str = ""


def make_data(folder: Path, *, seconds_per_game: float) -> None:
    """Play the walkthroughs of all games that ``folder`` lacks; see :func:`~priorzero.pretraining.collect.collect`."""
    jericho = jericho_games()
    held_out = [game for game in jericho if game.split == "held_out"]
    others = [game for game in jericho if game.split != "held_out"]
    collect([*held_out, *textworld_games(), *others], folder, seconds_per_game=seconds_per_game)


def pretrain(settings: Settings, run: PretrainingRun) -> dict[str, dict[str, float]]:
    """Pretrain the LLM of the settings; returns its figures by game at the end.

    Raises:
        UserError: an argument, the data or the LLM cannot be used.
    """
    started = time.monotonic()
    _check(settings, run)
    if run.collects:
        make_data(run.data, seconds_per_game=run.seconds_per_game)
    training, evaluation = choose_episodes(run.data, tune=run.tune, games=run.games)
    device = choose_device(settings.run.device)
    if device.type == "cpu" and settings.run.num_threads:
        torch.set_num_threads(settings.run.num_threads)
    torch.manual_seed(run.plan.seed)  # of new adapters
    llm = load_for_training(settings, device=device)
    pretrainer = Pretrainer(
        llm,
        settings.llm,
        style=prompt_style(settings),
        temperature=settings.prior.temperature,
        plan=run.plan,
        training=training,
        evaluation=evaluation,
    )
    if run.resume:
        load_training(run.out, pretrainer)
    logger.info(
        f"learning from {len(training)} games, evaluating on {len(evaluation)}, on {device.type}, {llm.compute_dtype}; "
        f"ready after {time.monotonic() - started:.0f} s"
    )
    run.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        save_training(run.out, pretrainer)
        _write(settings, run, pretrainer, training)

    pretrainer.run(save=save)
    save()
    if pretrainer.is_finished:
        (run.out / "training_state.pt").unlink()
    rows: dict[str, dict[str, float]] = pretrainer.progress.evaluations[-1]["games"]
    logger.info(f"written to {run.out} after {time.monotonic() - started:.0f} s\n{table(rows)}")
    return rows


def choose_episodes(data: Path, *, tune: bool, games: tuple[str, ...] = ()) -> tuple[list[Episode], list[Episode]]:
    """The episodes to learn from, and those to evaluate on.

    Raises:
        UserError: there are none, or a name in ``games`` is not one of a game to learn from.
    """
    splits: list[Split] = ["train"] if tune else ["train", "validation"]
    present: list[Split] = [split for split in splits if split == "train" or (data / split).is_dir()]
    training = load_episodes(data, present)
    if games:
        known = {episode.game for episode in training}
        unknown = [name for name in games if name not in known]
        if unknown and unknown[0] in (*HELD_OUT, *RESERVED):
            raise UserError(f"--games {unknown[0]}: this game is held out; allowed are {', '.join(sorted(known))}")
        if unknown:
            raise UserError(f"--games {unknown[0]}: not in {data}; allowed are {', '.join(sorted(known))}")
        training = [episode for episode in training if episode.game in games]
    for episode in training:
        check_trainable(episode.game)
    return training, load_episodes(data, ["validation" if tune else "held_out"])


def load_for_training(settings: Settings, *, device: torch.device) -> LanguageModel:
    """The LLM of the settings. On a GPU it scores padded rows, since these have little in common."""
    llm = load_language_model(settings.llm, device=device)
    warn_of_long_prompts(llm, settings.llm)
    warn_of_other_prompt(settings.llm)
    return dataclasses.replace(llm, pads_rows=device.type == "cuda")


def _check(settings: Settings, run: PretrainingRun) -> None:
    """Raise UserError if an argument is not allowed."""
    if settings.prior.mode != "score":
        raise UserError(
            f"prior.mode={settings.prior.mode}: pretraining is for priors that score the valid actions; type --set "
            "prior.mode=score"
        )
    if settings.prior.use_cot:
        raise UserError("prior.use_cot=true: solutions contain no thoughts; type --set prior.use_cot=false")
    for name in ("memory_lines", "imitation_share"):
        value = getattr(settings.llm, name)
        if value:
            raise UserError(f"llm.{name}={value:g}: walkthroughs have no earlier episodes; type --set llm.{name}=0")
    if run.save_dtype not in SAVED_TYPES:
        raise UserError(f"--save_dtype {run.save_dtype}: allowed are {', '.join(SAVED_TYPES)}")
    has_state = (run.out / "training_state.pt").exists()
    if not run.resume and (has_state or (run.out / "figures.json").exists()):
        advice = "type --resume to continue it, or give another --out" if has_state else "give another --out"
        raise UserError(f"--out {run.out}: contains a pretraining already; {advice}")


def _write(settings: Settings, run: PretrainingRun, pretrainer: Pretrainer, training: list[Episode]) -> None:
    """Write the model, the settings of its prompt, the figures and the card."""
    base_model = run.base_model or base_and_adapter(settings.llm)[0]
    save_model(pretrainer.llm, run.out, base_model=base_model, dtype=SAVED_TYPES[run.save_dtype])
    write_prompt_settings(run.out, settings.llm)
    details: dict[str, Any] = {
        "command": run.command,
        "plan": dataclasses.asdict(run.plan),
        "llm": json.loads(settings.llm.model_dump_json()),
        "games": list(describe(training)),
        "cores": len(os.sched_getaffinity(0)),
        "device": _device_name(pretrainer.llm.device),
    }
    write_figures(run.out, pretrainer.progress, details=details)
    write_card(
        run.out,
        pretrainer.progress,
        command=run.command,
        base_model=base_model,
        cfg=settings.llm,
        plan=run.plan,
        training=training,
        num_steps=pretrainer.num_steps,
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
