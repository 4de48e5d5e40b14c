"""Tests of the distributions over the valid actions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from priorzero.llm.priors import entropy, parse_ranking, prior_from_ranking, prior_from_scores, uniform_prior

ACTIONS = ("open mailbox", "go north", "take the brass lantern", "say 'hello'", "go")

scores = st.lists(st.floats(-500, 5), min_size=1, max_size=30)


@given(scores, st.floats(0.05, 20))
def test_prior_from_scores_is_a_distribution_in_the_order_of_the_scores(values, temperature):
    logprobs = prior_from_scores(np.array(values), temperature=temperature)
    assert logprobs.dtype == np.float32 and logprobs.shape == (len(values),)
    assert np.exp(logprobs.astype(np.float64)).sum() == pytest.approx(1, abs=1e-4)
    assert logprobs[int(np.argmax(values))] == logprobs.max()


def test_prior_from_scores_with_temperature_by_hand():
    assert np.exp(prior_from_scores(np.array([0.0, math.log(3)]), temperature=1.0)) == pytest.approx([0.25, 0.75])
    assert np.exp(prior_from_scores(np.array([0.0, math.log(9)]), temperature=2.0)) == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize(
    ("text", "ranking"),
    [
        ("1. go north\n2. open mailbox", [1, 0]),
        ("- Go North.\n* OPEN MAILBOX!\n", [1, 0]),
        ("(1) `go north`\n2) \"open mailbox\"", [1, 0]),
        ("1. go north - the way is free\n2. open mailbox: it may hold something", [1, 0]),
        ("go north, open mailbox, dance", [1, 0]),
        ("1. go north 2. open mailbox", [1, 0]),
        ("go north\ngo north\nGO NORTH", [1]),
        ("take the  brass   lantern", [2]),
        ("say 'hello'", [3]),
        ("say hello", [3]),
        ("go", [4]),
        ("go northwards", []),
        ("I would open mailbox because it is there.", []),
        ("First I think: 1. go north.\nAnswer:\n1. open mailbox\n2. go north", [0, 1]),
        ("Answer: open mailbox", [0]),
        ("Answer:\n1. go north\nFinal answer:\n1. open mailbox", [0]),
        ("", []),
        ("\n\n...\n", []),
    ],
)  # fmt: skip
def test_parse_ranking_reads_common_formats(text, ranking):
    assert parse_ranking(text, ACTIONS) == ranking


@given(st.permutations(range(4)))
def test_parse_ranking_reads_a_clean_list_completely(order):
    text = "\n".join(f"{n}. {ACTIONS[k]}" for n, k in enumerate(order, start=1))
    assert parse_ranking(text, ACTIONS[:4]) == list(order)


def test_parse_ranking_takes_the_first_of_actions_with_equal_normal_forms():
    assert parse_ranking("say hello", ("say hello!", "say hello?")) == [0]


def test_prior_from_ranking_by_hand():
    # Ranks 1 and 2 have the weights 1 and 1/2; the two others share the weight 1/3 of rank 3. Sum: 11/6.
    probs = np.exp(prior_from_ranking([2, 0], 4, temperature=1.0))
    assert probs == pytest.approx(np.array([1 / 2, 1 / 6, 1, 1 / 6]) / (11 / 6))
    assert np.exp(prior_from_ranking([], 4, temperature=1.0)) == pytest.approx([0.25] * 4)
    assert np.exp(prior_from_ranking([0], 1, temperature=1.0)) == pytest.approx([1.0])


def test_uniform_prior_by_hand():
    prior = uniform_prior(5, version=3)
    assert np.exp(prior.logprobs) == pytest.approx([0.2] * 5)
    assert (prior.source, prior.version) == ("uniform", 3)


def test_entropy_by_hand():
    assert entropy(np.array([0.5, 0.5, 0.0])) == pytest.approx(math.log(2))
    assert entropy(np.array([1.0, 0.0])) == 0.0
