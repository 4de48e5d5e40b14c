"""Watch a trained agent play: ``python -m priorzero.watch RUN_OR_CHECKPOINT`` writes a page for each episode."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from priorzero.config import parse_assignments
from priorzero.runs.files import RECORDINGS
from priorzero.runs.progress import terminal_output
from priorzero.runs.saved import find_agent, plays_with_llm, was_removed
from priorzero.runtime.activity import announced
from priorzero.runtime.command import add_set_argument, check_positive, program_name, run_command
from priorzero.runtime.concurrency import only_run_of_process
from priorzero.runtime.paths import user_path
from priorzero.runtime.streams import print_output
from priorzero.settings import EVAL_MODES, EvalMode
from priorzero.types import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from priorzero.play.transcript import EvaluationTranscript
    from priorzero.play.watching import Viewer
    from priorzero.preflight import AgentPreparation

COMMAND = "watch "  # how messages begin
DESCRIPTION = """\
Watch a trained agent play, without exploration and without learning. For each episode, a page is written that shows
step by step what the game said and how the agent decided: the LLM's prior, the world model's policy, the visits and
values of the search, its tree and the prompt. The page is one file, which a browser shows without a network."""

EPILOG = """\
examples:
  python -m priorzero.watch data_priorzero/NAME                    one episode of the newest checkpoint
  python -m priorzero.watch data_priorzero/NAME --episodes 3 --mode prior
  python -m priorzero.watch data_priorzero/NAME/checkpoints/iteration_500 --games zork1.z5
  python -m priorzero.watch data_priorzero/NAME --text             in the terminal
  python -m priorzero.watch data_priorzero/NAME --human            play yourself, with the agent's advice
  python -m priorzero.watch data_priorzero/NAME/recordings/FILE    a training episode (run.record_every)
  python -m priorzero.watch data_priorzero/NAME/last_evaluation.json
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("priorzero.watch"),
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what",
        metavar="RUN_OR_CHECKPOINT",
        help="the folder of a run, of a checkpoint or of an exported agent; or a file of transcripts",
    )
    parser.add_argument(
        "--games", metavar="A,B", help="the games to play, as for --env_id (default: the first game of the run)"
    )
    parser.add_argument(
        "--mode",
        choices=EVAL_MODES,
        help="the agent that plays, as in eval.modes (default: world_model_with_prior, without an LLM world_model)",
    )
    parser.add_argument("--episodes", type=int, metavar="N", help="number of episodes of each game (default 1)")
    parser.add_argument(
        "--seed", type=int, help="seed, as run.seed (default: the run's, so that its last evaluation is seen)"
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="folder of the pages (default: watch/ in the run's folder; of an export or a file: beside it)",
    )
    parser.add_argument("--text", action="store_true", help="show the episodes in the terminal; pages only with --out")
    parser.add_argument(
        "--human",
        action="store_true",
        help="play yourself in the terminal, with the agent's advice; pages only with --out",
    )
    add_set_argument(parser, help="change a setting of the agent; may be given several times")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 2 after an error that the user can correct.
    """
    return run_command(build_parser(), argv, _watch)


def _watch(arguments: argparse.Namespace) -> None:
    path = user_path(arguments.what, what=COMMAND)
    if arguments.text and arguments.human:
        raise UserError("--text and --human cannot be combined; leave one of them out")
    check_positive("--episodes", arguments.episodes)
    out = None if arguments.out is None else user_path(arguments.out, what="--out ")
    if path.name == RECORDINGS and path.is_dir():
        names = sorted(file.name for file in path.glob("*.json"))
        example = f", such as {shlex.quote(str(path / names[-1]))}" if names else ", but it contains none"
        raise UserError(f"{path}: this is the folder of a run's recorded episodes; name a file in it{example}")
    if path.is_file():
        _watch_file(arguments, path, out=out)
    else:
        _watch_agent(arguments, out=out)


def _write_pages(episodes: Sequence[EvaluationTranscript], folder: Path, *, stem: str = "") -> None:
    from priorzero.runs.pages.episodes import write_episodes

    try:
        paths = write_episodes(episodes, folder, stem=stem)
    except OSError as error:
        raise UserError(
            f"{folder}: the pages cannot be written ({error}); name another folder: --out FOLDER"
        ) from error
    for path in paths:
        print_output(str(path))


# ---- episodes that were played before ----


def _watch_file(arguments: argparse.Namespace, path: Path, *, out: Path | None) -> None:
    """Show the transcripts of a file."""
    from priorzero.play.transcript import read_transcripts

    values = {name: getattr(arguments, name) for name in ("games", "mode", "episodes", "seed")}
    given = [name for name, value in values.items() if value is not None]
    given += [name for name, value in (("human", arguments.human), ("set", arguments.assignments)) if value]
    if given:
        name = given[0]
        raise UserError(f"--{name}: {path} is a file, whose episodes were played before; leave --{name} out")
    try:
        env_step, episodes = read_transcripts(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: is not a recorded episode, since it is not JSON ({error}); name a run's folder, a checkpoint, "
            "or a file of RUN/recordings/"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); name a run's folder, a checkpoint, or a file of RUN/recordings/"
        ) from error
    if not episodes:
        raise UserError(f"{path} contains no episodes; name another file, or a run's folder")
    for episode in episodes:
        episode.setdefault("env_step", env_step)
    if arguments.text:
        from priorzero.runs.pages.terminal import show_episode

        console = _console()
        for episode in episodes:
            show_episode(console, episode)
    if out is not None or not arguments.text:
        is_single = len(episodes) == 1
        _write_pages(episodes, out or (path.parent if is_single else path.parent / "watch"), stem=path.stem)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


# ---- a trained agent ----


def _watch_agent(arguments: argparse.Namespace, *, out: Path | None) -> None:
    """Load a trained agent and let it play."""
    in_terminal = arguments.text or arguments.human
    with contextlib.ExitStack() as display:
        display.enter_context(terminal_output())
        if out is not None:
            _check_folder(out)
        with announced("preparing"):
            prepared, mode = _prepare(arguments)
        folder = out or _default_folder(prepared)
        if not in_terminal:
            _check_folder(folder)
        with announced("loading the libraries"):
            from priorzero.saved_agent import agent_errors, watch_agent  # late: imports torch and LightZero
        if was_removed(prepared.checkpoint):
            prepared, mode = _prepare(arguments)

        def make_viewer(title: str) -> Viewer:
            if in_terminal:
                display.close()  # its live line and the episodes would disturb each other
            return _viewer(arguments, title=title, reward_scale=prepared.settings.train.reward_scale)

        with only_run_of_process(), agent_errors(prepared):
            episodes = asyncio.run(
                watch_agent(
                    prepared,
                    mode=mode,
                    games=prepared.games if arguments.games is not None else prepared.games[:1],
                    episodes=arguments.episodes or 1,
                    make_viewer=make_viewer,
                )
            )
    if out is not None or not in_terminal:
        _write_pages(episodes, folder)


def _prepare(arguments: argparse.Namespace) -> tuple[AgentPreparation, EvalMode]:
    """Find the agent and check its games. By default, it plays with its LLM if it has one."""
    from priorzero.preflight import prepare_agent

    overrides: list[Mapping[str, Mapping[str, Any]]] = [parse_assignments(arguments.assignments)]
    if arguments.games is not None and not arguments.games.strip():
        raise UserError("--games is empty; name a game, such as zork1.z5, or leave --games out for that of the run")
    if "modes" in overrides[0].get("eval", {}):
        raise UserError("--set eval.modes has no effect here; name the mode with --mode")
    if arguments.seed is not None:
        overrides.append({"run": {"seed": arguments.seed}})
    checkpoint = find_agent(arguments.what, what=COMMAND)
    mode: EvalMode = "world_model_with_prior" if plays_with_llm(checkpoint, overrides) else "world_model"
    mode = arguments.mode or mode
    prepared = prepare_agent(checkpoint, what=COMMAND, games=arguments.games, modes=[mode], overrides=overrides)
    return prepared, mode


def _default_folder(prepared: AgentPreparation) -> Path:
    """``watch`` in the run's folder; beside an exported agent, or a checkpoint that was copied from the run."""
    checkpoint = prepared.checkpoint.folder
    return (checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent) / "watch"


def _check_folder(folder: Path) -> None:
    """Check that pages can be written into a folder, before the agent plays. Raises UserError."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{folder}: pages cannot be written there, since {existing} is not a writable folder; name "
            "another one: --out FOLDER"
        )


def _viewer(arguments: argparse.Namespace, *, title: str, reward_scale: float) -> Viewer:
    from priorzero.play.watching import Viewer
    from priorzero.runs.pages.terminal import HumanViewer, TextViewer

    if arguments.human:
        return HumanViewer(_console(), title=title, reward_scale=reward_scale)
    return TextViewer(_console(), title=title, reward_scale=reward_scale) if arguments.text else Viewer()


if __name__ == "__main__":
    sys.exit(main())
