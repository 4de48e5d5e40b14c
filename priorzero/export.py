"""Exports a trained agent: ``python -m priorzero.export RUN_OR_CHECKPOINT --to FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from priorzero.exporting.plan import LLM_FORMS
from priorzero.runs.progress import terminal_output
from priorzero.runtime.command import program_name, run_command
from priorzero.runtime.streams import print_output
from priorzero.types import UserError

EXAMPLES = """examples:
  python -m priorzero.export data_priorzero/NAME --to my_agent
  python -m priorzero.export data_priorzero/NAME/checkpoints/iteration_500 --to my_agent --llm adapter
  python -m priorzero.export data_priorzero/NAME --to my_agent --push USER/my-agent --private

The folder contains the world model (safetensors), its settings and action vocabulary, the LLM (save_pretrained form)
and a model card, README.md, with code that loads both. docs/export.md describes it. The run is not changed.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("priorzero.export"),
        description="Write a trained agent into a folder that others can load, and upload it to the Hugging Face hub.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "agent", metavar="RUN_OR_CHECKPOINT", help="a run's folder (its newest checkpoint), or a checkpoint"
    )
    parser.add_argument("--to", required=True, metavar="FOLDER", help="folder to write; must be new or empty")
    parser.add_argument(
        "--llm",
        choices=LLM_FORMS,
        help="the whole LLM (default), its LoRA adapter without the base model, or no LLM",
    )
    parser.add_argument(
        "--base_model", metavar="NAME", help="what the card names as the base model (default: llm.path)"
    )
    parser.add_argument("--license", metavar="ID", help="for the metadata of the card, such as apache-2.0")
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to this repository of the hub")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="merging an adapter may run code that comes with its base model",
    )
    parser.add_argument("--private", action="store_true", help="with --push: a new repository is private")
    return parser


def _export(arguments: argparse.Namespace) -> None:
    for name in ("base_model", "license", "push"):
        if getattr(arguments, name) == "":
            raise UserError(f"--{name} is empty; give a value, or leave --{name} out")
    from priorzero.exporting.run import export, plan_export  # late, since --help does not need it

    try:
        plan = plan_export(
            arguments.agent,
            to=arguments.to,
            form=arguments.llm,
            base=arguments.base_model or "",
            licence=arguments.license or "",
            push=arguments.push or "",
            private=arguments.private,
            trust_remote_code=arguments.trust_remote_code,
        )
        url = export(plan)
    except OSError as error:
        raise UserError(
            f"export {arguments.agent} --to {arguments.to}: a file cannot be read or written ({error}); nothing of the "
            "export remains"
        ) from error
    print_output(str(plan.out) if url is None else f"{plan.out}\n{url}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 2 after an error that the user can correct.
    """

    def action(arguments: argparse.Namespace) -> None:
        with terminal_output():
            _export(arguments)

    return run_command(build_parser(), argv, action)


if __name__ == "__main__":
    sys.exit(main())
