"""Transcripts: decisions as plain data, the file of the last evaluation, and what an evaluation stores."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from priorzero.llm.prompts import Prompt
from priorzero.play.player import Decision
from priorzero.play.transcript import read_transcripts, real_values, transcript_step, write_transcripts
from priorzero.search.base import SearchNode, SearchResult
from priorzero.types import ActionPrior, GameState
from tests.helpers.collecting import FIRST_ROOM, CountingGame, evaluate, make_player, outcome_of
from tests.helpers.reports import make_episode

STATE = GameState("You wait.", ("north", "wait"), 3.0, 7.0, 1, look="A hall.", inventory="A lamp.")


def make_decision(*, prior=None, result=None, prompt=None, chosen=1, action_texts=None):
    return Decision(
        state=STATE,
        action_indices=np.array([4, 9]),
        prior=prior,
        chosen=chosen,
        prompt=prompt,
        result=result,
        action_texts=action_texts,
    )


def make_result(tree=None):
    """A search that visited only the second action."""
    return SearchResult(
        visit_counts=np.array([0, 5]),
        root_value=0.5,
        predicted_value=0.25,
        policy_logits=np.zeros(2),
        prior_weight=0.5,
        root_logits=np.zeros(2),
        root_probs=np.full(2, 0.5),
        action_values=np.array([math.nan, 1 / 3]),
        tree=tree,
    )


def test_transcript_step_holds_the_whole_decision():
    prior = ActionPrior(np.log(np.array([0.25, 0.75], dtype=np.float32)), "score", 2)
    result = SearchResult(
        visit_counts=np.array([1, 4]),
        root_value=0.5,
        predicted_value=math.nan,
        policy_logits=np.array([0.0, math.log(4)]),
        prior_weight=0.5,
        root_logits=np.zeros(2),
        root_probs=np.full(2, 0.5),
        action_values=np.array([math.nan, 1 / 3]),
    )
    decision = make_decision(prior=prior, result=result, prompt=Prompt("What now?"))
    step = transcript_step(decision, reward=2.0)
    assert step == {
        "raw_obs_text": "You wait.\nA hall.\nA lamp.",
        "score": 3.0,
        "valid_actions": ["north", "wait"],
        "prior_probs": [0.25, 0.75],
        "prior_source": "score",
        "prompt": "What now?",
        "policy_probs": [0.2, 0.8],
        "visit_counts": [1, 4],
        "action_values": [None, 0.333333],
        "predicted_value": None,
        "root_value": 0.5,
        "tree": None,
        "predicted_reward": None,
        "chosen": 1,
        "behaviour_prob": 1.0,
        "reward": 2.0,
    }
    json.dumps(step, allow_nan=False)


def test_transcript_step_without_an_llm_and_without_a_search():
    step = transcript_step(make_decision(chosen=0), reward=0.0)
    missing = {key for key, value in step.items() if value is None}
    assert missing == {
        *("prior_probs", "prior_source", "prompt"),
        *("policy_probs", "visit_counts", "action_values", "predicted_value", "root_value"),
        *("tree", "predicted_reward"),
    }


def test_transcript_step_names_the_actions_of_the_tree():
    child = SearchNode(action=2, prior=1.0, visit_count=4, reward=0.25, action_value=math.nan)
    root = SearchNode(action=9, prior=0.5, visit_count=5, reward=2 / 3, action_value=1.5, children=(child,))
    texts = {4: "north", 9: "wait", 2: "take lamp"}
    step = transcript_step(make_decision(result=make_result((root,)), action_texts=texts), reward=0.0)
    plain = {
        "action": "take lamp",
        "prior": 1.0,
        "visit_count": 4,
        "reward": 0.25,
        "action_value": None,
        "children": [],
    }
    assert step["tree"] == [
        {"action": "wait", "prior": 0.5, "visit_count": 5, "reward": 0.666667, "action_value": 1.5, "children": [plain]}
    ]
    assert step["predicted_reward"] == 0.666667
    unvisited = transcript_step(make_decision(result=make_result((root,)), action_texts=texts, chosen=0), reward=0.0)
    assert unvisited["predicted_reward"] is None


def test_real_values_by_hand():
    episode = make_episode(steps=3)  # discounted by 0.5
    for step, reward in zip(episode["steps"], (1.0, 0.0, 4.0), strict=True):
        step["reward"] = reward
    assert real_values(episode) == [2.0, 2.0, 4.0]
    assert real_values({**episode, "reward_scale": 0.1}) == [0.2, 0.2, 0.4]
    episode["steps"][1]["reward"] = None
    assert real_values(episode) == [None, None, 4.0]
    del episode["discount_factor"]
    assert real_values(episode) is None


def test_transcripts_are_written_and_read(tmp_path):
    path = tmp_path / "last_evaluation.json"
    first, second = make_episode(mode="prior"), make_episode(mode="random", text='</script> é \ud800 "')
    write_transcripts(path, [first], env_step=5)
    assert read_transcripts(path) == (5, [first])
    write_transcripts(path, [first, second], env_step=7)
    env_step, episodes = read_transcripts(path)
    assert env_step == 7 and episodes[0] == first
    assert episodes[1]["steps"][0]["raw_obs_text"] == '</script> é ? "'  # half of a surrogate pair is no text
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_transcripts_that_cannot_be_written_leave_the_file_as_it_was(tmp_path):
    path = tmp_path / "last_evaluation.json"
    write_transcripts(path, [make_episode()], env_step=5)
    before = path.read_bytes()
    bad = make_episode()
    bad["score"] = math.nan
    with pytest.raises(ValueError):
        write_transcripts(path, [bad], env_step=6)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99, "env_step": 1, "episodes": []}'])
def test_transcripts_of_another_format_are_refused(tmp_path, text):
    path = tmp_path / "last_evaluation.json"
    path.write_text(text)
    with pytest.raises(ValueError):
        read_transcripts(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.pop("game"), "episode 2 has no game"),
        (lambda e: e.update(steps=None), "episode 2 has no steps"),
        (lambda e: e.update(score="7"), "episode 2 has a score that is no number"),
        (lambda e: e["steps"][1].pop("prompt"), "episode 2 has no prompt in step 2"),
        (lambda e: e["steps"].append([]), "episode 2 has no content in step 4"),
        (lambda e: e["steps"][0].update(chosen=3), "episode 2 has no chosen action in step 1"),
    ],
)
def test_incomplete_transcripts_are_refused(tmp_path, change, words):
    path = tmp_path / "recording.json"
    bad = make_episode()
    change(bad)
    write_transcripts(path, [make_episode(), bad], env_step=5)
    with pytest.raises(ValueError, match=words):
        read_transcripts(path)


# ---- what an evaluation stores ----


@pytest.mark.parametrize(
    ("mode", "searched", "asked"),
    [("world_model_with_prior", True, True), ("world_model", True, False), ("prior", False, True)],
)
def test_evaluation_stores_its_first_episode(mode, searched, asked):
    games = [CountingGame(g, length=5) for g in range(2)]
    evaluation = evaluate(make_player(), mode, games=games, episodes=2)
    first = evaluation.first_episode
    assert len(first["steps"]) == 5
    room = FIRST_ROOM
    for step in first["steps"]:
        assert step["raw_obs_text"] == f"game 0 room {room}" and step["score"] == room
        assert step["valid_actions"] == [f"act {room} {k}" for k in range(2 + room % 3)]
        num_actions = len(step["valid_actions"])
        room, reward = outcome_of(room, step["chosen"])
        assert step["reward"] == reward
        if searched:
            assert sum(step["visit_counts"]) == 6 and len(step["visit_counts"]) == num_actions
            assert sum(step["policy_probs"]) == pytest.approx(1, abs=1e-4)
            assert [v is None for v in step["action_values"]] == [n == 0 for n in step["visit_counts"]]
        else:
            assert step["visit_counts"] is step["policy_probs"] is step["root_value"] is None
        if asked:
            assert step["prior_probs"][-1] == pytest.approx(0.9) and step["prompt"]
        else:
            assert step["prior_probs"] is step["prompt"] is None
    assert first["final_obs_text"] == f"game 0 room {room}" and first["score"] == evaluation.scores[0] == room
    assert first["total_reward"] == evaluation.returns[0]


def test_evaluation_stores_the_first_episode_that_counts():
    games = [CountingGame(1, fail_at=(3,)), CountingGame(2)]  # the first game fails in the middle of its episode
    evaluation = evaluate(make_player(), "prior", games=games, episodes=3)
    first = evaluation.first_episode
    assert first["steps"][0]["raw_obs_text"] == "game 2 room 1"
    assert first["total_reward"] == evaluation.returns[0] == sum(step["reward"] for step in first["steps"])
    assert "first_episode" not in evaluation.results()
