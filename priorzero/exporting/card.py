"""The model card of an exported agent: what it is, how to load it, its figures, its data, and how it was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from priorzero.exporting.llm import published_base_model
from priorzero.exporting.plan import ExportPlan
from priorzero.llm.model_card import front_matter, markdown_table, package_version
from priorzero.runs.files import CONFIG, EVALUATIONS, EXPORTED_WORLD_MODEL, LLM_FOLDER, PLAY_STATE
from priorzero.runs.results import EVALUATION_KEYS, FIRST_EVALUATION_SEED, read_lines
from priorzero.settings import MODE_NAMES

TAGS = ["priorzero", "unizero", "muzero", "model-based-rl", "text-games"]
TASK = "reinforcement-learning"

WORLD_MODEL_CODE = """\
```python
from priorzero.saved_world_model import load_world_model
from priorzero.types import GameState

folder = "."  # this folder; a copy on the hub: huggingface_hub.snapshot_download("%s")
world_model = load_world_model(folder)
actions = tuple(world_model.vocabulary.state_dict()["actions"][:2])  # of actions.json; others have no learned logits
state = GameState("You are in a kitchen.", actions, score=0, max_score=7, moves=0, max_moves=30)
features = world_model.make_encoder().features([state])
policy_logits, value = world_model.predict(features)
print(policy_logits[world_model.vocabulary.indices(state.valid_actions)], value)
```"""

MERGED_CODE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(f"{folder}/llm")
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/llm")
```"""

ADAPTER_CODE = """\
```python
from peft import PeftModel
from priorzero.llm.model_files import resolve_model
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained(resolve_model(%r, setting="llm.path"))
model = PeftModel.from_pretrained(base, f"{folder}/llm")
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/llm")
```"""


def last_evaluation(run_folder: Path, *, env_step: int) -> list[dict[str, Any]]:
    """The lines of the last evaluation of a run until ``env_step``: one for each mode and game; [] if there is none.

    Raises:
        UserError: the run's file of evaluations is damaged.
    """
    lines = read_lines(run_folder / EVALUATIONS, keys=EVALUATION_KEYS)
    steps = [line["env_step"] for line in lines if line["env_step"] <= env_step]
    # An evaluation that was repeated after the run was resumed replaces the first one.
    latest = {
        (line["mode"], line.get("unseen", False), line["game"]): line
        for line in lines
        if steps and line["env_step"] == max(steps)
    }
    return list(latest.values())


def card_text(plan: ExportPlan, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The card.

    Args:
        plan: what is exported.
        evaluations: result of :func:`last_evaluation`.
    """
    lines = [
        *_metadata(plan, evaluations),
        f"# {_title(plan)}",
        "",
        "An agent for text games, trained with PriorZero. A language model (LLM) assigns prior probabilities to the "
        "valid actions. UniZero, a learned world model, runs Monte-Carlo tree search from this prior.",
        "",
        "## Files",
        "",
        *markdown_table(("file", "content"), _files(plan)),
        "",
        "## Load the models",
        "",
        *_loading(plan),
        "",
        "## Figures",
        "",
        *_figures(plan, evaluations),
        "",
        "## Data",
        "",
        "The agent was trained on these games. This folder contains neither the games nor text of them, except for the "
        "texts of actions.",
        "",
        *markdown_table(("game", "name in PriorZero", "MD5 of its file"), _games(plan)),
        "",
        "## Training",
        "",
        *_training(plan),
        "",
        "## Licence",
        "",
        _licence(plan),
    ]
    return "\n".join(lines) + "\n"


def _title(plan: ExportPlan) -> str:
    return f"PriorZero agent for {', '.join(plan.game_names)}"


def _metadata(plan: ExportPlan, evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    results = [
        {
            "task_type": TASK,
            "dataset_type": line["game"],
            "dataset_name": line["game"],
            "metric_type": "mean_score",
            "metric_name": f"mean score over {len(line['scores'])} episodes, {line['mode']}",
            "metric_value": _mean(line["scores"]),
        }
        for line in evaluations
    ]
    return front_matter(
        library_name="priorzero",
        pipeline_tag=TASK,
        base_model=published_base_model(plan.base) if plan.form != "none" else None,
        license=plan.licence or None,
        tags=TAGS,
        results=results,
        model_name=_title(plan),
    )


def _files(plan: ExportPlan) -> Iterator[tuple[str, str]]:
    yield f"`{EXPORTED_WORLD_MODEL}`", "parameters of the world model"
    yield "`actions.json`", "the action vocabulary: the index of each action text"
    yield f"`{CONFIG}`", "all settings of the run"
    yield f"`{PLAY_STATE}`", "weights of the prior at the root of the search, and the memory of the prompts, by game"
    if plan.form == "merged":
        yield f"`{LLM_FOLDER}/`", "the LLM and its tokenizer, in `save_pretrained` form; `prompt.json`: its prompt"
    if plan.form == "adapter":
        yield f"`{LLM_FOLDER}/`", f"a LoRA adapter of `{plan.base}`, and the tokenizer; `prompt.json`: its prompt"
    yield "`manifest.json`", "counters, versions and checksums"


def _loading(plan: ExportPlan) -> Iterator[str]:
    yield "PriorZero must be installed. FOLDER is this folder."
    yield ""
    if plan.can_play:
        yield "The agent plays its games, and its scores are shown:"
        yield ""
        yield "```bash\npython -m priorzero.evaluate FOLDER\n```"
        yield ""
    yield "The world model:"
    yield ""
    yield WORLD_MODEL_CODE % (plan.push or "USER/NAME")
    if plan.form != "none":
        yield ""
        yield "The LLM:"
        yield ""
        yield MERGED_CODE if plan.form == "merged" else ADAPTER_CODE % plan.base
        yield ""
        yield "A new run that begins with this LLM and its prompt:"
        yield ""
        yield (
            f"```bash\npython -m {_module(plan)} --config FOLDER/{CONFIG} --set llm.path=FOLDER/{LLM_FOLDER} "
            "--set llm.adapter= --env_id GAME\n```"
        )


def _figures(plan: ExportPlan, evaluations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not evaluations:
        yield "The run was not evaluated before this checkpoint was written."
        return
    first = plan.settings.run.seed + FIRST_EVALUATION_SEED
    last = first + plan.settings.env.evaluator_env_num - 1
    seeds = f"the seed {first}" if first == last else f"the seeds {first} to {last}"
    yield (
        f"These are all results of the last evaluation of the run before the checkpoint, at environment step "
        f"{evaluations[0]['env_step']}, without exploration. The games have {seeds} "
        f"(run.seed plus {FIRST_EVALUATION_SEED}, one for each environment; games without chance ignore it)."
    )
    yield ""
    heads = ("agent", "game", "trained on", "episodes", "mean score", "best score", "largest possible", "won")
    yield from markdown_table(
        heads,
        (
            (
                f"{MODE_NAMES[line['mode']]} (`{line['mode']}`)",
                line["game"],
                "no" if line.get("unseen") else "yes",
                len(line["scores"]),
                f"{_mean(line['scores']):g}",
                f"{max(line['scores']):g}",
                f"{line['max_score']:g}" if line["max_score"] else "not known",
                line["wins"],
            )
            for line in evaluations
        ),
    )


def _games(plan: ExportPlan) -> Iterator[tuple[str, str, str]]:
    recorded: Mapping[str, str] = plan.checkpoint.manifest.get("games", {})
    if len(recorded) != len(plan.env_ids):  # a run on a Ray cluster, whose checkpoints do not contain them
        yield from ((name, f"`{name}`", "not recorded") for name in plan.env_ids)
        return
    for env_id, (name, md5) in zip(plan.env_ids, recorded.items(), strict=True):
        yield name, f"`{env_id}`", md5


def _training(plan: ExportPlan) -> Iterator[str]:
    counters, settings = plan.checkpoint.manifest["counters"], plan.settings
    updates = f"{counters['train_iter']} updates of the world model"
    if settings.prior.enabled:
        updates += f", {counters['llm_version']} of the LLM"
    yield f"- {counters['env_step']} environment steps in {counters['iteration']} iterations; {updates}."
    yield f"- Seed {settings.run.seed}. {_llm_training(plan)}"
    versions = plan.checkpoint.manifest["versions"]
    yield f"- Versions of the run: {', '.join(f'{name} {version}' for name, version in versions.items())}."
    yield f"- Exported by priorzero {package_version('priorzero')} from `{plan.checkpoint.folder.name}`."
    yield ""
    yield f"To train it again, type the following. `{CONFIG}` has all settings, also the largest number of steps."
    yield ""
    yield f"```bash\npython -m {_module(plan)} --config FOLDER/{CONFIG}\n```"


def _llm_training(plan: ExportPlan) -> str:
    cfg = plan.settings.llm
    if not plan.settings.prior.enabled:
        return "The run used no LLM."
    start = f"The LLM was `{plan.base}`" + (f" with the adapter `{cfg.adapter}`" if cfg.adapter else "")
    if plan.is_cluster:
        methods = ["PPO"]
    else:
        methods = [name for name, on in (("SFT", cfg.enable_sft), ("RFT", cfg.enable_rft)) if on]
    if not methods or not plan.checkpoint.manifest["counters"]["llm_version"]:
        return f"{start}; it was not changed."
    low_rank = f", through low-rank adapters of rank {cfg.lora_r}" if cfg.use_lora else ""
    exported = "" if plan.form != "none" else ". It was not exported"
    return f"{start}; it was trained by {' and '.join(methods)}{low_rank}{exported}."


def _module(plan: ExportPlan) -> str:
    return "priorzero.ray_entry" if plan.is_cluster else "priorzero.entry"


def _licence(plan: ExportPlan) -> str:
    base = "" if plan.form == "none" else f" The LLM is derived from `{plan.base}`, whose licence also applies to it."
    if plan.licence:
        return f"`{plan.licence}`.{base}"
    return f"Not stated. To state it, add `license: ID` to the metadata of this file.{base}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
