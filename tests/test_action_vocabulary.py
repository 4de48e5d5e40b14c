"""The action vocabulary: stable, distinct indices, and counted overflows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from priorzero.play.action_vocabulary import ActionVocabulary

states = st.lists(st.lists(st.text(max_size=4), min_size=1, max_size=12, unique=True), min_size=1, max_size=40)


@given(states, st.integers(2, 10))
def test_action_vocabulary_gives_valid_actions_of_a_state_distinct_indices(states, capacity):
    vocabulary = ActionVocabulary(capacity)
    for actions in states:
        kept = vocabulary.keep(actions)
        indices = vocabulary.indices(kept)
        assert list(kept) == actions[:capacity]
        assert len(set(indices.tolist())) == len(kept)
        assert all(0 <= i < vocabulary.num_used <= capacity for i in indices)


@given(states)
def test_action_vocabulary_never_changes_an_index_while_it_has_room(states):
    vocabulary, first = ActionVocabulary(1000), {}
    for actions in states:
        for action, index in zip(actions, vocabulary.indices(actions), strict=True):
            assert first.setdefault(action, index) == index
    assert vocabulary.num_overflows == 0 and vocabulary.num_used == len(first)
    assert sorted(first.values()) == list(range(len(first)))


def test_action_vocabulary_reuses_the_index_that_was_not_valid_for_the_longest_time():
    vocabulary = ActionVocabulary(3)
    assert vocabulary.indices(["a", "b", "c"]).tolist() == [0, 1, 2]
    vocabulary.indices(["a", "c"])
    assert vocabulary.indices(["a", "d"]).tolist() == [0, 1]  # b's
    assert vocabulary.num_overflows == 1
    assert vocabulary.indices(["b"]).tolist() == [2]  # c's
    assert vocabulary.num_overflows == 2


def test_action_vocabulary_keep_drops_and_counts_actions_beyond_the_capacity():
    vocabulary = ActionVocabulary(2)
    assert vocabulary.keep(["a", "b", "c", "d"]) == ("a", "b")
    assert vocabulary.num_overflows == 2
