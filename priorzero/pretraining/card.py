"""What a pretraining writes: the parameters, the figures and the model card."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from priorzero.llm.adapter_files import PROMPT_FILE, PROMPT_SETTINGS, WEIGHTS, set_base_model
from priorzero.llm.model_card import CARD, front_matter, markdown_table, package_list
from priorzero.llm.models import LanguageModel, save_parameters
from priorzero.pretraining.data import Episode, describe
from priorzero.pretraining.evaluation import MEAN, group_means
from priorzero.pretraining.plan import PretrainingPlan
from priorzero.pretraining.training import Progress
from priorzero.settings import LLMSettings

FIGURES = "figures.json"


def save_model(llm: LanguageModel, folder: Path, *, base_model: str, dtype: torch.dtype) -> None:
    """Write an LLM so that ``llm.path`` takes the folder: the adapter (also ``llm.adapter``), or all parameters.

    Args:
        llm: the language model.
        folder: must exist.
        base_model: what the adapter names as its base model.
        dtype: type of the adapter's parameters in the file.
    """
    if not hasattr(llm.model, "peft_config"):
        llm.save(folder)
        return
    from safetensors.torch import load_file, save_file

    save_parameters(llm.model, folder)
    weights = folder / WEIGHTS[0]
    if dtype != torch.float32:
        save_file({name: p.to(dtype) for name, p in load_file(weights).items()}, weights, metadata={"format": "pt"})
    set_base_model(folder, base_model)  # not the folder in which it was found here


def write_figures(folder: Path, progress: Progress, *, details: Mapping[str, Any]) -> None:
    """Write the figures of all evaluations."""
    content = {**details, "evaluations": progress.evaluations}
    (folder / FIGURES).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_card(
    folder: Path,
    progress: Progress,
    *,
    command: str,
    base_model: str,
    cfg: LLMSettings,
    plan: PretrainingPlan,
    training: Sequence[Episode],
    num_steps: int,
) -> None:
    """Write the model card: what was trained on which data, how, and the held-out figures."""
    unfinished = f"not finished; --minutes {plan.minutes:g} limits the time" if plan.minutes else "not finished"
    stop = "" if progress.step >= num_steps else f" ({unfinished})"
    first, last = progress.evaluations[0], progress.evaluations[-1]
    lines = [
        # peft reads these metadata
        *front_matter(base_model=base_model, library_name="peft" if cfg.use_lora else "transformers"),
        f"# {base_model}, pretrained on walkthroughs of text games",
        "",
        _contents(folder, base_model=base_model, cfg=cfg),
        "The language model was trained to give the next command of a walkthrough a high probability among the valid "
        "actions. It knows no game that is held out, and no game of the same series.",
        "",
        "## Command",
        "",
        "```",
        command,
        "```",
        "",
        f"- Date: {datetime.date.today().isoformat()}. Packages: {package_list(('torch', 'transformers', 'peft'))}.",
        f"- Training: {progress.step} of {num_steps} batches of {cfg.batch_size}{stop}, {progress.seconds / 60:.1f} "
        f"minutes, AdamW, learning rate {cfg.learning_rate:g} with {plan.decay} decay, seed {plan.seed}.",
        f"- Objective: command among at most {plan.negatives} other valid actions. Commands as text: {plan.tokens}.",
        f"- Prompt ({PROMPT_FILE}): {', '.join(f'llm.{name}={getattr(cfg, name)}' for name in PROMPT_SETTINGS)}.",
        "",
        "## Held-out games",
        "",
        "Place of the walkthrough's command among the valid actions, how often it is first, and its log-probability "
        "in nats. `calibrated`: the log-probability with the temperature and floor that are best on the other games.",
        "",
        *_figure_lines(first["games"], last["games"]),
        "",
        "## Data",
        "",
        "Walkthroughs of Jericho's games and of games that TextWorld generated. The folder contains no text of them.",
        "",
        *markdown_table(
            ("game", "commands", "states with valid actions", "with the command among them"),
            ([row["game"], row["commands"], row["searched"], row["correct"]] for row in describe(training)),
        ),
    ]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _contents(folder: Path, *, base_model: str, cfg: LLMSettings) -> str:
    """What the folder contains, and the settings with which it is loaded."""
    if cfg.use_lora:
        kind = f"a LoRA adapter of rank {cfg.lora_r}"
        loading = f"--set llm.path={base_model} --set llm.adapter={folder}"
    else:
        kind, loading = "all parameters", f"--set llm.path={folder}"
    return f"This folder contains {kind} for `{base_model}`. PriorZero loads it with `{loading}`."


def _figure_lines(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterable[str]:
    heads = [
        f"{name}{when}" for name in ("place", "first", "log-prob.") for when in (", uniform", ", before", ", after")
    ]
    rows = [(name, before[name], after[name]) for name in after]
    means = group_means(before), group_means(after)
    rows += [(f"{MEAN}, {name}", means[0][name], means[1][name]) for name in means[1]]
    lines = []
    for name, old, new in rows:
        cells = [f"{new['states']:.0f}"]
        for key, form in (("place", ".2f"), ("first", ".0%"), ("logprob", ".2f")):
            cells += [format(new[f"uniform_{key}"], form), format(old[key], form), format(new[key], form)]
        cells.append(format(new["calibrated_logprob"], ".2f") if "calibrated_logprob" in new else "-")
        lines.append([name, *cells])
    return markdown_table(["game", "states", *heads, "calibrated"], lines)
