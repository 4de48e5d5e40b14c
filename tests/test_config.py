"""Settings: layers, checks, messages, files and DI-engine's form."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from priorzero import config
from priorzero.config import (
    OPTIONS,
    PRESETS,
    differences,
    dump_settings,
    from_ding_config,
    parse_assignments,
    read_config_file,
    resolve_settings,
    to_ding_config,
)
from priorzero.types import UserError

CONFIGS = Path(__file__).parent.parent / "configs"


def message(*layers) -> str:
    with pytest.raises(UserError) as caught:
        resolve_settings(*layers)
    return str(caught.value)


def test_later_layers_win():
    settings = resolve_settings({"llm": {"batch_size": 16, "lora_r": 2}}, {"llm": {"batch_size": 8}})
    assert (settings.llm.batch_size, settings.llm.lora_r) == (8, 2)
    assert settings.llm.gradient_accumulation_steps == 2  # 8 / 4
    assert settings.search.num_simulations == 25


def test_layers_leave_the_defaults_alone():
    resolve_settings({"eval": {"modes": ["prior"]}}).eval.modes.append("x")
    assert OPTIONS["eval"]["modes"].default == ["world_model", "world_model_with_prior", "prior"]


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("llm.bach_size=8", ["unknown setting 'llm.bach_size'", "did you mean 'llm.batch_size'?"]),
        ("lm.batch_size=8", ["unknown group 'lm'", "did you mean 'llm'?"]),
        ("train.llm_loss_weight=1", ["did you mean 'llm.llm_loss_weight'?"]),
        ("llm.micro_batch_size=6", ["llm.micro_batch_size=6 must divide llm.batch_size=32; try 4 or 8"]),
        ("llm.gradient_accumulation_steps=3", ["does not equal", "leave it at 0"]),
        ("run.max_iter=-1", ["run.max_iter=-1 must be at least 1"]),
        ("run.max_iter=many", ["must be a whole number"]),
        ("run.max_iter=true", ["must be a whole number"]),
        ("llm.learning_rate=.nan", ["must be a finite number"]),
        ("llm.use_lora=1", ["must be true or false"]),
        ("prior.combine=add", ["must be one of mix, replace"]),
        ("prior.use_cot=true", ["prior.use_cot=True needs prior.mode=rank"]),
        ("world_model.num_heads=3", ["world_model.embed_dim=512 must be a multiple of 8 and of"]),
        ("world_model.context_length=7", ["must be even"]),
        ("world_model.num_unroll_steps=2", ["must be at least 4"]),
        ("replay.buffer_size=100", ["must be at least train.batch_size + replay.segment_length = 264"]),
        ("eval.modes=everything", ["may hold only world_model, world_model_with_prior, prior"]),
        ("llm.rft_clip=0.2 prior.mode=rank", ["llm.rft_clip=0.2 needs prior.mode=score"]),
        ("llm.objective=actions prior.mode=rank", ["llm.objective=actions needs prior.mode=score"]),
        ("llm.prompt_layout=walkthrough prior.mode=rank", ["needs prior.mode=score: it asks for no ranking"]),
        ("prior.enabled=false", ["add --set eval.modes=world_model"]),
        ("llm.batch_size=128", ["llm.batch_size=128 must be at most train.batch_size=64"]),
        ("llm.path=[1]", ["must be text"]),
        ("llm.learning_rate=1" + "0" * 400, ["must be a finite number"]),
        ("world_model.embed_dim=1000000", ["must lie between 8 and 16384"]),
        ("env.max_episode_steps=1", ["must be at least 2"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_what_to_do(assignment, words):
    text = message(parse_assignments(assignment.split(" ")))
    for word in words:
        assert word in text


def test_all_problems_are_said_at_once():
    text = message({"llm": {"bach_size": 3}, "run": {"seed": -1}, "nonsense": {}})
    assert all(word in text for word in ("bach_size", "run.seed=-1", "nonsense"))


@pytest.mark.parametrize("text", ["llm.batch_size", "batch_size=8", "=8", ".=8", "llm.=3"])
def test_an_assignment_has_a_form(text):
    with pytest.raises(UserError, match=r"is not of the form group\.key=value"):
        parse_assignments([text])


def test_a_value_that_looks_like_a_date_and_is_none(tmp_path):
    assert parse_assignments(["run.exp_name=2024-13-45"]) == {"run": {"exp_name": "2024-13-45"}}
    (tmp_path / "x.yaml").write_text("run: {exp_name: 2024-13-45}")
    with pytest.raises(UserError, match="not valid YAML"):
        read_config_file(tmp_path / "x.yaml")


def test_a_saved_configuration_can_be_changed(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_settings(resolve_settings({"run": {"exp_name": "mine"}})))
    again = resolve_settings(read_config_file(tmp_path / "config.yaml"), {"llm": {"micro_batch_size": 1}})
    assert again.llm.gradient_accumulation_steps == 32 and again.run.exp_name == ""


def test_values_are_read_as_yaml_and_small_numbers_too():
    layer = parse_assignments(
        ["llm.learning_rate=1e-6", "prior.enabled=true", "eval.modes=[prior]", "run.exp_name=a=b"]
    )
    assert layer["run"]["exp_name"] == "a=b"
    settings = resolve_settings(layer)
    assert settings.llm.learning_rate == 1e-6 and settings.eval.modes == ["prior"]
    assert resolve_settings(parse_assignments(["eval.modes=prior,world_model"])).eval.modes == ["prior", "world_model"]


@pytest.mark.parametrize("content", ["llm: [1, 2", "- a\n- b\n", "just text", "a: b: c"])
def test_files_that_are_no_configuration(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"x\.yaml"):
        resolve_settings(read_config_file(path))


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "missing.yaml"):
        with pytest.raises(UserError, match="cannot be read"):
            read_config_file(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_config_file(tmp_path / "binary.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_config_file(tmp_path / "empty.yaml") == {}
    (tmp_path / "group.yaml").write_text("llm: 3\n")
    assert "group 'llm' must hold settings" in message(read_config_file(tmp_path / "group.yaml"))


def test_yaml_cannot_run_code(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("llm: !!python/object/apply:os.system ['touch pwned']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        read_config_file(path)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_files_in_configs_are_the_presets(preset):
    assert (yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text()) or {}) == PRESETS[preset]
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*PRESETS, "learning_textworld", "learning_jericho"}


@pytest.mark.parametrize("name", ["learning_textworld", "learning_jericho"])
def test_the_settings_of_the_learning_benchmark_hold_differences_only(name):
    layer = read_config_file(str(CONFIGS / f"{name}.yaml"))
    settings = resolve_settings(layer)
    assert differences(settings) == {
        **layer,
        "llm": {**layer["llm"], "gradient_accumulation_steps": 4},
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_dumped_settings_are_read_back(tmp_path, preset):
    settings = resolve_settings(PRESETS[preset])
    (tmp_path / "config.yaml").write_text(dump_settings(settings))
    assert resolve_settings(read_config_file(tmp_path / "config.yaml")) == settings


def test_defaults_of_the_specification():
    s = resolve_settings()
    assert (s.world_model.num_layers, s.world_model.num_heads, s.world_model.embed_dim) == (2, 8, 512)
    assert (s.world_model.context_length, s.world_model.num_unroll_steps, s.replay.segment_length) == (8, 10, 200)
    assert (s.search.num_simulations, s.search.root_dirichlet_alpha, s.search.root_noise_weight) == (25, 0.3, 0.25)
    assert (s.search.pb_c_base, s.search.pb_c_init) == (19652, 1.25)
    assert (s.train.batch_size, s.train.update_per_collect, s.env.collector_env_num) == (64, 10, 4)
    assert (s.replay.buffer_size, s.replay.priority_prob_alpha, s.replay.priority_prob_beta) == (10_000, 0.6, 0.4)
    assert (s.llm.learning_rate, s.llm.llm_loss_weight, s.llm.rft_loss_weight) == (1e-6, 0.5, 0.3)
    assert (s.llm.prompt_max_len, s.llm.generate_max_len, s.llm.history_length) == (2048, 256, 5)
    assert (s.llm.micro_batch_size, s.llm.gradient_accumulation_steps, s.eval.every) == (4, 8, 500)
    assert (s.prior.attempts, s.prior.timeout_s, s.env.action_space_size) == (3, 30.0, 256)
    assert s.llm.path == "Qwen/Qwen2.5-0.5B-Instruct"
    q = resolve_settings(PRESETS["quick_test"])
    assert (q.search.num_simulations, q.replay.segment_length, q.train.batch_size) == (10, 50, 32)
    assert (q.train.update_per_collect, q.env.collector_env_num, q.llm.history_length) == (5, 2, 3)
    assert (q.llm.prompt_max_len, q.llm.generate_max_len) == (1024, 128)
    assert (q.llm.micro_batch_size, q.llm.gradient_accumulation_steps) == (2, 4)


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
def test_ding_form_there_and_back(make):
    main_config, create_config = make(env_id="detective.z5", seed=3, search={"num_simulations": 7})
    assert (main_config.env.env_id, main_config.seed) == ("detective.z5", 3)
    assert main_config.policy.search.num_simulations == 7
    assert create_config.policy.type == "priorzero"
    settings = from_ding_config(main_config)
    assert to_ding_config(settings)[0] == main_config
    main_config.policy.search.num_simulations = 0
    with pytest.raises(UserError, match=r"search.num_simulations=0 must be at least 1"):
        from_ding_config(main_config)


def test_what_the_presets_say():
    assert not config.get_config_pure_unizero()[0].policy.prior.enabled
    assert not config.get_config_llm_only_sft()[0].policy.llm.enable_rft
    assert config.get_config_with_lora()[0].policy.llm.use_lora


def test_staleness_and_takeovers_must_fit_together():
    resolve_settings({"vllm": {"sync_every": 3, "max_staleness": 2}})
    with pytest.raises(UserError, match=r"vllm\.max_staleness=1 must be at least 2: with vllm\.sync_every=3"):
        resolve_settings({"vllm": {"sync_every": 3}})
    with pytest.raises(UserError, match=r"vllm\.sleep=True leaves nobody to ask .*train\.overlap=never"):
        resolve_settings({"vllm": {"sleep": True}, "train": {"overlap": "always"}})


def test_overlap_can_be_typed():
    for value in ("auto", "always", "never"):
        assert resolve_settings(parse_assignments([f"train.overlap={value}"])).train.overlap == value


def test_vllm_must_take_the_prompts():
    with pytest.raises(UserError, match=r"vllm\.max_model_len=500 must be at least .* = 2304, or 0"):
        resolve_settings({"vllm": {"max_model_len": 500}})
