"""A small text environment of Gymnasium, as other packages write them. Importing this module registers it."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class SwitchEnv(gymnasium.Env[str, Any]):
    """Switches in a row: each that is turned on gives a point, and all of them win.

    Args:
        size: number of switches.
        key: where ``info`` lists the commands.
        discrete: the action is the position of a command.
        flaw: what is wrong with the environment: "", "pixels", "empty" or "numbers".
        label: any value, which the first observation contains.
        maximum: ``info["max_score"]``; "": there is none; "none": None.
    """

    def __init__(
        self,
        *,
        size: int = 3,
        key: str = "admissible_commands",
        discrete: bool = False,
        flaw: str = "",
        label: Any = "",
        maximum: Any = "",
    ):
        self.size, self.key, self.flaw, self.label, self.maximum = size, key, flaw, label, maximum
        self.action_space = spaces.Discrete(size + 1) if discrete else spaces.Text(40)
        self.observation_space = spaces.Text(100)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.on = [False] * self.size
        self.order = [f"turn on switch {n}" for n in self.np_random.permutation(self.size)]
        return self.observe(f"Hello {self.label!r}." if self.label != "" else "Hello.")

    def observe(self, text):
        commands = [] if self.flaw == "empty" else [*self.order, " wait "]
        info = {self.key: [1, 2] if self.flaw == "numbers" else commands, "won": all(self.on), "goal": "Turn all on."}
        if self.maximum != "":
            info["max_score"] = None if self.maximum == "none" else self.maximum
        return (np.zeros(3) if self.flaw == "pixels" else f"{text} {sum(self.on)} are on."), info

    def step(self, action):
        command = [*self.order, " wait "][action] if isinstance(self.action_space, spaces.Discrete) else action
        before = sum(self.on)
        if command != " wait ":
            self.on[int(command.split()[-1])] = True
        observation, info = self.observe(f"You {command.strip()}.")
        return observation, np.float64(sum(self.on) - before), np.bool_(all(self.on)), False, info


gymnasium.register(id="tests/Switches-v0", entry_point=SwitchEnv)
gymnasium.register(id="tests/ShortSwitches-v0", entry_point=SwitchEnv, max_episode_steps=2)
