"""What agents learn: random, the LLM alone, UniZero, and PriorZero in three forms, with equal environment steps.

    python scripts/benchmark_learning.py --games textworld-simple --agents random,unizero --seeds 0,1
    python scripts/benchmark_learning.py --games zork1 --seeds 0 --set prior.alpha=0.2 --label alpha0.2
    python scripts/plot_learning.py bench_results/learning/results.jsonl --plot curves.svg

Each (agent, game, seed) is a process of its own. random and prior do not learn; they play ``eval.episodes=50`` episodes
(``--set`` gives another number). Settings come from ``--config``, then the agent's differences, then ``--set``.

OUT/results.jsonl gets one line for each finished run. Calling the same command again runs only what is missing there:
a line counts if agent, label, game, seed, environment steps and all settings are equal (but those that only name or log
a run, and ``run.num_threads``). A change of the code does not count; the line's ``versions`` tell it. A run that fails
or is interrupted leaves no line; its log stays in OUT/logs, and its folder in OUT/runs.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.metadata
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

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from bench_tools import at_least, make_folder

from priorzero.config import differences, parse_assignments, read_config_file, resolve_settings
from priorzero.envs.games import resolve_game
from priorzero.runtime.concurrency import gather_or_cancel
from priorzero.types import UserError

EVALUATION_ONLY = {"run.max_env_step": "0", "eval.episodes": "50"}
# agent -> what it changes in the settings of --config
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


def _simple(seeds: Sequence[int], goal: str = "") -> tuple[str, ...]:
    return tuple(f"textworld:simple?{goal and f'goal={goal}&'}seed={seed}" for seed in seeds)


REPORT_SEEDS, TUNING_SEEDS = range(201, 211), range(101, 105)  # settings are chosen on the games of the second
GAME_SETS: dict[str, tuple[str, ...]] = {
    "textworld-simple": _simple(REPORT_SEEDS),
    "textworld-simple-brief": _simple(REPORT_SEEDS, "brief"),
    "textworld-simple-none": _simple(REPORT_SEEDS, "none"),
    "textworld-tuning": _simple(TUNING_SEEDS),
    "textworld-tuning-brief": _simple(TUNING_SEEDS, "brief"),
    "textworld-tuning-none": _simple(TUNING_SEEDS, "none"),
    "coin-collector": tuple(f"textworld:coin-collector?level=5&seed={n}" for n in (1, 2, 3)),
    "detective": ("detective.z5",),
    "zork1": ("zork1.z5",),
}

IN_A_ROW = 5  # won episodes after which a run counts as solved
LAST = 50  # episodes of the last mean
# settings of group run that runs of one row may differ in
NOT_IN_DIGEST = ("env_id", "seed", "output_dir", "exp_name", "num_threads", "log_every", "trace_iterations")
FLAG_FOR = {
    "run.env_id": "--games",
    "run.seed": "--seeds",
    "run.max_env_step": "--env_steps",
    "run.output_dir": "--out",
    "run.exp_name": "--label",
}
PACKAGES = ("torch", "transformers", "lightzero", "textworld", "jericho")
STOP_S = 60.0  # seconds that an interrupted run has for its checkpoint


class RunFailed(Exception):
    """A run that leaves no line; the message says why."""


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        env_steps: what it may take; 0 for agents that do not learn.
        assignments: ``--set`` of the run, in order.
        digest: of the settings that a row of the table has in common.
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
        return self.label, self.agent, self.game, self.seed, self.env_steps, self.digest

    @property
    def name(self) -> str:
        return f"{self.agent}{f' ({self.label})' if self.label else ''}, {self.game}, seed {self.seed}"

    @property
    def stem(self) -> str:
        """Of the names of its folder and log."""
        game = re.sub(r"[^A-Za-z0-9.]+", "-", self.game).strip("-.")[-40:]
        label = f"_{self.label}" if self.label else ""
        return f"{self.agent}{label}_{game}_s{self.seed}_{self.digest[:8]}"


# ---- what is to be run ----


def games_of(names: Sequence[str]) -> list[str]:
    """Names of built-in sets and of games as games, each once, in order."""
    return list(dict.fromkeys(game for name in names for game in GAME_SETS.get(name, (name,))))


def set_of(game: str) -> str:
    """The built-in set that a game belongs to; else the game itself."""
    return next((name for name, games in GAME_SETS.items() if game in games), game)


def digest_of(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Equal for runs that differ at most in game, seed, names and logging."""
    run = {key: value for key, value in settings["run"].items() if key not in NOT_IN_DIGEST}
    return hashlib.sha256(json.dumps({**settings, "run": run}, sort_keys=True).encode()).hexdigest()[:16]


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """All runs, whether or not they are there already; seed by seed, so that an early end leaves whole comparisons.

    Raises:
        UserError: settings that cannot be used, a game that cannot be found.
    """
    own = parse_assignments(options.assignments)
    for name, flag in FLAG_FOR.items():
        group, key = name.split(".")
        if key in own.get(group, {}):
            raise UserError(f"--set {name}=... cannot be used here; {flag} says it")
    base = read_config_file(options.config)
    env_steps = options.env_steps or resolve_settings(base).run.max_env_step
    if env_steps < 1:
        raise UserError(f"{options.config}: run.max_env_step={env_steps} trains nothing; give --env_steps")
    games = games_of(options.games)
    for game in games:
        try:
            resolve_game(game)  # what is missing is told now, not after the runs before it
        except UserError as error:
            raise UserError(f"--games {game}: {error}\nSets of games: {', '.join(GAME_SETS)}") from error
    templates = {}
    for agent in options.agents:
        changes = {"run.max_env_step": str(env_steps), **AGENTS[agent]}
        if options.jobs > 1:
            changes["run.num_threads"] = "1"
        assignments = (*(f"{name}={value}" for name, value in changes.items()), *options.assignments)
        try:
            settings = resolve_settings(base, parse_assignments(list(assignments)))
        except UserError as error:
            raise UserError(f"agent {agent}: {error}") from error
        steps = settings.run.max_env_step
        if settings.run.max_iter * settings.train.collect_env_steps < steps:
            raise UserError(
                f"run.max_iter={settings.run.max_iter} ends the runs before {steps} env steps; leave it out, or lower "
                f"--env_steps to at most {settings.run.max_iter * settings.train.collect_env_steps}"
            )
        templates[agent] = steps, assignments, digest_of(settings)
    return [
        Job(agent, options.label, game, seed, *templates[agent])
        for seed in options.seeds
        for game in games
        for agent in options.agents
    ]


def read_results(file: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none if there is no such file.

    Raises:
        UserError: a line that is no result.
    """
    if not file.exists():
        return []
    lines = []
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    for n, line in enumerate(text.splitlines(), start=1):
        try:
            result = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {n}: is no JSON ({error}); delete the line") from error
        if not isinstance(result, dict) or "digest" not in result:
            raise UserError(f"{file}, line {n}: is no line of scripts/benchmark_learning.py; delete it")
        lines.append(result)
    return lines


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """The same as :attr:`Job.key`."""
    return tuple(line[name] for name in ("label", "agent", "game", "seed", "env_steps", "digest"))


# ---- one run ----


async def run_process(command: Sequence[str], log: Path) -> int:
    """Run a command to its end, all that it prints going to ``log``; return its exit code.

    When this is cancelled, the command is asked to end (SIGTERM), and ended by force after ``STOP_S`` seconds.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # else the terminal's Ctrl-C would reach it as well, and twice is once too often
        )
        try:
            return await process.wait()
        except asyncio.CancelledError:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)  # not SIGINT, which whatever a shell starts with & ignores
                try:
                    await asyncio.wait_for(process.wait(), STOP_S)
                except TimeoutError:
                    os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()
            raise


async def run_job(job: Job, *, config: Path, out: Path, jobs: int) -> dict[str, Any]:
    """Run it and return its line.

    Raises:
        RunFailed: the process failed, or left too little.
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
        raise RunFailed(f"exit code {code}: {_last_line(log)} (log: {log})")
    return {
        **make_line(job, runs / name),
        "wall_s": round(wall_s, 1),
        "versions": {"priorzero": commit, **_versions()},
        "machine": {"cores": len(os.sched_getaffinity(0)), "jobs": jobs},
    }


def make_line(job: Job, folder: Path) -> dict[str, Any]:
    """What a finished run's files say.

    ``episodes`` are ``[env_step, total_reward, score, won, wall_s]``, env_step and wall_s those of the episode's end;
    agents that do not learn have none, and their means and best are over the episodes of ``MODE_OF``.

    Raises:
        RunFailed: no evaluation was made, no training episode ended, or the run was stopped before its time.
    """
    settings = read_config_file(folder / "config.yaml")
    evaluations = _read_jsonl(folder / "evaluations.jsonl")
    seen = [e for e in evaluations if not e["unseen"]]
    learns = job.agent not in MODE_OF
    episodes = [
        [e["env_step"], e["total_reward"], e["score"], e["won"], e["wall_s"]]
        for e in (_read_jsonl(folder / "episodes.jsonl") if learns else ())
    ]
    results = [e for e in seen if learns or e["mode"] == MODE_OF[job.agent]]
    scores = [e[2] for e in episodes] if learns else [score for e in results for score in e["scores"]]
    if not results or not scores:
        why = "no evaluation was made" if not results else "no episode ended; give more --env_steps"
        raise RunFailed(f"{folder}: {why}")
    if results[-1]["env_step"] < job.env_steps:
        raise RunFailed(f"{folder}: it was stopped at {results[-1]['env_step']} of {job.env_steps} env steps")
    wins = [e[3] for e in episodes]
    solved = solved_index(wins)
    settings["run"].pop("output_dir")
    return {
        "agent": job.agent,
        "label": job.label,
        "game": job.game,
        "seed": job.seed,
        "env_steps": job.env_steps,
        "digest": job.digest,
        "simulations": settings["search"]["num_simulations"] if learns else 0,
        "valid_actions_given": True,
        "max_score": results[-1]["max_score"],
        "episodes": episodes,
        "mean_score": _mean(scores),
        "best_score": max(scores),
        "last_mean_score": _mean(scores[-LAST:]),
        "first_win_at": episodes[wins.index(True)][0] if True in wins else None,
        "solved_at": episodes[solved][0] if solved is not None else None,
        "evaluations": _last_evaluations(evaluations),
        "settings": differences(settings),
    }


def solved_index(wins: Sequence[bool]) -> int | None:
    """The first of the first ``IN_A_ROW`` won episodes in a row; None if there are not so many.

    ``solved_at`` is the environment step at which that episode ended.
    """
    row = 0
    for n, won in enumerate(wins):
        row = row + 1 if won else 0
        if row == IN_A_ROW:
            return n - IN_A_ROW + 1
    return None


def _last_evaluations(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mode -> the last evaluation's figures, over all its games; games that were not trained on are ``unseen_MODE``."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for e in evaluations:
        by_name.setdefault(("unseen_" if e["unseen"] else "") + e["mode"], []).append(e)
    figures = {}
    for name, entries in by_name.items():
        last = [e for e in entries if e["env_step"] == entries[-1]["env_step"]]
        figures[name] = {
            "env_step": last[-1]["env_step"],
            "mean_score": _mean([score for e in last for score in e["scores"]]),
            "mean_return": _mean([value for e in last for value in e["returns"]]),
            "wins": sum(e["wins"] for e in last),
            "episodes": sum(len(e["returns"]) for e in last),
            "max_score": _mean([e["max_score"] for e in last]),
        }
    return figures


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def git_commit() -> str | None:
    """The commit that is checked out, with ``-dirty`` where files differ from it; None outside a git repository."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
        found = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


# ---- all runs ----


async def run_all(jobs: Sequence[Job], *, config: Path, out: Path, side_by_side: int) -> list[str]:
    """Run what is missing in OUT/results.jsonl; return the failures."""
    results = out / "results.jsonl"
    there = {key_of(line) for line in read_results(results)}
    missing = [job for job in jobs if job.key not in there]
    for job in jobs:
        if job.key in there:
            print(f"there already: {job.name}", flush=True)
    failures: list[str] = []
    slots = asyncio.Semaphore(side_by_side)
    ended = 0

    async def run(job: Job) -> None:
        nonlocal ended
        async with slots:
            print(f"begins: {job.name}", flush=True)
            try:
                line = await run_job(job, config=config, out=out, jobs=side_by_side)
            except (RunFailed, UserError) as error:
                failures.append(f"{job.name}: {error}")
                said = f"FAILED: {failures[-1]}"
            else:
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                said = f"{job.name}: {_describe(line)}"
            ended += 1
            print(f"[{ended}/{len(missing)}] {said}", flush=True)

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # so that no run outlives this process
    await gather_or_cancel(*(run(job) for job in missing))
    return failures


def _describe(line: Mapping[str, Any]) -> str:
    solved = f", solved at {line['solved_at']}" if line["solved_at"] is not None else ""
    return (
        f"mean score {line['mean_score']:.2f}, best {line['best_score']:g} of {line['max_score']:g}{solved}, "
        f"{line['wall_s']:.0f} s"
    )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("is empty")
    return list(dict.fromkeys(names))


def _agents(text: str) -> list[str]:
    names = _names(text)
    wrong = [name for name in names if name not in AGENTS]
    if wrong:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: known are {', '.join(AGENTS)}")
    return names


def _seeds(text: str) -> list[int]:
    names = _names(text)
    if not all(name.isdecimal() for name in names):
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers from 0 on, such as 0,1,2")
    return list(dict.fromkeys(map(int, names)))


def _label(text: str) -> str:
    if not re.fullmatch(r"[\w.+-]{0,20}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: use at most 20 letters, digits and . _ + -")
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog=f"agents: {', '.join(AGENTS)}\nsets of games: {', '.join(GAME_SETS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--games", type=_names, required=True, help="sets of games or games, separated by commas")
    parser.add_argument("--agents", type=_agents, default=list(AGENTS), help="separated by commas (default: all)")
    parser.add_argument("--seeds", type=_seeds, default=[0], help="separated by commas (default: 0)")
    parser.add_argument("--env_steps", type=at_least(1), help="of each run that learns (default: the file's)")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "learning_textworld.yaml", help="YAML file")
    parser.add_argument("--out", type=Path, default=ROOT / "bench_results" / "learning", help="folder of the results")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="runs side by side; from 2 on with one thread each")
    parser.add_argument(
        "--set", action="append", default=[], dest="assignments", metavar="GROUP.KEY=VALUE", help="for every agent"
    )
    parser.add_argument("--label", type=_label, default="", help="added to the rows' names, to tell --set apart")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all runs are there, 1 some failed, 2 something to put right, 130 interrupted."""
    options = build_parser().parse_args(argv)
    try:
        jobs = make_jobs(options)
        make_folder(options.out)
        failures = asyncio.run(run_all(jobs, config=options.config, out=options.out, side_by_side=options.jobs))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted; the same command goes on where this one ended", file=sys.stderr)
        return 130
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if not failures:
        print(f"all {len(jobs)} runs are in {options.out / 'results.jsonl'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
