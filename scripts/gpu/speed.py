"""Times of every part on this device, with ratios to a plain implementation and lower bounds. Takes two minutes.

All times are seconds and medians of repeated calls after a warm-up; the device is waited for before each reading of the
clock. A ratio is the time of the plain implementation divided by ours. A floor is the larger of two times: reading the
parameters once for each forward pass at the bandwidth of a copy, and the floating point operations of the products with
the parameters at the rate of one large product of the same type. Attention, element-wise operations and conversions to
bfloat16 are not in it.

A check passes if its results equal those of the plain implementation: log-probabilities of tokens within 1e-4 in
float32 and 0.3 in bfloat16, and the SFT loss within 1e-4 and 1e-2 of itself. Where nothing is compared, a check only
measures.

- ``ceilings``: what the device can do at most.
- ``prior_*``: one decision (prompt of 600 tokens, 16 and 64 actions) against one prompt for each action, one after the
  other and all in one padded batch; an episode of 20 steps with and without the prompt cache; 64 states at once.
- ``llm_update_*``: 32 decisions with prompts of 450 tokens and 10 actions each, 8 in a forward pass, against one
  decision in a forward pass.
- ``world_model_*``: one update, against the CPU of the same machine.
- ``search_*``: 25 simulations, against one search for each root.
- ``encoder``: features of new states, one text after the other, against a padded batch.
- ``profile_*``: where the time goes; tables are written to the folder of ``--out``.
"""

from __future__ import annotations

from collections.abc import Callable

import speed_llm
import speed_profile
import speed_tools
import speed_world_model
from gpu_context import Context, Outcome

CHECKS: dict[str, Callable[[Context], Outcome]] = {
    "ceilings": speed_tools.check_ceilings,
    **speed_llm.CHECKS,
    **speed_world_model.CHECKS,
    **speed_profile.CHECKS,
}
