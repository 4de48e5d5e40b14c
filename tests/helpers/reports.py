"""Folders of runs with known content, for tests of reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from priorzero.config import dump_settings
from priorzero.play.transcript import EvaluationTranscript, TranscriptStep, TreeNode, write_transcripts
from priorzero.runs.loggers import MetricsWriter
from priorzero.runs.loggers.tensorboard import TensorBoardLogger
from tests.helpers.models import make_settings


def make_node(action: str, visit_count: int, *children: TreeNode) -> TreeNode:
    """A node of a search tree whose Q-value is a tenth of its visits, and whose reward a hundredth."""
    return {
        "action": action,
        "prior": 0.25,
        "visit_count": visit_count,
        "reward": visit_count / 100,
        "action_value": visit_count / 10,
        "children": list(children),
    }


def make_tree(n: int) -> list[TreeNode]:
    """The search tree of step ``n``: three levels below the chosen action."""
    below = make_node("second", 4, make_node("third", 3), make_node("other third", 1))
    return [make_node(f"go {n}", 1), make_node(f"take {n}", 7, make_node("other second", 2), below)]


def make_step(
    n: int, *, text: str = "You wait.", llm: bool = True, search: bool = True, tree: bool = False
) -> TranscriptStep:
    """Step ``n``, which chooses the second of three actions."""
    return {
        "raw_obs_text": text,
        "score": float(n),
        "valid_actions": [f"go {n}", f"take {n}", f"wait {n}"],
        "prior_probs": [0.125, 0.5, 0.375] if llm else None,
        "prior_source": "score" if llm else None,
        "prompt": f"Prompt of step {n}" if llm else None,
        "policy_probs": [0.25, 0.25, 0.5] if search else None,
        "visit_counts": [1, 7, 2] if search else None,
        "action_values": [0.1, 1.5, None] if search else None,
        "predicted_value": 0.75 if search else None,
        "root_value": 1.25 if search else None,
        "tree": make_tree(n) if tree else None,
        "predicted_reward": 0.07 if tree else None,
        "chosen": 1,
        "behaviour_prob": 1.0,
        "reward": 1.0,
    }


def make_episode(
    mode: str = "world_model_with_prior",
    *,
    steps: int = 3,
    text: str = "You wait.",
    game: str = "toy",
    tree: bool = False,
) -> EvaluationTranscript:
    """An episode that gains a point in each step; its final text is ``THE END``."""
    llm, search = mode not in ("world_model", "random"), mode.startswith("world_model")
    return {
        "mode": mode,
        "game": game,
        "unseen": False,
        "steps": [make_step(n, text=text, llm=llm, search=search, tree=tree) for n in range(steps)],
        "final_obs_text": "THE END",
        "total_reward": float(steps),
        "score": float(steps),
        "max_score": 7.0,
        "won": False,
        "truncated": True,
        "discount_factor": 0.5,
        "reward_scale": 1.0,
    }


def evaluation_line(env_step: int, mode: str, scores: list[float], *, wins: int = 0, **more: Any) -> dict[str, Any]:
    """A line of ``evaluations.jsonl``; the largest score is 7."""
    line = {"env_step": env_step, "game": "toy", "unseen": False, "mode": mode, "returns": scores, "scores": scores}
    return {**line, "wins": wins, "max_score": 7.0, "wall_s": 9.0, **more}


def make_run(
    folder: Path,
    *layers: dict[str, dict[str, Any]],
    iterations: int = 4,
    evaluations: list[dict[str, Any]] | None = None,
    transcripts: list[EvaluationTranscript] | None = None,
) -> Path:
    """A run of the quick test with 20 environment steps, two updates and one episode in each of its ten iterations.

    Args:
        layers: changes of the settings.
        iterations: how far it is.
        evaluations: lines of ``evaluations.jsonl``; one of the present state by default.
        transcripts: those of the last evaluation; one episode by default.
    """
    (folder / "log").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_settings(make_settings(*layers)))
    writer = MetricsWriter([TensorBoardLogger(folder)])
    for n in range(1, iterations + 1):
        losses = {"train/total_loss": 10.0 / n, "train/wm_total_loss": 8.0 / n, "train/llm_loss": 2.0 / n}
        losses |= {"train/wm_value_loss": 4.0 / n, "train/llm_sft_loss": 1.5 / n, "train/llm_rft_loss": -0.5 / n}
        writer.write({**losses, "train/llm_version": float(n)}, step=2 * n, axis="train_iter")
        times = {"time/iteration_s": 10.0, "time/LLM_update_s": 6.0, "time/search_s": 1.5, "time/idle_share": 0.25}
        times |= {"time/run_s": 12.5 * n, "collector_iter/env_steps": 20.0 * n}
        writer.write(times, step=n, axis="iteration")
    writer.close()
    episodes = [
        {"total_reward": float(n), "score": float(n), "steps": 20, "won": False, "env_step": 20 * n, "wall_s": 10.0 * n}
        for n in range(1, iterations + 1)
    ]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in episodes))
    if evaluations is None:
        evaluations = [evaluation_line(20 * iterations, "world_model_with_prior", [3.0])]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    if evaluations:
        episodes_played = [make_episode()] if transcripts is None else transcripts
        write_transcripts(folder / "last_evaluation.json", episodes_played, env_step=evaluations[-1]["env_step"])
    return folder
