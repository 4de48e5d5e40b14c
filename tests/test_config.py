"""Configuration: layers, files, flags, messages and DI-engine's form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from priorzero import config
from priorzero.config import (
    PRESETS,
    describe_settings,
    differences,
    dump_settings,
    from_ding_config,
    parse_assignments,
    read_config_file,
    resolve_settings,
    settings_page,
    to_ding_config,
)
from priorzero.settings import Settings
from priorzero.types import UserError

CONFIGS = Path(__file__).parent.parent / "configs"


def message(*layers) -> str:
    with pytest.raises(UserError) as caught:
        resolve_settings(*layers)
    return str(caught.value)


# ---- layers ----


def test_resolve_settings_lets_later_layers_win():
    settings = resolve_settings({"llm": {"batch_size": 16, "lora_r": 2}}, {"llm": {"batch_size": 8}})
    assert (settings.llm.batch_size, settings.llm.lora_r) == (8, 2)
    assert settings.search.num_simulations == 25
    assert resolve_settings(settings, {"llm": {"lora_r": 4}}).llm.lora_r == 4


def test_resolve_settings_leaves_layers_and_defaults_unchanged():
    resolve_settings({"eval": {"modes": ["prior"]}}).eval.modes.append("x")
    resolve_settings().eval.modes.append("x")
    layer = {"llm": {"gradient_accumulation_steps": 4}}
    resolve_settings(layer)
    assert layer == {"llm": {"gradient_accumulation_steps": 4}}
    assert resolve_settings().eval.modes == Settings().eval.modes == ["world_model", "world_model_with_prior", "prior"]


def test_resolve_settings_reports_all_problems_in_one_message():
    llm, run = {"bach_size": 3, "gradient_accumulation_steps": 0}, {"seed": -1, "max_iter": "x"}
    text = message({"llm": llm, "run": run, "nonsense": {}}, {"env": 3})
    problems = text.splitlines()[1:]
    assert len(problems) == 6 and all(line.startswith("  - ") for line in problems)
    names = "bach_size", "llm.gradient_accumulation_steps=0", "run.seed=-1", "run.max_iter=x", "nonsense", "'env'"
    assert [text.count(name) for name in names] == [1] * 6
    # Conflicts are reported together as well.
    text = message({"world_model": {"context_length": 7}, "llm": {"batch_size": 512}, "replay": {"buffer_size": 1}})
    assert all(name in text for name in ("context_length=7", "llm.batch_size=512", "replay.buffer_size=1"))


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("llm.bach_size", "did you mean 'llm.batch_size'?"),
        ("train.llm_loss_weight", "did you mean 'llm.llm_loss_weight'?"),
        ("encoder.standardise", "the settings of 'encoder' are path"),
        ("llm.lr", "the settings of 'llm' are"),  # not 'llm.lora_r'
        ("lm.batch_size", "did you mean 'llm'?"),
        ("x.y", "the groups are run, env, encoder"),
    ],
)
def test_resolve_settings_refuses_unknown_names_and_suggests_known_ones(name, suggestion):
    group = name.split(".")[0]
    text = message(parse_assignments([f"{name}=1"]))
    unknown = f"unknown setting '{name}'" if group in Settings.model_fields else f"unknown group '{group}'"
    assert f"{unknown}; {suggestion}" in text


# ---- the alias of llm.micro_batch_size ----


@pytest.mark.parametrize(
    ("layers", "micro_batch_size"),
    [
        ([{"gradient_accumulation_steps": 8}], 4),
        ([{"gradient_accumulation_steps": 32}], 1),
        ([{"gradient_accumulation_steps": 2.0, "batch_size": 8.0}], 4),
        ([{"gradient_accumulation_steps": 2}, {"batch_size": 8}], 4),
        ([{"gradient_accumulation_steps": 8, "micro_batch_size": 4}], 4),  # they agree
        ([PRESETS["quick_test"]["llm"], {"gradient_accumulation_steps": 8}], 1),  # the later layer wins
        ([{"gradient_accumulation_steps": 8}, {"micro_batch_size": 2}], 2),
    ],
)
def test_gradient_accumulation_steps_sets_the_micro_batch_size(layers, micro_batch_size):
    assert resolve_settings(*({"llm": layer} for layer in layers)).llm.micro_batch_size == micro_batch_size


def test_gradient_accumulation_steps_that_do_not_fit_are_refused():
    assert "gradient_accumulation_steps=2 and llm.micro_batch_size=4 do not give llm.batch_size=32" in message(
        {"llm": {"gradient_accumulation_steps": 2, "micro_batch_size": 4}}
    )
    assert "gradient_accumulation_steps=3 must divide llm.batch_size=32" in message(
        {"llm": {"gradient_accumulation_steps": 3}}
    )
    for wrong in (0, -1, 1.5, True, "many", None):
        assert f"gradient_accumulation_steps={wrong!r} must be a whole number, at least 1" in message(
            {"llm": {"gradient_accumulation_steps": wrong}}
        )


def test_gradient_accumulation_steps_is_no_setting_of_its_own():
    settings = resolve_settings({"llm": {"gradient_accumulation_steps": 16}})
    assert "gradient_accumulation_steps" not in settings.model_dump()["llm"]
    assert differences(settings) == {"llm": {"micro_batch_size": 2}}


# ---- flags ----


@pytest.mark.parametrize("text", ["llm.batch_size", "batch_size=8", "=8", ".=8", "llm.=3"])
def test_parse_assignments_refuses_another_form(text):
    with pytest.raises(UserError, match=r"is not of the form group\.key=value"):
        parse_assignments([text])


def test_parse_assignments_reads_values_as_yaml():
    layer = parse_assignments(
        ["llm.learning_rate=1e-6", "prior.enabled=true", "eval.modes=[prior]", "run.exp_name=a=b"]
    )
    assert layer["run"]["exp_name"] == "a=b"
    settings = resolve_settings(layer)
    assert settings.llm.learning_rate == 1e-6 and settings.eval.modes == ["prior"]
    assert resolve_settings(parse_assignments(["eval.modes=prior,world_model"])).eval.modes == ["prior", "world_model"]
    assert parse_assignments(["run.exp_name=2024-13-45"]) == {"run": {"exp_name": "2024-13-45"}}  # not a date


# ---- files ----


CODE = "llm: !!python/object/apply:os.system ['touch pwned']\n"


@pytest.mark.parametrize(
    "content", ["llm: [1, 2", "- a\n- b\n", "just text", "a: b: c", "run: {exp_name: 2024-13-45}", CODE]
)
def test_read_config_file_refuses_what_is_not_a_configuration(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"x\.yaml"):
        resolve_settings(read_config_file(path))


def test_read_config_file_refuses_what_it_cannot_read(tmp_path):
    for path in (tmp_path, tmp_path / "missing.yaml"):
        with pytest.raises(UserError, match="cannot be read"):
            read_config_file(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_config_file(tmp_path / "binary.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_config_file(tmp_path / "empty.yaml") == {}
    (tmp_path / "group.yaml").write_text("llm: 3\n")
    assert "group 'llm' must contain settings, such as 'llm: {path: ...}'" in message(
        read_config_file(tmp_path / "group.yaml")
    )


@pytest.mark.parametrize(
    ("content", "twice"),
    [
        ("run: {seed: 1}\nllm: {batch_size: 8}\nrun: {seed: 2}\n", "run"),
        ("run:\n  seed: 1\n  max_iter: 3\n  seed: 1\n", "seed"),
    ],
)
def test_read_config_file_refuses_duplicate_keys(tmp_path, content, twice):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(UserError, match=rf"x\.yaml: is not valid YAML: '{twice}' occurs twice .*line "):
        read_config_file(tmp_path / "x.yaml")


def test_read_config_file_accepts_anchors(tmp_path):
    (tmp_path / "x.yaml").write_text("run: &base {seed: 1, max_iter: 3}\nenv: {<<: *base, seed: 2}\n")
    assert read_config_file(tmp_path / "x.yaml")["env"] == {"seed": 2, "max_iter": 3}


@pytest.mark.parametrize("preset", PRESETS)
def test_dump_settings_is_read_back(tmp_path, preset):
    settings = resolve_settings(PRESETS[preset])
    (tmp_path / "config.yaml").write_text(dump_settings(settings))
    assert resolve_settings(read_config_file(tmp_path / "config.yaml")) == settings


def test_dump_settings_can_be_changed_and_names_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_settings(resolve_settings({"run": {"exp_name": "mine"}})))
    again = resolve_settings(read_config_file(tmp_path / "config.yaml"), {"llm": {"micro_batch_size": 1}})
    assert again.llm.micro_batch_size == 1 and again.run.exp_name == ""


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_contain_differences_from_the_defaults_only(path):
    layer = read_config_file(path)
    assert differences(resolve_settings(layer)) == layer


def test_presets_change_what_their_names_say():
    assert not config.get_config_pure_unizero()[0].policy.prior.enabled
    assert not config.get_config_llm_only_sft()[0].policy.llm.enable_rft
    assert config.get_config_with_lora()[0].policy.llm.use_lora


# ---- text ----


def test_describe_settings_and_settings_page_list_every_setting():
    text, rows = describe_settings(), [line for line in settings_page().splitlines() if line.startswith("| `")]
    names = [f"{group}.{key}" for group, values in Settings().model_dump().items() for key in values]
    assert all(f"  {name} = " in text for name in names)
    assert "llm.micro_batch_size = 8 (a whole number, at least 1)" in text
    assert [row.split("`")[1] for row in rows] == names and all(row.count("|") == 5 for row in rows)
    assert "| `llm.micro_batch_size` | `8` | a whole number, at least 1 | decisions in one" in "".join(rows)


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], describe_settings() + "\n"), (["--markdown"], settings_page())]
)
def test_config_command_prints_the_settings(arguments, expected):
    command = [sys.executable, "-m", "priorzero.config", *arguments]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == expected


# ---- DI-engine's form ----


@pytest.mark.parametrize(
    "make",
    [
        config.get_priorzero_config,
        config.get_priorzero_config_for_quick_test,
        config.get_config_pure_unizero,
        config.get_config_llm_only_sft,
        config.get_config_with_lora,
    ],
)
def test_ding_config_is_converted_there_and_back(make):
    main_config, create_config = make(env_id="detective.z5", seed=3, search={"num_simulations": 7})
    assert (main_config.env.env_id, main_config.seed) == ("detective.z5", 3)
    assert main_config.policy.search.num_simulations == 7
    assert create_config.policy.type == "priorzero"
    settings = from_ding_config(main_config)
    assert to_ding_config(settings)[0] == main_config
    main_config.policy.search.num_simulations = 0
    with pytest.raises(UserError, match=r"search.num_simulations=0 must be a whole number, at least 1"):
        from_ding_config(main_config)
