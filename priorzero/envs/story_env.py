"""Jericho's emulator with story files that Jericho does not support: it searches commands that change the world."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jericho

from priorzero.envs.action_cache import digest
from priorzero.envs.child import run_in_fork
from priorzero.envs.frotz import ISOLATED_TIMEOUT_S, MAX_SEED, RestorableFrotzEnv
from priorzero.envs.general_grammar import OBJECT, TEMPLATES, fill_in, known_templates
from priorzero.envs.story_text import clean_text, says_ended, says_won
from priorzero.envs.world_changes import Changes, Memory, UsualChanges
from priorzero.envs.zmachine import StoryHeader, WorldReader

# Part of the key of the valid-action cache. Increase it when a change produces other valid actions for the same state.
ALGORITHM_VERSION = 1
ALL = "all"
PASS_TIME = ("wait", "z")
UNKNOWN_WORD = "zzqx"
NUM_RANDOM_SEEDS = 8  # a turn is repeated with other random numbers, to find what changes by chance
# The parser's variables, such as the objects of the last command, are set by commands with many verbs, to many values.
MAX_VERBS = 3
MAX_VALUES = 2
# The command first took an object, which "take" does too, or it is incomplete.
_IGNORED_REPLY = re.compile(
    r"\((?:first )?tak(?:en|ing)\b"
    r"|\b(?:what|who|whom|which|where)\b[^.!?]{0,20} (?:you (?:want|mean)|should)\b[^.!?]*\?",
    re.IGNORECASE,
)


Name = tuple[str, str, str]  # of an object: the word, its part of speech, and the text that contains it


T = TypeVar("T")
D = TypeVar("D")


class Effect(NamedTuple):
    """What a command does to the world."""

    objects: Changes = ()  # parents and attributes
    variables: Changes = ()  # global variables, if no object changes
    ends_game: bool = False
    program_counter: int = 0  # where the game waits, if it asks something; else 0


NO_EFFECT = Effect()


class StoryFrotzEnv(RestorableFrotzEnv):
    """A story file that Jericho does not support.

    Attributes:
        templates: the command templates that are tried.
    """

    def __init__(self, path: Path, *, seed: int, max_score: int) -> None:
        """Open a story file, which :func:`~priorzero.envs.zmachine.check_story` accepts.

        Args:
            path: a story file.
            seed: seed of the game's random numbers.
            max_score: the largest possible score; 0 if it is not known.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", jericho.jericho.UnsupportedGameWarning)
            super().__init__(path, seed=seed % (MAX_SEED - 1) + 1)  # with 0, Jericho uses the time of day
        self._max_score = max_score
        self._world = WorldReader(self._story)
        words = [word.word for word in self.get_dictionary()]
        self.templates = story_templates(words, version=StoryHeader.read(self._story).version)
        self._pass_time = next((word for word in PASS_TIME if word in words), PASS_TIME[0])

    def reset(self) -> tuple[str, dict[str, Any]]:
        text, info = super().reset()
        return clean_text(text), info

    def step(self, action: str) -> tuple[str, int, bool, dict[str, Any]]:
        text, reward, done, info = super().step(action)
        return clean_text(text), reward, done, info

    def victory(self) -> bool:
        """Whether the last reply says that the player has won."""
        return says_won(self._last_reply())

    def game_over(self) -> bool:
        """Whether the last reply says that the game has ended."""
        return says_ended(self._last_reply())

    def get_max_score(self) -> int:
        """The largest possible score; 0 if it is not known."""
        return self._max_score

    def status_line_score(self) -> int:
        """The score of the status line, if the story has one."""
        return self._world.score(self._get_ram())

    def fingerprint(self) -> bytes:
        """As in the base class."""
        return digest(super().fingerprint(), json.dumps([ALGORITHM_VERSION, TEMPLATES]).encode())

    def get_valid_actions(self, **_: Any) -> list[str]:
        """One command for each effect on the world, the one of the most common template."""
        if self.game_over() or self._emulator_halted():
            return []
        state = self.get_state()
        objects = self._visible_objects()
        usual = self._usual_changes(state, objects)
        effects: dict[str, Effect] = {}
        for template in self.templates:
            effects |= self._effects(fill_in(template, objects), state, usual)
        self._return_to(state)
        return ([self._pass_time] if usual.time_passes else []) + one_for_each(effects)

    def _visible_objects(self) -> list[str]:
        """One name for each object that the last reply, the room, the inventory or their descriptions mention."""
        if not self.get_dictionary():  # Jericho would fail
            return []
        reply = clean_text(self._last_reply())
        descriptions = self._identify_interactive_objects(observation=reply, use_object_tree=False)
        text = "\n".join([reply, *sorted(descriptions)])
        names = self._identify_interactive_objects(observation=text, use_object_tree=False)
        del names[ALL]  # the table has its templates
        return self._score_object_names({description: last_words(group, text) for description, group in names.items()})

    def _last_reply(self) -> str:
        return str(self.frotz_lib.get_narrative_text().decode("cp1252"))

    def _return_to(self, state: tuple[Any, ...]) -> None:
        if self._emulator_halted():
            self.reset()
        self.set_state(state)

    def _execute(self, command: str) -> str:
        return str(self.frotz_lib.step(command.encode() + b"\n").decode("cp1252"))

    def _usual_changes(self, state: tuple[Any, ...], objects: Sequence[str]) -> UsualChanges:
        """What changes in this state without the player's doing."""
        usual = UsualChanges(self._world, state)
        generator, interval, counter = map(int, state[7])
        for number in range(NUM_RANDOM_SEEDS):
            usual.add(self._memories_after(self._pass_time, state, rng=(generator + 7919 * number, interval, counter)))
        usual.time_passes = usual.objects_changed
        for command in ("look", "inventory", UNKNOWN_WORD):
            usual.add(self._memories_after(command, state))
        for command in [f"examine {name}" for name in objects] + self._absurd_commands(objects):
            usual.add_absurd(self._memories_after(command, state))
        return usual

    def _absurd_commands(self, objects: Sequence[str]) -> list[str]:
        """Commands that set the parser's variables, but have no effect: "put lamp in lamp", "open zzqx"."""
        commands = []
        for template in self.templates:
            if template.count(OBJECT) == 1:
                commands.append(template.replace(OBJECT, UNKNOWN_WORD))
            elif OBJECT in template:
                commands += [template.replace(OBJECT, name) for name in objects[:1]]
        return commands

    def _memories_after(
        self, command: str, state: tuple[Any, ...], *, rng: tuple[int, int, int] | None = None
    ) -> list[Memory]:
        """The memory after a command, and after another one that only prints. Empty if the emulator crashes."""

        def observe() -> list[Memory]:
            self._return_to(state)
            if rng is not None:
                self.frotz_lib.setRng(*rng)
            memories: list[Memory] = []
            for each in (command, "look"):
                if memories and self.waits_for_key():
                    break
                self._execute(each)
                if self._emulator_halted():
                    break
                memories.append((self._get_ram(), int(self.frotz_lib.getPC())))
            return memories

        self.on_progress()
        return self._maybe_isolated(observe, otherwise=[])

    def _maybe_isolated(self, function: Callable[[], T], *, otherwise: D) -> T | D:
        if not self.isolated:
            return function()
        return run_in_fork(function, otherwise=otherwise, timeout_s=ISOLATED_TIMEOUT_S)

    def _effects(self, commands: list[str], state: tuple[Any, ...], usual: UsualChanges) -> dict[str, Effect]:
        """The effects of the commands that have one, each executed in ``state``."""

        def attempt() -> dict[str, Effect]:
            effects = {command: self._effect(command, state, usual) for command in commands}
            return {command: effect for command, effect in effects.items() if effect != NO_EFFECT}

        self.on_progress()
        found = self._maybe_isolated(attempt, otherwise=None)
        if found is not None:
            return found
        if len(commands) == 1:  # it crashes the emulator
            return {}
        middle = len(commands) // 2
        return self._effects(commands[:middle], state, usual) | self._effects(commands[middle:], state, usual)

    def _effect(self, command: str, state: tuple[Any, ...], usual: UsualChanges) -> Effect:
        self._return_to(state)
        text = self._execute(command)
        if self._emulator_halted() or _IGNORED_REPLY.search(text):
            return NO_EFFECT
        memory, counter = self._get_ram(), int(self.frotz_lib.getPC())
        if counter in usual.counters:
            counter = 0
        effect = Effect(usual.changed_objects(memory), ends_game=self.game_over(), program_counter=counter)
        if effect != NO_EFFECT or usual.is_unchanged(memory):
            return effect
        # The next command overwrites some of the parser's variables.
        if usual.changed_globals(memory) and not self.waits_for_key():
            self._execute("look")
            memory = self._get_ram()
        return Effect(variables=usual.changed_globals(memory))


def one_for_each(effects: Mapping[str, Effect]) -> list[str]:
    """The first command with each effect. Variables of the parser do not count."""
    verbs: dict[int, set[str]] = defaultdict(set)
    values: dict[int, set[int]] = defaultdict(set)
    parser: set[int] = set()
    for command, effect in effects.items():
        verb, _, objects = command.partition(" ")
        for variable, value in effect.variables if objects else ():
            verbs[variable].add(verb)
            values[variable].add(value)
            if objects == ALL:  # such a command sets variables that others do not set
                parser.add(variable)
    parser |= {name for name in verbs if len(verbs[name]) > MAX_VERBS or len(values[name]) > MAX_VALUES}
    found: dict[Effect, str] = {}
    for command, effect in effects.items():
        variables = tuple((name, value) for name, value in effect.variables if name not in parser)
        found.setdefault(effect._replace(variables=variables), command)
    return [command for effect, command in found.items() if effect != NO_EFFECT]


def last_words(names: list[Name], text: str) -> list[Name]:
    """The names of an object without those that precede another one in the text: "lantern" of "brass lantern"."""
    words = [name[0] for name in names]
    pairs = set(itertools.pairwise(re.findall(r"[\w'-]+", text.lower())))
    return [name for name in names if not any((name[0], other) in pairs for other in words)] or names


def story_templates(dictionary: Iterable[str], *, version: int) -> list[str]:
    """The command templates whose words the dictionary of a story of this version contains."""
    return known_templates(dictionary, word_length=6 if version <= 3 else 9)
