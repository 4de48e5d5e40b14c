"""Action numbers: stable, distinct among what is valid together, and honest about what did not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from priorzero.play.action_vocabulary import ActionVocabulary, make_action_indexer

states = st.lists(st.lists(st.text(max_size=4), min_size=1, max_size=12, unique=True), min_size=1, max_size=40)


@given(states, st.integers(2, 10), st.sampled_from(["vocabulary", "positional"]))
def test_two_valid_actions_never_share_an_index(many, capacity, kind):
    indexer = make_action_indexer(kind, capacity)
    for actions in many:
        kept = indexer.keep(actions)
        indices = indexer.indices(kept)
        assert list(kept) == actions[:capacity]
        assert len(set(indices.tolist())) == len(kept)
        assert all(0 <= i < indexer.num_used <= capacity for i in indices)


@given(states)
def test_an_action_keeps_its_index_while_there_is_room(many):
    vocabulary, first = ActionVocabulary(1000), {}
    for actions in many:
        for action, index in zip(actions, vocabulary.indices(actions), strict=True):
            assert first.setdefault(action, index) == index
    assert vocabulary.num_overflows == 0 and vocabulary.num_used == len(first)
    assert sorted(first.values()) == list(range(len(first)))


def test_a_full_vocabulary_gives_up_what_was_longest_not_valid():
    vocabulary = ActionVocabulary(3)
    assert vocabulary.indices(["a", "b", "c"]).tolist() == [0, 1, 2]
    vocabulary.indices(["a", "c"])
    assert vocabulary.indices(["a", "d"]).tolist() == [0, 1]  # b was longest not valid
    assert vocabulary.num_overflows == 1
    assert vocabulary.indices(["b"]).tolist() == [2]  # c by now
    assert vocabulary.num_overflows == 2


def test_more_valid_actions_than_capacity_are_cut_and_counted():
    for kind in ("vocabulary", "positional"):
        indexer = make_action_indexer(kind, 2)
        assert indexer.keep(["a", "b", "c", "d"]) == ("a", "b")
        assert indexer.num_overflows == 2


def test_positional_numbers_are_places():
    indexer = make_action_indexer("positional", 8)
    assert indexer.indices(["x", "y"]).tolist() == indexer.indices(["y", "x"]).tolist() == [0, 1]
    assert indexer.num_used == 2


@pytest.mark.parametrize("kind", ["vocabulary", "positional"])
def test_state_goes_out_and_in(kind):
    one, other = make_action_indexer(kind, 3), make_action_indexer(kind, 3)
    for actions in (["a", "b", "c"], ["b"], ["d"]):
        one.indices(actions)
    other.load_state_dict(one.state_dict())
    assert other.num_overflows == one.num_overflows and other.num_used == one.num_used
    assert other.indices(["e", "b"]).tolist() == one.indices(["e", "b"]).tolist()
