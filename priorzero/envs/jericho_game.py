"""Classic text adventures (Z-machine story files), played with Jericho."""

from __future__ import annotations

from pathlib import Path

from priorzero.envs.action_cache import ActionCache, cache_file, digest
from priorzero.envs.frotz import EmulatorState, ReproducibleFrotzEnv, RestorableFrotzEnv
from priorzero.envs.frotz_keys import KEY_COMMANDS
from priorzero.envs.probe import Probe
from priorzero.envs.validation import check_action, check_arguments
from priorzero.types import GameState, ValidActionsMode

# Nearly every parser understands these. "wait" lets time pass where nothing else is possible.
FALLBACK_ACTIONS = ("look", "wait", "inventory")
MAX_KNOWN_STATES = 20_000


class ZMachineGame:
    """A game in Jericho's emulator.

    The emulator of the game gets only the commands of the episode, so the game is the same as in Jericho. Everything
    else is tried on a copy of the game; see :class:`~priorzero.envs.probe.Probe`.

    The valid actions are the commands that change the world. Searching them takes 0.05 s to 20 s, depending on the
    game. They are cached in memory and in a file that all processes share. The key is the exact state of the emulator,
    including its random numbers, so episodes with the same seed that begin with the same commands share entries.

    Some games wait for a single key in places: "Press any key to continue", "Press Y or N". There the valid actions are
    names of keys, such as ``press space``: one for each effect that a key can have. Room and inventory are not observed
    there, since the game would read "look" as four keys.
    """

    def __init__(self, env: RestorableFrotzEnv, *, name: str, max_episode_steps: int, look_and_inventory: bool) -> None:
        """Play in ``env``. ``name`` is the game's name, for messages."""
        self._env = env
        self._max_episode_steps = max_episode_steps
        self._look_and_inventory = look_and_inventory
        self._probe = Probe(env, name=name)
        self._max_score = float(env.get_max_score())
        self._fingerprint = env.fingerprint()
        self._known_actions: dict[bytes, tuple[str, ...]] = {}
        self._cache = ActionCache(cache_file())
        self._state: GameState | None = None

    def reset(self) -> GameState:
        self._env.check_story()
        feedback, info = self._env.reset()
        self._state = self._observe(feedback, score=info["score"], moves=0)
        return self._state

    def step(self, action: str) -> tuple[GameState, float]:
        check_action(self._state, action)
        return self.step_unchecked(KEY_COMMANDS.get(action, action) if self._env.waits_for_key() else action)

    def step_unchecked(self, command: str) -> tuple[GameState, float]:
        """Like :meth:`step`, for any command, such as those of the walkthrough."""
        assert self._state is not None
        self._env.check_story()
        feedback, _, _, info = self._env.step(command)
        before, self._state = self._state, self._observe(feedback, score=info["score"], moves=self._state.moves + 1)
        return self._state, self._state.score - before.score

    def close(self) -> None:
        self._probe.close()
        self._env.close_emulators()
        self._cache.close()
        self._state = None

    def _observe(self, feedback: str, *, score: int, moves: int) -> GameState:
        won = self._env.victory()
        ended = won or self._env.game_over() or self._env._emulator_halted()
        truncated = not ended and moves >= self._max_episode_steps
        actions: tuple[str, ...] = ()
        look = inventory = ""
        if not ended:
            state = self._env.full_state()
            if not truncated:
                actions = self._valid_actions(state)
            if self._look_and_inventory and not self._env.waits_for_key():
                look, inventory = self._probe.observe(state, ("look", "inventory"))
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
            max_moves=self._max_episode_steps,
        )

    def _valid_actions(self, state: EmulatorState) -> tuple[str, ...]:
        key = digest(self._fingerprint, state.digest())
        if key not in self._known_actions:
            actions = self._cache.get(key)
            if actions is None:
                actions = self._probe.find_actions(state)
                self._cache.put(key, actions)
            if len(self._known_actions) >= MAX_KNOWN_STATES:
                del self._known_actions[next(iter(self._known_actions))]  # the oldest
            self._known_actions[key] = actions
        return self._known_actions[key]


class JerichoGame(ZMachineGame):
    """A game that Jericho supports.

    Jericho finds its valid actions by trying every command template of the game with every visible object.
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
        num_threads: int | None = None,
    ) -> None:
        """Open a story file that Jericho supports; see :class:`GameArguments`.

        Jericho replaces the seed 0 by the seed of its walkthrough. ``drop_inert_commands`` has no effect, because
        Jericho's valid actions always change the world.

        Args:
            num_threads: see :class:`~priorzero.envs.frotz.ReproducibleFrotzEnv`.

        Raises:
            UserError: Jericho does not support the file, or spaCy's English model is not installed.
            ValueError: an argument has another type or is too small, or ``num_threads`` is not allowed.
        """
        check_arguments(
            seed=seed,
            max_episode_steps=max_episode_steps,
            look_and_inventory=look_and_inventory,
            drop_inert_commands=drop_inert_commands,
            valid_actions=valid_actions,
        )
        super().__init__(
            ReproducibleFrotzEnv(Path(path), seed=seed, mode=valid_actions, num_threads=num_threads),
            name=Path(path).name,
            max_episode_steps=max_episode_steps,
            look_and_inventory=look_and_inventory,
        )

    def walkthrough(self) -> list[str]:
        """Jericho's solution for seed 0. Some of its commands are not valid actions."""
        return list(self._env.get_walkthrough())
