"""Compare what agents learn in equal numbers of environment steps: random, the LLM alone, UniZero, three PriorZeros.

    python scripts/benchmark_learning.py --games textworld-simple --agents random,unizero --seeds 0,1
    python scripts/benchmark_learning.py --games zork1 --seeds 0 --set prior.alpha=0.2 --label alpha0.2
    python scripts/plot_learning.py bench_results/learning/results.jsonl --plot curves.svg

Each (agent, game, seed) is a run in its own process. The agents random and prior do not learn; they play
``eval.episodes=50`` episodes (``--set`` changes the number). The settings come from ``--config``, then from the agent,
then from ``--set``.

OUT/results.jsonl gets one line for each run that is complete. If the same command is called again, only missing runs
are started. A line stands for a run if agent, label, game, seed, environment steps and all settings are equal, except
for those that only name or log a run, and ``run.num_threads``. Versions of the code are recorded in the line
(``versions``), but not compared.

A run that fails or is interrupted has no line. Its log is in OUT/logs and its folder in OUT/runs.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_tools import ROOT, at_least, make_folder, package_versions

from priorzero.config import differences, parse_assignments, read_config_file, resolve_settings
from priorzero.envs.games import resolve_game
from priorzero.runtime.concurrency import gather_or_cancel
from priorzero.settings import RunSettings, Settings
from priorzero.types import UserError

EVALUATION_ONLY = {"run.max_env_step": "0", "eval.episodes": "50"}
# agent -> its changes to the settings of --config
AGENTS: dict[str, dict[str, str]] = {
    "random": {"prior.enabled": "false", "eval.modes": "random", **EVALUATION_ONLY},
    "prior": {"eval.modes": "prior_sampled,prior", **EVALUATION_ONLY},
    "unizero": {"prior.enabled": "false", "eval.modes": "world_model"},
    "priorzero_frozen": {"llm.enable_sft": "false", "llm.enable_rft": "false"},
    "priorzero_sft": {"llm.enable_rft": "false"},
    "priorzero_sft_rft": {},
}
# agents that do not learn -> the evaluation mode that is their result
MODE_OF = {"random": "random", "prior": "prior_sampled"}


def _simple_games(seeds: Sequence[int], goal: str = "") -> tuple[str, ...]:
    return tuple(f"textworld:simple?{goal and f'goal={goal}&'}seed={seed}" for seed in seeds)


REPORT_SEEDS, TUNING_SEEDS = range(201, 211), range(101, 105)  # settings are chosen on the tuning games
GAME_SETS: dict[str, tuple[str, ...]] = {
    "textworld-simple": _simple_games(REPORT_SEEDS),
    "textworld-simple-brief": _simple_games(REPORT_SEEDS, "brief"),
    "textworld-simple-none": _simple_games(REPORT_SEEDS, "none"),
    "textworld-tuning": _simple_games(TUNING_SEEDS),
    "textworld-tuning-brief": _simple_games(TUNING_SEEDS, "brief"),
    "textworld-tuning-none": _simple_games(TUNING_SEEDS, "none"),
    "coin-collector": tuple(f"textworld:coin-collector?level=5&seed={n}" for n in (1, 2, 3)),
    "detective": ("detective.z5",),
    "zork1": ("zork1.z5",),
}

WINS_IN_A_ROW = 5  # won episodes after which a run counts as solved
LAST_EPISODES = 50  # episodes of last_mean_score
# settings of the group run in which the runs of one row of the table may differ
NOT_IN_DIGEST = (
    "env_id", "seed", "output_dir", "exp_name", "num_threads", "log_every", "loggers", "record_every",
    "trace_iterations",
)  # fmt: skip
FLAG_FOR = {
    "run.env_id": "--games",
    "run.seed": "--seeds",
    "run.max_env_step": "--env_steps",
    "run.output_dir": "--out",
    "run.exp_name": "--label",
}
PACKAGES = ("torch", "transformers", "lightzero", "textworld", "jericho")
STOP_S = 60.0  # time that an interrupted run has to save its checkpoint, in seconds


class RunError(Exception):
    """A run has no result. The message says why."""


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        agent: name of the agent.
        label: of the row in the table.
        game: the game.
        seed: seed of the run.
        env_steps: environment steps; 0 for agents that do not learn.
        assignments: the ``--set`` arguments of the run, in order.
        digest: digest of the settings that the runs of a row have in common.
    """

    agent: str
    label: str
    game: str
    seed: int
    env_steps: int
    assignments: tuple[str, ...]
    digest: str

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies the run in a results file."""
        return self.label, self.agent, self.game, self.seed, self.env_steps, self.digest

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"{self.agent}{f' ({self.label})' if self.label else ''}, {self.game}, seed {self.seed}"

    @property
    def stem(self) -> str:
        """Beginning of the names of its folder and its log."""
        game = re.sub(r"[^A-Za-z0-9.]+", "-", self.game).strip("-.")[-40:]
        label = f"_{self.label}" if self.label else ""
        return f"{self.agent}{label}_{game}_s{self.seed}_{self.digest[:8]}"


# ---- the runs to make ----


def games_from(names: Sequence[str]) -> list[str]:
    """The games of the named sets, and all other names as games. Each game occurs once."""
    return list(dict.fromkeys(game for name in names for game in GAME_SETS.get(name, (name,))))


def game_set_of(game: str) -> str:
    """The set that a game belongs to; the game itself if there is none."""
    return next((name for name, games in GAME_SETS.items() if game in games), game)


def settings_digest(settings: Settings) -> str:
    """A digest that does not depend on the game, the seed, names and logging."""
    plain = settings.model_dump()
    plain["run"] = {key: value for key, value in plain["run"].items() if key not in NOT_IN_DIGEST}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """All runs, complete or not. They are ordered by seed, so that an interruption leaves complete comparisons.

    Raises:
        UserError: the settings are invalid, or a game is not found.
    """
    own = parse_assignments(options.assignments)
    for name, flag in FLAG_FOR.items():
        group, key = name.split(".")
        if key in own.get(group, {}):
            raise UserError(f"--set {name}=... is not allowed here; use {flag}")
    base = read_config_file(options.config)
    env_steps = options.env_steps or resolve_settings(base).run.max_env_step
    if env_steps < 1:
        raise UserError(f"{options.config}: run.max_env_step={env_steps} means no training; give --env_steps")
    games = games_from(options.games)
    for game in games:
        try:
            resolve_game(game)
        except UserError as error:
            raise UserError(f"--games {game}: {error}\nSets of games: {', '.join(GAME_SETS)}") from error
    templates = {agent: _template(agent, base, options, env_steps=env_steps) for agent in options.agents}
    return [
        Job(agent, options.label, game, seed, *templates[agent])
        for seed in options.seeds
        for game in games
        for agent in options.agents
    ]


def _template(
    agent: str, base: Mapping[str, Any], options: argparse.Namespace, *, env_steps: int
) -> tuple[int, tuple[str, ...], str]:
    """``env_steps``, ``assignments`` and ``digest`` of an agent's jobs."""
    changes = {"run.max_env_step": str(env_steps), **AGENTS[agent]}
    if options.jobs > 1:
        changes["run.num_threads"] = "1"
    assignments = (*(f"{name}={value}" for name, value in changes.items()), *options.assignments)
    try:
        settings = resolve_settings(base, parse_assignments(assignments))
    except UserError as error:
        raise UserError(f"agent {agent}: {error}") from error
    steps, possible = settings.run.max_env_step, settings.run.max_iter * settings.train.collect_env_steps
    if possible < steps:
        raise UserError(
            f"run.max_iter={settings.run.max_iter} ends the runs before {steps} environment steps; leave it out, or "
            f"give at most --env_steps {possible}"
        )
    return steps, assignments, settings_digest(settings)


def read_results(file: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none if the file does not exist.

    Raises:
        UserError: the file cannot be read, or a line is not a result.
    """
    if not file.exists():
        return []
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    lines = []
    for n, line in enumerate(text.splitlines(), start=1):
        try:
            result = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {n}: is not valid JSON ({error}); delete the line") from error
        if not isinstance(result, dict) or "digest" not in result:
            raise UserError(f"{file}, line {n}: was not written by scripts/benchmark_learning.py; delete the line")
        lines.append(result)
    return lines


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """The :attr:`Job.key` of a line."""
    return tuple(line[name] for name in ("label", "agent", "game", "seed", "env_steps", "digest"))


# ---- one run ----


async def run_process(command: Sequence[str], log: Path) -> int:
    """Run a command with its output in ``log``; return its exit code.

    If this is cancelled, the command gets SIGTERM, and SIGKILL after ``STOP_S`` seconds.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # otherwise the terminal's Ctrl-C would be a second signal
        )
        try:
            return await process.wait()
        except asyncio.CancelledError:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)  # not SIGINT, which background jobs of a shell ignore
                try:
                    await asyncio.wait_for(process.wait(), STOP_S)
                except TimeoutError:
                    os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()
            raise


async def run_job(job: Job, *, config: Path, out: Path, jobs: int) -> dict[str, Any]:
    """Make a run; return its line.

    Raises:
        RunError: the run failed, or its files are incomplete.
    """
    runs, logs = out / "runs", out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    names = (job.stem if n == 1 else f"{job.stem}_{n}" for n in range(1, 1000))
    name = next(n for n in names if not (runs / n).exists() and not (logs / f"{n}.log").exists())
    log = logs / f"{name}.log"
    command = [sys.executable, "-m", "priorzero.entry", "--config", str(config.resolve()), "--env_id", job.game]
    command += ["--seed", str(job.seed), "--exp_name", name, "--set", f"run.output_dir={runs.resolve()}"]
    for assignment in job.assignments:
        command += ["--set", assignment]
    commit = git_commit()
    started = time.monotonic()
    code = await run_process(command, log)
    wall_s = time.monotonic() - started
    if code:
        raise RunError(f"exit code {code}: {_last_line(log)} (log: {log})")
    return {
        **make_line(job, runs / name),
        "wall_s": round(wall_s, 1),
        "versions": {"priorzero": commit, **package_versions(PACKAGES)},
        "machine": {"cores": len(os.sched_getaffinity(0)), "jobs": jobs},
    }


def make_line(job: Job, folder: Path) -> dict[str, Any]:
    """The line of a run, from the files in its folder.

    ``episodes`` contains ``[env_step, total_reward, score, won, wall_s]`` for each training episode, with the
    environment step and the time of its end. It is empty for agents that do not learn; their mean and best scores are
    those of the evaluation mode in ``MODE_OF``.

    Raises:
        RunError: there is no evaluation or no training episode, or the run was stopped early.
    """
    # The folder of this machine is no part of the result.
    settings = resolve_settings(
        read_config_file(folder / "config.yaml"), {"run": {"output_dir": RunSettings().output_dir}}
    )
    evaluations = _read_jsonl(folder / "evaluations.jsonl")
    learns = job.agent not in MODE_OF
    episodes = [
        [e["env_step"], e["total_reward"], e["score"], e["won"], e["wall_s"]]
        for e in (_read_jsonl(folder / "episodes.jsonl") if learns else ())
    ]
    results = [e for e in evaluations if not e["unseen"] and (learns or e["mode"] == MODE_OF[job.agent])]
    scores = [e[2] for e in episodes] if learns else [score for e in results for score in e["scores"]]
    if not results or not scores:
        why = "there is no evaluation" if not results else "no episode ended; give more --env_steps"
        raise RunError(f"{folder}: {why}")
    if results[-1]["env_step"] < job.env_steps:
        raise RunError(f"{folder}: the run was stopped at {results[-1]['env_step']} of {job.env_steps} env steps")
    wins = [e[3] for e in episodes]
    solved = solved_index(wins)
    return {
        "agent": job.agent,
        "label": job.label,
        "game": job.game,
        "seed": job.seed,
        "env_steps": job.env_steps,
        "digest": job.digest,
        "simulations": settings.search.num_simulations if learns else 0,
        "valid_actions_given": True,
        "max_score": results[-1]["max_score"],
        "episodes": episodes,
        "mean_score": _mean(scores),
        "best_score": max(scores),
        "last_mean_score": _mean(scores[-LAST_EPISODES:]),
        "first_win_at": episodes[wins.index(True)][0] if True in wins else None,
        "solved_at": episodes[solved][0] if solved is not None else None,
        "evaluations": last_evaluations(evaluations),
        "settings": differences(settings),
    }


def solved_index(wins: Sequence[bool]) -> int | None:
    """Index of the first of the first ``WINS_IN_A_ROW`` consecutive wins; None if there are none.

    The environment step at which this episode ended is ``solved_at``.
    """
    row = 0
    for n, won in enumerate(wins):
        row = row + 1 if won else 0
        if row == WINS_IN_A_ROW:
            return n - WINS_IN_A_ROW + 1
    return None


def last_evaluations(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures of the last evaluation of each mode, over all games; ``unseen_MODE`` for unseen games."""
    by_mode: dict[str, list[Mapping[str, Any]]] = {}
    for e in evaluations:
        by_mode.setdefault(("unseen_" if e["unseen"] else "") + e["mode"], []).append(e)
    figures = {}
    for mode, entries in by_mode.items():
        last = [e for e in entries if e["env_step"] == entries[-1]["env_step"]]
        figures[mode] = {
            "env_step": last[-1]["env_step"],
            "mean_score": _mean([score for e in last for score in e["scores"]]),
            "mean_return": _mean([value for e in last for value in e["returns"]]),
            "wins": sum(e["wins"] for e in last),
            "episodes": sum(len(e["returns"]) for e in last),
            "max_score": _mean([e["max_score"] for e in last]),
        }
    return figures


def git_commit() -> str | None:
    """The commit that is checked out, with ``-dirty`` if files differ from it; None outside of a git repository."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
        found = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:  # git is not installed
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


# ---- all runs ----


async def run_all(jobs: Sequence[Job], *, config: Path, out: Path, parallel: int) -> list[str]:
    """Make the runs that are missing in OUT/results.jsonl; return a message for each failure."""
    results = out / "results.jsonl"
    complete = {key_of(line) for line in read_results(results)}
    missing = [job for job in jobs if job.key not in complete]
    for job in jobs:
        if job.key in complete:
            print(f"already complete: {job.name}", flush=True)
    failures: list[str] = []
    slots = asyncio.Semaphore(parallel)
    num_ended = 0

    async def run(job: Job) -> None:
        nonlocal num_ended
        async with slots:
            print(f"starting: {job.name}", flush=True)
            try:
                line = await run_job(job, config=config, out=out, jobs=parallel)
            except (RunError, UserError) as error:
                failures.append(f"{job.name}: {error}")
                message = f"FAILED: {failures[-1]}"
            else:
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                message = f"{job.name}: {_describe(line)}"
            num_ended += 1
            print(f"[{num_ended}/{len(missing)}] {message}", flush=True)

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # so that all runs are stopped
    await gather_or_cancel(*(run(job) for job in missing))
    return failures


def _describe(line: Mapping[str, Any]) -> str:
    solved = f", solved at {line['solved_at']}" if line["solved_at"] is not None else ""
    return (
        f"mean score {line['mean_score']:.2f}, best {line['best_score']:g} of {line['max_score']:g}{solved}, "
        f"{line['wall_s']:.0f} s"
    )


# ---- command line ----


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("is empty")
    return list(dict.fromkeys(names))


def _agents(text: str) -> list[str]:
    names = _names(text)
    unknown = [name for name in names if name not in AGENTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: unknown; known are {', '.join(AGENTS)}")
    return names


def _seeds(text: str) -> list[int]:
    names = _names(text)
    if not all(name.isdecimal() for name in names):
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers, at least 0, such as 0,1,2")
    return list(dict.fromkeys(map(int, names)))


def _label(text: str) -> str:
    if not re.fullmatch(r"[\w.+-]{0,20}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: use at most 20 letters, digits and . _ + -")
    return text


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog=f"agents: {', '.join(AGENTS)}\nsets of games: {', '.join(GAME_SETS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--games", type=_names, required=True, help="games or sets of games, separated by commas")
    parser.add_argument("--agents", type=_agents, default=list(AGENTS), help="separated by commas (default: all)")
    parser.add_argument("--seeds", type=_seeds, default=[0], help="separated by commas (default: 0)")
    parser.add_argument(
        "--env_steps", type=at_least(1), help="environment steps of each run that learns (default: those of --config)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "configs" / "learning_textworld.yaml",
        help="YAML file with settings (default: configs/learning_textworld.yaml)",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench_results" / "learning", help="folder of the results")
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=1,
        help="number of runs at the same time; if more than 1, with 1 thread each",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="GROUP.KEY=VALUE",
        help="change a setting of all agents; may be given several times",
    )
    parser.add_argument("--label", type=_label, default="", help="name of the row in the table, to identify --set")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if all runs are complete, 1 if some failed, 2 for a user's error, 130 if interrupted."""
    options = build_parser().parse_args(argv)
    try:
        jobs = make_jobs(options)
        make_folder(options.out)
        failures = asyncio.run(run_all(jobs, config=options.config, out=options.out, parallel=options.jobs))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted; to continue, type the same command again", file=sys.stderr)
        return 130
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if not failures:
        print(f"all {len(jobs)} runs are in {options.out / 'results.jsonl'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
