"""Configures logging in vLLM's processes before they import vllm.

vLLM (0.32.0) configures its logger when it builds an engine. Until then its warnings would go to the terminal.
:func:`priorzero.llm.engines.vllm_process.process_environment` makes the processes run this module in place of the main
script.
"""

from __future__ import annotations

import json
import logging.config
import os
from pathlib import Path


def configure(config_file: str) -> None:
    """Configure logging as a JSON file in the form of ``logging.config.dictConfig`` says."""
    logging.config.dictConfig(json.loads(Path(config_file).read_text(encoding="utf-8")))


if __name__ == "__mp_main__":
    configure(os.environ["VLLM_LOGGING_CONFIG_PATH"])
