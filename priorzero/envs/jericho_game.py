"""Classic text adventures (Z-machine story files) through Jericho."""

from __future__ import annotations

from pathlib import Path

from priorzero.envs.action_cache import ActionCache, cache_file
from priorzero.envs.cache import digest
from priorzero.envs.frotz import ReproducibleFrotzEnv, state_digest
from priorzero.types import GameState

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
        filter_threads: int | None = None,
    ) -> None:
        """Open a story file.

        Args:
            path: a story file that Jericho supports.
            seed: of the game's random numbers. 0 stands for the seed of Jericho's walkthrough (Jericho's own rule).
            max_episode_steps: commands after which an episode is cut (``done`` and ``truncated``).
            look_and_inventory: fill ``GameState.look`` and ``GameState.inventory``.
            drop_inert_commands: accepted so that all games are made alike; Jericho never offers commands that change
                nothing.
            filter_threads: 1 or 2 threads look for valid actions; None: 2 if this process may use more than one core.

        Raises:
            UserError: Jericho does not support the file, or spaCy's English model is not installed.
            ValueError: a negative seed (Jericho would take the time of day), an empty episode, or another number of
                threads.
        """
        if seed < 0 or max_episode_steps < 1:
            raise ValueError(f"seed={seed} must be 0 or more, max_episode_steps={max_episode_steps} 1 or more")
        self._env = ReproducibleFrotzEnv(Path(path), seed=seed, filter_threads=filter_threads)
        self._max_episode_steps = max_episode_steps
        self._look_and_inventory = look_and_inventory
        self._max_score = float(self._env.get_max_score())
        self._scope = self._env.scope()
        self._known_actions: dict[bytes, tuple[str, ...]] = {}
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
        self._env.free()
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
        key = digest(self._scope, state_digest(self._env.get_state()))
        if key not in self._known_actions:
            actions = self._cache.get(key)
            if actions is None:
                actions = self._find_valid_actions()
                self._cache.put(key, actions)
            if len(self._known_actions) >= MAX_REMEMBERED_STATES:
                del self._known_actions[next(iter(self._known_actions))]  # the oldest
            self._known_actions[key] = actions
        return self._known_actions[key]

    def _find_valid_actions(self) -> tuple[str, ...]:
        # No pool of processes: it would be forked, from a process that may hold threads.
        found = self._env.get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False)
        return tuple(sorted(set(found)))
