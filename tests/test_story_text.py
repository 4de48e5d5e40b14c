"""Tests of reading scores and ends from texts."""

import pytest

from priorzero.envs.story_text import clean_text, read_score, says_ended, says_won

STATUS = "> West of House" + " " * 98 + "Score: 0" + " " * 16 + "Moves: 2" + " " * 14
INFORM_STATUS = "\n\n>" + " " * 120 + "<< Office >>Score: 10Moves: 1"


@pytest.mark.parametrize(
    ("text", "points", "maximum"),
    [
        ("Your score is 10 (total of 350 points), in 2 moves.", 10, 350),
        ("Your score would be 0 (total of 400 points), in 1 move.", 0, 400),
        ("Your potential is 3 of a possible 7, in 1 move.", 3, 7),
        ("Your score is 0 points out of 100, in 1 move.", 0, 100),
        ("You have so far scored -5 out of a possible\n50, in 2 turns.", -5, 50),
        ("In that game you scored 360 out of a possible 360, in 51 turns.", 360, 360),
        ("[You have 0 out of 100 points, which earns you a ranking.]", 0, 100),
        ("In 0 turns, you have achieved a score of 0 out of 25 points.", 0, 25),
        ("Your score is 12.", 12, None),
    ],
)
def test_read_score_understands_what_games_print(text, points, maximum):
    assert read_score(text) == (points, maximum)


@pytest.mark.parametrize(
    "text", ["There is no score in this story.", "Who cares what your score is? Get 2 pagers.", "", "[Your turn.]"]
)
def test_read_score_finds_none(text):
    assert read_score(text) is None


def test_clean_text_removes_status_lines_and_prompts():
    assert clean_text(STATUS + "\nOpened.\n\n") == "Opened."
    assert clean_text("\n\nOffice\nYou are here.\n\n\n\nHello." + INFORM_STATUS) == "Office\nYou are here.\n\nHello."
    assert clean_text("\nDone.\n\n[The Court Yard]>" + " " * 120 + "Court YardScore: 0Moves: 1") == "Done."
    assert clean_text("> Your Room" + " " * 100 + "Time:  8:00 am" + " " * 20 + "\nTaken.") == "Taken."


def test_says_ended_needs_the_question_after_the_end():
    question = "Would you like to RESTART, RESTORE a saved game or QUIT?\n>"
    assert says_ended(f"*** You have died ***\n\n{question}") and not says_won(f"*** You have died ***\n\n{question}")
    assert not says_ended("****  You have died  ****\n\nPerhaps you deserve another chance.")
    assert not says_ended("To end the game, type QUIT.")
    assert not says_ended(question + "x" * 1000)


@pytest.mark.parametrize(
    "text",
    [
        "*** You have won ***",
        "    *** You have won! ***\n\nWould you like to RESTART, RESTORE or QUIT?",
        "Your score is 350 (total of 350 points), in 394 moves.",
    ],
)
def test_says_won_recognises_a_victory(text):
    assert says_won(text) and says_ended(text)


@pytest.mark.parametrize("text", ["You have won the bet.", "You scored 0 out of a possible 0.", "*** You lost ***"])
def test_says_won_is_not_misled(text):
    assert not says_won(text)
