"""The view of a BabyAI agent in words: hand-made views with known sentences."""

import numpy as np
import pytest

from priorzero.envs.babyai_text import describe_carried, describe_view

pytest.importorskip("minigrid")

# minigrid's numbers of types, colours and states of doors.
UNSEEN, EMPTY, WALL, FLOOR, DOOR, KEY, BALL, BOX = 0, 1, 2, 3, 4, 5, 6, 7
RED, GREEN, BLUE, PURPLE, YELLOW, GREY = range(6)
OPEN, CLOSED, LOCKED = range(3)


def view(*objects, background=EMPTY):
    """A view of 7 x 7 cells. Each object is (steps to the right, steps forward, type, colour[, state])."""
    image = np.zeros((7, 7, 3), dtype=np.uint8)
    image[:, :, 0] = background
    for right, forward, *cell in objects:
        image[3 + right, 6 - forward] = [*cell, 0][:3]
    return image


@pytest.mark.parametrize(
    ("right", "forward", "where"),
    [
        (0, 1, "1 step forward"),
        (0, 2, "2 steps forward"),
        (-1, 0, "1 step left"),
        (3, 0, "3 steps right"),
        (-2, 1, "2 steps left and 1 step forward"),
        (1, 6, "1 step right and 6 steps forward"),
    ],
)
def test_describe_view_says_where_an_object_is(right, forward, where):
    assert describe_view(view((right, forward, BALL, RED))) == [f"You see a red ball {where}"]


def test_describe_view_agrees_with_an_observation_of_babyai_text():
    # An observation of BabyAI-Text that is shown in Farama-Foundation/Minigrid, issue 454.
    image = view(
        (2, 0, WALL, GREY),
        (-3, 1, KEY, BLUE),
        (-3, 0, BOX, RED),
        (-2, 1, BOX, BLUE),
        (-1, 1, BALL, RED),
        (0, 1, BALL, GREY),
        (1, 1, BOX, BLUE),
    )
    assert describe_view(image) == [
        "You see a wall 2 steps right",
        "You see a blue key 3 steps left and 1 step forward",
        "You see a red box 3 steps left",
        "You see a blue box 2 steps left and 1 step forward",
        "You see a red ball 1 step left and 1 step forward",
        "You see a grey ball 1 step forward",
        "You see a blue box 1 step right and 1 step forward",
    ]


def test_describe_view_says_the_state_of_doors():
    image = view((0, 3, DOOR, GREEN, CLOSED), (-1, 1, DOOR, RED, OPEN), (1, 2, DOOR, YELLOW, LOCKED))
    assert describe_view(image) == [
        "You see an open red door 1 step left and 1 step forward",
        "You see a closed green door 3 steps forward",
        "You see a locked yellow door 1 step right and 2 steps forward",
    ]


def test_describe_view_says_the_nearest_wall_in_three_directions():
    walls = [(x, 4, WALL, GREY) for x in range(-3, 4)] + [(-2, y, WALL, GREY) for y in range(6)]
    assert describe_view(view(*walls)) == ["You see a wall 4 steps forward", "You see a wall 2 steps left"]


def test_describe_view_leaves_out_walls_behind_objects_and_what_is_not_seen():
    image = view((0, 4, WALL, GREY), (0, 2, BALL, PURPLE), (3, 0, WALL, GREY), (1, 0, DOOR, BLUE, CLOSED))
    assert describe_view(image) == ["You see a purple ball 2 steps forward", "You see a closed blue door 1 step right"]
    assert describe_view(view(background=UNSEEN)) == []
    assert describe_view(view((0, 1, FLOOR, BLUE))) == []


def test_describe_view_leaves_out_the_carried_object():
    assert describe_view(view((0, 0, KEY, YELLOW))) == []
    assert describe_carried("key", "yellow") == "You carry a yellow key"
