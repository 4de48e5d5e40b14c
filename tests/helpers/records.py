"""Step records of one state with four valid actions."""

from __future__ import annotations

import numpy as np

from priorzero.types import ActionPrior, GameState, StepRecord

ACTIONS = ("open mailbox", "go north", "eat the old brown sack", "wait")


def record(step=0, *, visits=(6, 3, 1, 0), chosen=0, prompt="Where to?", completion=None, predicted=0.0, rollout=None):
    prior = ActionPrior(np.log(np.full(4, 0.25)), "score", 0, completion, rollout_logprobs=rollout)
    return StepRecord(
        state=GameState("West of House", ACTIONS, 0.0, 10.0, step),
        features=np.zeros(3),
        action_indices=np.arange(4),
        prompt=f"{prompt} {step}" if prompt else "",
        prior=prior,
        visit_counts=np.array(visits),
        root_value=0.0,
        predicted_value=predicted,
        chosen=chosen,
        reward=0.0,
        done=False,
        episode=0,
        step=step,
    )
