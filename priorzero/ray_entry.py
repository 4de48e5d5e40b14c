"""The command line for a Ray cluster: ``python -m priorzero.ray_entry``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from loguru import logger

from priorzero.config import resolve_settings
from priorzero.entry import FLAGS, add_common_arguments, layers_from, run_command_line
from priorzero.preflight import check_inputs
from priorzero.runs.folder import check_run_folder
from priorzero.runtime.activity import announced
from priorzero.runtime.packages import INSTALL
from priorzero.runtime.paths import shown
from priorzero.settings import Settings
from priorzero.types import UserError

EXAMPLES = """examples:
  DEBUG_MODE=True python -m priorzero.ray_entry                    one process of each kind, small models
  python -m priorzero.ray_entry --env_id zork1.z5 --seed 0         full training on this machine's GPUs
  python -m priorzero.ray_entry --env_id zork1.z5 --num_collectors 8 --set cluster.address=auto
  python -m priorzero.ray_entry --quick_test --wm_update_every 1 --llm_update_every 4
"""

# DEBUG_MODE: one process of each kind, and few PPO steps. The second step changes the LLM.
DEBUG_SETTINGS: dict[str, dict[str, Any]] = {
    "cluster": {"num_collectors": 1, "num_servers": 1, "num_learners": 1},
    "llm": {"update_every": 5},
    "ppo": {"critic_warmup_steps": 1},
}

OWN_FLAGS = {
    "ppo_engine": ("ppo", "engine"),
    "num_collectors": ("cluster", "num_collectors"),
    "wm_update_every": ("train", "update_every"),
    "llm_update_every": ("llm", "update_every"),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.ray_entry",
        description="Train on a Ray cluster: UniZero as python -m priorzero.entry does, the language model by PPO.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_arguments(parser)
    parser.add_argument("--ppo_engine", choices=("torch", "orz"), help="PPO engine (default: torch)")
    parser.add_argument("--num_collectors", type=int, help="number of collector processes")
    parser.add_argument("--wm_update_every", type=int, help="iterations between trainings of the world model")
    parser.add_argument("--llm_update_every", type=int, help="iterations between the language model's PPO steps")
    return parser


def settings_from(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    """Flags win over the file, the file over the preset, the preset over the defaults.

    ``DEBUG_MODE=True`` takes the quick test with one process of each kind.

    Raises:
        UserError: the settings are invalid.
    """
    mode = environment.get("DEBUG_MODE", "")
    if mode.lower() not in ("", "0", "1", "true", "false"):
        raise UserError(f"DEBUG_MODE={mode}: use True or False")
    debug = mode.lower() in ("1", "true")
    if debug:
        arguments.preset = "quick_test"
    base, flags = layers_from(arguments, flags={**FLAGS, **OWN_FLAGS})
    return resolve_settings(*base[:1], *([DEBUG_SETTINGS] if debug else []), *base[1:], *flags)


def _check(settings: Settings) -> None:
    """The checks that need neither torch nor Ray. The models' files are needed on this machine only without a cluster.

    Raises:
        UserError: the first problem.
    """
    check_run_folder(settings)
    check_inputs(settings, with_models=not settings.cluster.address)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code, as of :func:`priorzero.entry.main`.
    """
    return run_command_line(build_parser(), argv, train=_train)


def _train(arguments: argparse.Namespace) -> None:
    settings = settings_from(arguments, os.environ)
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"Ray is not installed; type {INSTALL['ray']} (or scripts/set_up.sh test)")
    logger.info(f"starting: {shown(settings.run.env_id)}, seed {settings.run.seed}")
    _check(settings)
    with announced("loading the libraries"):
        from priorzero.cluster.train import run_on_cluster  # late: imports torch, LightZero and Ray
    run_on_cluster(settings)


if __name__ == "__main__":
    sys.exit(main())
