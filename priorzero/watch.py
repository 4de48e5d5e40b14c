"""Watch a trained agent play: ``python -m priorzero.watch RUN`` writes a page for each episode."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from priorzero.config import parse_assignments
from priorzero.runs.progress import terminal_output
from priorzero.runtime.activity import announced
from priorzero.runtime.concurrency import exit_immediately_on_signal, only_run_of_process
from priorzero.runtime.paths import user_path
from priorzero.runtime.streams import print_error, print_output, standard_streams
from priorzero.settings import EVAL_MODES, MODES_WITHOUT_LLM
from priorzero.types import EngineError, GameWorkerError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from priorzero.envs import GameSpec
    from priorzero.play.transcript import EvaluationTranscript
    from priorzero.play.watching import Viewer
    from priorzero.preflight import AgentPreparation
    from priorzero.saved_agent import SavedAgent

DESCRIPTION = """\
Watch a trained agent play, without exploration and without learning. For each episode, a page is written that shows
step by step what the game said and what the agent thought: the LLM's prior, the world model's policy, the visits and
values of the search, its tree and the prompt. The page is one file, which a browser shows without a network."""

EPILOG = """\
examples:
  python -m priorzero.watch data_priorzero/NAME                    one episode of the newest checkpoint
  python -m priorzero.watch data_priorzero/NAME --episodes 3 --mode prior
  python -m priorzero.watch data_priorzero/NAME/checkpoints/iteration_500 --game zork1.z5
  python -m priorzero.watch data_priorzero/NAME --text             in the terminal
  python -m priorzero.watch data_priorzero/NAME --human            play yourself, with the agent's advice
  python -m priorzero.watch data_priorzero/NAME/recordings/FILE    a training episode (run.record_every)
  python -m priorzero.watch data_priorzero/NAME/last_evaluation.json
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.watch",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", metavar="RUN", help="the folder of a run or of a checkpoint, or a file of transcripts")
    parser.add_argument("--game", help="the game to play, as for --env_id (default: the first game of the run)")
    parser.add_argument(
        "--mode",
        choices=EVAL_MODES,
        help="the agent that plays, as in eval.modes (default: world_model_with_prior, without an LLM world_model)",
    )
    parser.add_argument("--episodes", type=int, help="number of episodes (default 1)")
    parser.add_argument(
        "--seed", type=int, help="seed, as run.seed (default: the run's, so that its last evaluation is seen)"
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="folder of the pages (default: watch/ in the run's folder; of a file: beside it)",
    )
    parser.add_argument("--text", action="store_true", help="show the episodes in the terminal; pages only with --out")
    parser.add_argument(
        "--human",
        action="store_true",
        help="play yourself in the terminal, with the agent's advice; pages only with --out",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="GROUP.KEY=VALUE",
        help="change a setting of the run; may be given several times",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 2 after an error that the user can correct.
    """
    with standard_streams(), exit_immediately_on_signal():
        arguments = build_parser().parse_args(argv)
        try:
            _watch(arguments)
        except UserError as error:
            print_error(str(error))
            return 2
    return 0


def _watch(arguments: argparse.Namespace) -> None:
    path = user_path(arguments.what, what="watch ")
    if arguments.text and arguments.human:
        raise UserError("--text and --human cannot be combined; leave one of them out")
    if arguments.episodes is not None and arguments.episodes < 1:
        raise UserError(f"--episodes {arguments.episodes}: give a whole number of at least 1")
    out = None if arguments.out is None else user_path(arguments.out, what="--out ")
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

    values = {name: getattr(arguments, name) for name in ("game", "mode", "episodes", "seed")}
    given = [name for name, value in values.items() if value is not None]
    given += [name for name, value in (("human", arguments.human), ("set", arguments.assignments)) if value]
    if given:
        name = given[0]
        raise UserError(f"--{name}: {path} is a file, whose episodes were played before; leave --{name} out")
    try:
        env_step, episodes = read_transcripts(path)
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
        with announced("preparing"):
            from priorzero.preflight import prepare_agent

            prepared = prepare_agent(
                arguments.what, what="watch ", games=arguments.game, overrides=_overrides(arguments)
            )
        mode = arguments.mode or ("world_model_with_prior" if prepared.settings.prior.enabled else "world_model")
        if mode not in MODES_WITHOUT_LLM and not prepared.settings.prior.enabled:
            raise UserError(
                f"--mode {mode}: this agent was trained without an LLM (prior.enabled=false); type --mode world_model "
                "or --mode random"
            )
        folder = out or _default_folder(prepared)
        if out is not None or not in_terminal:
            _check_folder(folder)
        with announced("loading the libraries"):
            from priorzero.saved_agent import loaded_agent  # late: imports torch and LightZero

        async def play() -> list[EvaluationTranscript]:
            async with loaded_agent(prepared) as saved:
                if in_terminal:
                    display.close()  # its live line and the episodes would disturb each other
                return await _play(saved, arguments, mode=mode, games=_games(prepared, arguments))

        try:
            with only_run_of_process():
                episodes = asyncio.run(play())
        except (GameWorkerError, EngineError) as error:
            raise UserError(_advice(error, prepared)) from error
    if out is not None or not in_terminal:
        _write_pages(episodes, folder)


def _advice(error: GameWorkerError | EngineError, prepared: AgentPreparation) -> str:
    if isinstance(error, EngineError):
        return f"the LLM engine failed: {error}; type --set prior.engine=transformers to use another one"
    longer = 10 * prepared.settings.env.step_timeout_s
    return f"the game failed: {error}. If it needs more time, type --set env.step_timeout_s={longer:g}"


def _overrides(arguments: argparse.Namespace) -> list[Mapping[str, Mapping[str, Any]]]:
    """Layers of settings. Without need the LLM is not loaded."""
    layers: list[Mapping[str, Mapping[str, Any]]] = [parse_assignments(arguments.assignments)]
    if arguments.seed is not None:
        layers.append({"run": {"seed": arguments.seed}})
    if arguments.mode in MODES_WITHOUT_LLM:
        layers.append({"prior": {"enabled": False}, "eval": {"modes": [arguments.mode]}})
    return layers


def _games(prepared: AgentPreparation, arguments: argparse.Namespace) -> Sequence[GameSpec]:
    """The games of ``--game``, or the first of the run."""
    return prepared.games if arguments.game is not None else prepared.games[:1]


def _default_folder(prepared: AgentPreparation) -> Path:
    """``watch`` in the run's folder; beside a checkpoint that was copied from it."""
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


async def _play(
    saved: SavedAgent, arguments: argparse.Namespace, *, mode: Any, games: Sequence[GameSpec]
) -> list[EvaluationTranscript]:
    """Play the episodes. An episode that a person ends is the last one and is left out."""
    from priorzero.agent import FIRST_EVALUATION_SEED
    from priorzero.envs import make_workers
    from priorzero.play.transcript import HUMAN
    from priorzero.play.watching import play_episode

    first_seed = saved.settings.run.seed + FIRST_EVALUATION_SEED  # as in an evaluation
    count = arguments.episodes or 1
    env_step = saved.checkpoint.manifest.get("counters", {}).get("env_step", 0)
    episodes: list[EvaluationTranscript] = []
    for game in games:
        workers = make_workers(saved.settings, [game], count=count, first_seed=first_seed)
        rngs = [np.random.default_rng(child) for child in np.random.SeedSequence(first_seed).spawn(count)]
        for number, (worker, rng) in enumerate(zip(workers, rngs, strict=True), 1):
            viewer = _viewer(arguments, title=f"{game.name}: episode {number} of {count}")
            try:
                with announced(f"{game.name}: playing episode {number} of {count}"):
                    played = await play_episode(
                        worker, saved.player, game=game.name, mode=mode, rng=rng, viewer=viewer,
                        memory=saved.memory(game),
                    )  # fmt: skip
            finally:
                await worker.close()
            if played is None:
                return episodes
            episodes.append({
                "mode": HUMAN if arguments.human else mode, "game": game.name, "unseen": game in saved.unseen,
                "episode": number, "env_step": env_step, **played,
            })  # fmt: skip
    return episodes


def _viewer(arguments: argparse.Namespace, *, title: str) -> Viewer:
    from priorzero.play.watching import Viewer
    from priorzero.runs.pages.terminal import HumanViewer, TextViewer

    if arguments.human:
        return HumanViewer(_console(), title=title)
    return TextViewer(_console(), title=title) if arguments.text else Viewer()


if __name__ == "__main__":
    sys.exit(main())
