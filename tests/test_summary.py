"""The summary of a run: what was learned, from the file of evaluations, and where the time went."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from priorzero.runs.counters import Counters
from priorzero.runs.results import Result
from priorzero.runs.summary import learned_text, results_by_time, summary_text, time_text
from priorzero.settings import Settings


def write_evaluations(folder, *evaluations):
    """Each: (env_step, mode, scores, wins), and if they differ from the defaults: game, max_score, unseen."""
    lines = []
    for env_step, mode, scores, wins, *more in evaluations:
        game, max_score, unseen = (*more, *("game", 7.0, False)[len(more) :])
        line = {"env_step": env_step, "game": game, "unseen": unseen, "mode": mode, "returns": scores}
        lines.append(json.dumps({**line, "scores": scores, "wins": wins, "max_score": max_score, "wall_s": 1.0}))
    path = folder / "evaluations.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_results_by_time_merges_games_and_takes_the_last_evaluation(tmp_path):
    path = write_evaluations(
        tmp_path,
        (40, "prior", [1.0, 3.0], 0, "a", 7.0),
        (40, "prior", [5.0, 7.0], 1, "b", 9.0),
        (0, "prior", [1.0], 0),
        (40, "prior", [3.0, 3.0], 0, "a", 7.0),  # a resumed run has repeated it
        (40, "prior", [2.0], 0, "c", 4.0, True),
    )
    assert results_by_time(path) == {
        0: {("prior", False): Result("prior", False, 0, 1.0, 1.0, 7.0, 0, 1)},
        40: {
            ("prior", False): Result("prior", False, 40, 4.5, 4.5, 8.0, 1, 4),
            ("prior", True): Result("prior", True, 40, 2.0, 2.0, 4.0, 0, 1),
        },
    }
    assert list(results_by_time(path)) == [0, 40]
    assert results_by_time(tmp_path / "missing.jsonl") == {}


def test_learned_text_compares_before_and_after(tmp_path):
    path = write_evaluations(
        tmp_path,
        (0, "world_model", [0.0], 0),
        (0, "world_model_with_prior", [2.0], 0),
        (0, "prior", [3.0], 0),
        (100, "world_model", [1.0], 0),
        (200, "world_model", [5.0], 0),
        (200, "world_model_with_prior", [7.0], 1),
        (200, "prior", [4.0], 0),
    )
    assert learned_text(results_by_time(path), env_step=200) == (
        "  LLM and world model: the mean score rose from 2.0 to 7.0\n"
        "  mean score (at most 7)                            before     after\n"
        "    world model alone (world_model)                    0.0       5.0   won 0 of 1\n"
        "    LLM and world model (world_model_with_prior)       2.0       7.0   won 1 of 1\n"
        "    LLM alone (prior)                                  3.0       4.0   won 0 of 1"
    )


def test_learned_text_of_one_evaluation_has_one_column(tmp_path):
    path = write_evaluations(tmp_path, (200, "world_model", [5.0], 0), (200, "world_model", [3.0], 1, "c", 0.0, True))
    assert learned_text(results_by_time(path), env_step=200) == (
        "  mean score (at most 7)                after\n"
        "    world model alone (world_model)       5.0   won 0 of 1\n"
        "  mean score, games not trained on      after\n"
        "    world model alone (world_model)       3.0   won 1 of 1"
    )
    path = write_evaluations(tmp_path, (0, "random", [5.0, 4.0], 0))
    assert learned_text(results_by_time(path), env_step=0) == (
        "  mean score (at most 7)     without training\n    random actions (random)               4.5   won 0 of 2"
    )
    assert learned_text({}, env_step=200) == "  there was no evaluation"


@pytest.mark.parametrize(
    ("after", "sentence"),
    [(1.0, "the mean score fell from 3.0 to 1.0"), (3.0, "the mean score stayed at 3.0")],
)
def test_learned_text_of_an_interrupted_run_names_the_environment_steps(tmp_path, after, sentence):
    path = write_evaluations(tmp_path, (50, "random", [3.0], 0), (100, "random", [after], 0), (100, "prior", [1.0], 0))
    text = learned_text(results_by_time(path), env_step=120)
    assert text.splitlines()[0] == f"  random actions: {sentence}"
    assert text.splitlines()[1:] == [
        "  mean score (at most 7)     at 50 env steps  at 100 env steps",
        f"    random actions (random)              3.0               {after}   won 0 of 1",
        "    LLM alone (prior)                      -               1.0   won 0 of 1",
    ]


def test_time_text_lists_the_phases_longest_first():
    seconds = {
        "collecting": 60.0,
        "looking for valid actions": 9.0,
        "learning: LLM": 70.4,
        "evaluating: LLM alone": 3.0,
        "evaluating: world model alone": 4.0,
        "saving": 0.3,
    }
    assert time_text(seconds, start_up_s=18.0, total_s=160.0, spent_s=0.0) == (
        "160 s: learning: LLM 70 s, collecting 60 s, start-up 18 s, evaluating 7 s"
    )
    assert time_text({}, start_up_s=0.0, total_s=5.0, spent_s=30.0) == "5 s (and 30 s before it was resumed)"


def text_of(folder, **changes):
    settings = Settings()
    settings.run.output_dir = "runs"
    arguments = {
        "stopped": False,
        "folder": folder,
        "settings": settings,
        "games": "zork1",
        "num_episodes": 8,
        "updates": "world model 45, LLM 9",
        "time": "160 s",
        "checkpoint": Path("runs/name/checkpoints/iteration_10"),
        "resumable": True,
    }
    return summary_text(Counters(iteration=10, env_step=200), **{**arguments, **changes})


def test_summary_text_says_what_was_run_and_where_its_results_are(tmp_path):
    assert text_of(tmp_path) == (
        "done: zork1, 200 env steps in 10 iterations, 8 training episodes\n"
        "what was learned\n"
        "  there was no evaluation\n"
        "the run\n"
        "  updates     world model 45, LLM 9\n"
        "  time        160 s\n"
        "  checkpoint  runs/name/checkpoints/iteration_10\n"
        "  charts      tensorboard --logdir runs"
    )
    (tmp_path / "report.html").touch()
    assert f"  report      {tmp_path / 'report.html'}\n" in text_of(tmp_path)
    assert "checkpoint  none (nothing was trained)" in text_of(tmp_path, checkpoint=None)


def test_summary_text_of_a_stopped_run_says_how_to_continue(tmp_path):
    text = text_of(tmp_path, stopped=True)
    assert text.startswith("stopped: zork1,")
    assert text.endswith(f"\n  to continue  python -m priorzero.entry --resume {tmp_path}")
    assert "--resume" not in text_of(tmp_path, stopped=True, checkpoint=None)
    assert "--resume" not in text_of(tmp_path, stopped=True, resumable=False)


def test_summary_text_quotes_paths_for_the_shell(tmp_path):
    text = text_of(tmp_path / "it's", stopped=True)
    command = text.splitlines()[-1].split("  ")[-1]
    assert shlex.split(command)[-1] == str(tmp_path / "it's")
