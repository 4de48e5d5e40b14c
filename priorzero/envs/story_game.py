"""Story files that Jericho does not support, played with Jericho's emulator."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import jericho

from priorzero.envs.child import run_in_fork
from priorzero.envs.frotz_files import FilelessFrotzEnv
from priorzero.envs.jericho_game import ZMachineGame
from priorzero.envs.story_env import StoryFrotzEnv, story_templates
from priorzero.envs.story_text import Score, clean_text, read_score
from priorzero.envs.validation import check_arguments
from priorzero.envs.zmachine import StoryHeader
from priorzero.types import GameState, UserError, ValidActionsMode

SURVEY_TIMEOUT_S = 30.0
NUM_SURVEY_STEPS = 4  # a story may begin with a few screens that wait for a key


@dataclass(frozen=True, slots=True)
class StorySurvey:
    """What is known of a story file.

    Attributes:
        score_source: ``"status line"``, ``"score command"``, or None if the story states no score.
        max_score: the largest possible score, as the story says; 0 if it does not.
        num_words: size of the story's dictionary.
        num_templates: number of command templates whose words the dictionary contains.
    """

    score_source: str | None
    max_score: int
    num_words: int
    num_templates: int


def survey_story(path: Path) -> StorySurvey:
    """Start a story in another process and ask for its score.

    Raises:
        UserError: the emulator crashes, hangs or stops. The text is a part of a sentence.
    """
    result = run_in_fork(lambda: _survey(path), otherwise=None, timeout_s=SURVEY_TIMEOUT_S)
    if result is None:
        raise UserError(
            "cannot be played: Jericho's emulator crashed, stopped or hung at the story's beginning. The file may be "
            "damaged. Copy or download it again"
        )
    return result


def _survey(path: Path) -> StorySurvey | None:
    warnings.simplefilter("ignore", jericho.jericho.UnsupportedGameWarning)
    env = FilelessFrotzEnv(str(path), seed=1)
    words = [word.word for word in env.get_dictionary()]
    header = StoryHeader.read(path.read_bytes())
    env.reset()
    score: Score | None = None
    for _ in range(NUM_SURVEY_STEPS):
        # Some games print the score after a question, which the empty command answers.
        found = read_score(clean_text(env.step("score")[0] + env.step("")[0]))
        score = found or score
        if score is not None and score.maximum:
            break
    if env._emulator_halted():
        return None
    source = "status line" if header.has_status_line_score else "score command" if score is not None else None
    return StorySurvey(
        score_source=source,
        max_score=(score.maximum or 0) if score is not None else 0,
        num_words=len(words),
        num_templates=len(story_templates(words, version=header.version)),
    )


class StoryGame(ZMachineGame):
    """A story file that Jericho does not support.

    Jericho knows neither its commands nor its score. Commands are tried with a general grammar; see
    :mod:`~priorzero.envs.general_grammar`. The score is that of the status line, or of the reply to "score", which is
    tried on a copy of the game. The end is recognised by its text.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        seed: int,
        max_episode_steps: int,
        look_and_inventory: bool,
        drop_inert_commands: bool = True,
        valid_actions: ValidActionsMode = "exact",
        max_score: int = 0,
    ) -> None:
        """Open a story file; see :class:`GameArguments`. ``drop_inert_commands`` and ``valid_actions`` have no effect.

        Args:
            max_score: the largest possible score, which is used if the story does not say. 0: not known.

        Raises:
            UserError: the story cannot be played, it states another maximum score, or spaCy's English model is not
                installed.
            ValueError: an argument has another type or is too small.
        """
        check_arguments(
            seed=seed,
            max_episode_steps=max_episode_steps,
            look_and_inventory=look_and_inventory,
            drop_inert_commands=drop_inert_commands,
            valid_actions=valid_actions,
        )
        survey = survey_story(Path(path))
        self._score_source = survey.score_source
        super().__init__(
            StoryFrotzEnv(Path(path), seed=seed, max_score=survey.max_score or max_score),
            name=Path(path).name,
            max_episode_steps=max_episode_steps,
            look_and_inventory=look_and_inventory,
        )

    def _observe(self, feedback: str, *, score: int, moves: int) -> GameState:
        # Jericho's score is always 0.
        return super()._observe(feedback, score=self._read_score(feedback, moves=moves), moves=moves)

    def _read_score(self, feedback: str, *, moves: int) -> int:
        """The present score. Where the game does not say, such as after its end, it is that of the state before."""
        before = int(self._state.score) if self._state is not None and moves > 0 else 0
        if self._score_source == "status line":
            return self._env.status_line_score()
        if self._score_source is None:
            return before
        if self._env.game_over() or self._env.victory():
            score = read_score(feedback)
        elif self._env.waits_for_key() or self._env._emulator_halted():
            return before
        else:
            (reply,) = self._probe.observe(self._env.full_state(), ("score",))
            score = read_score(reply)
        return before if score is None else score.points
