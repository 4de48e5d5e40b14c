"""Benchmark of priors: where a language model puts the commands of walkthroughs among the valid actions.

    python scripts/benchmark_prior.py                                   # held-out games, the prompt of --config
    python scripts/benchmark_prior.py --set llm.adapter=                # without the adapter of --config
    python scripts/benchmark_prior.py --llm FOLDER                      # another LLM
    python scripts/benchmark_prior.py --prompts all --states 10         # all prompts, less states
    python scripts/benchmark_prior.py --games "zork1.z5,textworld:simple?seed=101&goal=brief"

The prior is computed in states of walkthroughs of Jericho's games and of generated games. The history in a prompt is
the walkthrough up to the state. A walkthrough's command counts as the valid action that leads to the same world. States
without such an action are left out.

For each game the script prints the mean place of the command (1 is the most probable action; actions of equal
probability share the mean of their places), how often it is the first, and its mean log-probability in nats. Figures of
a uniform prior are in brackets. "calibrated" is the log-probability with the temperature and the floor (weight of a
uniform distribution) that fit best on all other games. Then it prints the means over games for each prompt.

The walkthroughs are played once (python -m priorzero.pretrain --collect_only does the same), which takes minutes for
some games. OUT/prior.json gets the figures after each prompt. Rows of earlier calls with the same states are kept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_tools import RESULTS, ROOT, at_least, exit_code, make_folder, names_from, write_json

from priorzero.config import parse_assignments, read_config_file, resolve_settings
from priorzero.llm.model_files import warn_of_other_prompt
from priorzero.llm.models import LanguageModel, choose_device, load_language_model
from priorzero.llm.prompts import prompt_style
from priorzero.pretraining.collect import collect
from priorzero.pretraining.data import Decision, Episode, PromptMaker, load_episodes, searched_decisions
from priorzero.pretraining.evaluation import (
    Outcome,
    figures_by_game,
    fit_calibration,
    group_means,
    outcomes,
    table,
)
from priorzero.pretraining.games import PretrainingGame, Split, jericho_games, textworld_games
from priorzero.runtime.paths import user_cache_dir
from priorzero.settings import Settings
from priorzero.types import UserError

QUESTION = {
    "prompt_layout": "transcript", "history": "all", "history_length": 20, "history_chars": 0,
    "show_observation": True, "observation_chars": 200, "list_commands": False,
}  # fmt: skip
WALKTHROUGH = QUESTION | {"prompt_layout": "walkthrough", "history": "loop_free", "show_observation": False}
# prompt -> settings of the group llm, in addition to --config
PROMPTS: dict[str, dict[str, Any]] = {
    "config": {},
    "question": QUESTION,
    "question_short": QUESTION | {"history_length": 3},
    "question_answers": QUESTION | {"history_length": 5, "history_chars": 300, "observation_chars": 0},
    "question_no_observation": QUESTION | {"show_observation": False},
    "question_commands": QUESTION | {"list_commands": True},
    "walkthrough": WALKTHROUGH,
    "walkthrough_observation": WALKTHROUGH | {"show_observation": True},
    "walkthrough_commands": WALKTHROUGH | {"list_commands": True},
}
ROWS_PER_FORWARD = {"cpu": 1, "cuda": 16}


def settings_for(prompt: str, options: argparse.Namespace) -> Settings:
    """The settings of a prompt.

    Raises:
        UserError: a setting is not allowed.
    """
    llm = PROMPTS[prompt] | ({} if options.llm is None else {"path": options.llm})
    layers = [read_config_file(options.config), {"prior": {"mode": "score"}, "llm": llm}]
    settings = resolve_settings(*layers, parse_assignments(options.assignments))
    if settings.prior.use_cot:
        raise UserError("prior.use_cot=true: the benchmark generates no thoughts; type --set prior.use_cot=false")
    return settings


def find_episodes(options: argparse.Namespace) -> list[Episode]:
    """The episodes that the benchmark uses. Walkthroughs that the data lacks are played.

    Raises:
        UserError: a game is unknown or has no walkthrough, or there is none.
    """
    data = options.data or user_cache_dir() / "pretraining"
    split: Split = options.split
    if options.games is None:
        games = [game for game in [*jericho_games(), *textworld_games()] if game.split == split]
        if not options.no_collect:
            collect(games, data)
        return load_episodes(data, [split])
    from priorzero.envs import resolve_game

    names = [name.strip() for name in options.games.split(",")]
    wanted = {resolve_game(name).name for name in names}
    if options.no_collect:
        by_name: dict[str, Episode] = {}
        for folder, part in (data, split), (data / "chosen", "held_out"):
            found = load_episodes(folder, [part]) if (folder / part).is_dir() else []
            by_name |= {episode.game: episode for episode in found if episode.game in wanted}
        missing = wanted - by_name.keys()
        if missing:
            raise UserError(f"{data} contains no {', '.join(sorted(missing))}; leave --no_collect out")
        return list(by_name.values())
    collect([PretrainingGame(name, "held_out") for name in names], data / "chosen", require_all=True)
    return [episode for episode in load_episodes(data / "chosen", ["held_out"]) if episode.game in wanted]


def compute(
    llm: LanguageModel, settings: Settings, episodes: Sequence[Episode], decisions: Sequence[Decision]
) -> list[Outcome]:
    """The priors of the LLM with the prompt of the settings.

    Raises:
        UserError: a prompt does not fit into the model. Its prior would be uniform.
    """
    prompts = PromptMaker(llm, prompt_style(settings), episodes)
    found = outcomes(llm, prompts, decisions, rows_per_forward=ROWS_PER_FORWARD[llm.device.type])
    if any(len(outcome.logprobs) > 1 and np.ptp(outcome.logprobs) == 0.0 for outcome in found):
        raise UserError(
            "a prompt does not fit into the model; leave this prompt out, or give --set llm.prompt_max_len=N with "
            f"N below {settings.llm.prompt_max_len}"
        )
    return found


def read_rows(file: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """The rows that an earlier call with the same arguments has written.

    Raises:
        UserError: the arguments were different, or the file cannot be read.
    """
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
        if {key: found.get(key) for key in arguments} == arguments:
            return dict(found["rows"])
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: was not written by this script ({error}); give another --out") from error
    raise UserError(f"{file}: contains figures of other states; give another --out")


def run(options: argparse.Namespace) -> None:
    """Compute the priors, print the tables and write the file.

    Raises:
        UserError: an argument is not allowed, or the LLM cannot be loaded.
    """
    names = list(PROMPTS) if options.prompts == "all" else names_from(options.prompts, list(PROMPTS), flag="--prompts")
    settings = {name: settings_for(name, options) for name in names}
    make_folder(options.out)
    first = settings[names[0]]
    episodes = find_episodes(options)
    decisions = searched_decisions(episodes, per_game=options.states)
    if not decisions:
        raise UserError("the walkthroughs have no state whose command is a valid action; name other games")
    for name in names:
        warn_of_other_prompt(settings[name].llm)
    file = options.out / "prior.json"
    states = {episode.game: sum(d.episode == n for d in decisions) for n, episode in enumerate(episodes)}
    rows = read_rows(file, {"states": states})
    llm = load_language_model(first.llm, device=choose_device(first.run.device))
    label = options.label or " with ".join(filter(None, (first.llm.path, first.llm.adapter)))
    for name in names:
        started = time.perf_counter()
        found = compute(llm, settings[name], episodes, decisions)
        seconds = (time.perf_counter() - started) / len(decisions)
        games = figures_by_game(found)
        fitted = fit_calibration(found)
        rows[f"{label}: {name}"] = {
            "games": games,
            "s/state": seconds,
            "temperature": fitted.temperature,
            "floor": fitted.floor,
        }
        write_json(file, {"states": states, "rows": rows})
        print(f"\n{label}, {name}: {seconds:.2f} s a state; best on all games together: temperature "
              f"{fitted.temperature:.2g}, floor {fitted.floor:g}\n{table(games)}", flush=True)  # fmt: skip
    for group in ("Jericho", "TextWorld"):
        means = {name: group_means(row["games"]) for name, row in rows.items()}
        if any(group in mean for mean in means.values()):
            print(f"\n{group}, means over games\n" + table({n: mean[group] for n, mean in means.items()}))
    print(f"written to {file}")


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments that say which priors are computed in which states."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "learning_jericho.yaml", metavar="FILE")
    parser.add_argument("--set", action="append", default=[], dest="assignments", metavar="GROUP.KEY=VALUE")
    parser.add_argument("--llm", metavar="PATH", help="llm.path (default: that of --config)")
    parser.add_argument("--games", metavar="A,B", help="any games with a walkthrough (default: those of --split)")
    parser.add_argument("--split", choices=("held_out", "validation"), default="held_out")
    parser.add_argument("--states", type=at_least(1), default=25, help="states of each game (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the walkthroughs (default: the cache)")
    parser.add_argument("--no_collect", action="store_true", help="play no walkthrough; use those in --data")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error that the user can correct."""
    parser = build_parser(__doc__)
    parser.add_argument("--label", help="name of the LLM in the tables (default: its path and adapter)")
    parser.add_argument("--prompts", default="config", help=f"all, or some of {','.join(PROMPTS)} (default: config)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="folder of the JSON file")
    return exit_code(run, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
