"""Exporting a trained agent: the models are those of the checkpoint, the card states what was trained and measured."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError

from priorzero import evaluate
from priorzero.agent import make_evaluators
from priorzero.entry import build_parser, settings_from
from priorzero.export import main
from priorzero.exporting.llm import write_llm
from priorzero.exporting.run import plan_export
from priorzero.llm import hub
from priorzero.llm.models import load_language_model
from priorzero.play.prior_weights import PriorWeights
from priorzero.policy import PriorZeroPolicy
from priorzero.preflight import prepare_agent
from priorzero.runs.checkpoint import read_checkpoint, save_checkpoint
from priorzero.runs.exported import read_play_state
from priorzero.runs.saved import agent_settings, find_agent
from priorzero.saved_agent import loaded_agent
from priorzero.saved_world_model import load_world_model
from priorzero.search.base import Root
from priorzero.types import UserError
from tests.helpers.folders import contents
from tests.helpers.models import make_settings
from tests.helpers.runs import NO_LLM, lines, restored_threads, short_settings, train
from tests.helpers.toy_game import toy_games

LAYER = {
    "run": {"env_id": "toy,coins", "max_iter": 4},
    "prior": {"prompt_cache_tokens": 0},  # the cache may change the last digits
    "llm": {"memory_lines": 3, "learning_rate": 1e-2},
    "eval": {"every": 2, "episodes": 2, "unseen": "other"},
}


def run_of(folder, *layers):
    with toy_games():
        return train(short_settings(folder, LAYER, *layers)).folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llm_folder):
    """A run that trained all parameters of the LLM."""
    return run_of(tmp_path_factory.mktemp("full"), {"llm": {"path": str(tiny_llm_folder)}})


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, tiny_llm_folder):
    """A run that trained an adapter of the LLM."""
    return run_of(tmp_path_factory.mktemp("lora"), {"llm": {"path": str(tiny_llm_folder), "use_lora": True}})


@pytest.fixture(scope="module")
def run_without_llm(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("no_llm"), NO_LLM, {"eval": {"unseen": ""}})


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("exported") / "agent")


def export(where, out, *flags):
    before = contents(Path(where))
    assert main([str(where), "--to", str(out), *flags]) == 0
    assert contents(Path(where)) == before, "the export has changed the run"
    return out


def refused(capsys, *arguments):
    """The message with which the command line refuses the arguments."""
    assert main([str(argument) for argument in arguments]) == 2
    [message] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return message


def checkpoint_of(run):
    return run / "checkpoints" / "iteration_4"


def llm_logits(folder):
    """Logits of a plain transformers model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(20, 40)[None]).logits


# ---- the world model ----


@pytest.mark.slow
def test_load_world_model_gives_the_predictions_of_the_checkpoint_in_every_bit(run, exported):
    settings = read_checkpoint(checkpoint_of(run)).settings
    policy = PriorZeroPolicy(settings, feature_size=384 * 3 + 128, device="cpu", llm=None)
    rng = np.random.default_rng(0)
    features, actions = rng.standard_normal((2, policy.lightzero_config.model.observation_shape)), np.array([1])
    features = features.astype(np.float32)
    root = Root(features, actions, legal_actions=np.arange(3))

    def predictions(inference):
        contexts = inference.root_contexts([root])
        children, rewards = inference.step(contexts, np.array([2]))
        return [*inference.predict(contexts), *inference.predict(children), rewards]

    with torch.no_grad():
        policy.network.eval()
        untrained = predictions(policy.inference)
        state = torch.load(checkpoint_of(run) / "world_model.pt", weights_only=True)
        policy.load_world_model_state(state)
        expected = predictions(policy.inference)
        for where in (exported, checkpoint_of(run), run):
            loaded = load_world_model(where)
            assert all(map(np.array_equal, predictions(loaded.inference), expected))
            policy_logits, value = loaded.predict(features, actions)
            assert np.array_equal(policy_logits, expected[0][0]) and value == expected[1][0]
    assert not np.array_equal(untrained[0], expected[0])
    parameters = load_world_model(exported).network.state_dict()
    assert parameters.keys() == state.keys() and all(torch.equal(parameters[name], state[name]) for name in state)
    vocabulary = json.loads((checkpoint_of(run) / "actions.json").read_text())
    assert load_world_model(exported).vocabulary.state_dict() == vocabulary and len(vocabulary["actions"]) > 3
    assert load_world_model(exported).make_encoder().feature_size == loaded.feature_size


@pytest.mark.slow
def test_load_world_model_reads_a_cache_of_downloads_but_no_damaged_folder(exported, tmp_path):
    """The files in the hub's cache are links, and the hub adds files. The owner of a repository may edit the card."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file in exported.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    shutil.copytree(exported / "llm", folder / "llm")
    (folder / "README.md").unlink()
    (folder / "README.md").write_text("edited")
    (folder / ".gitattributes").write_text("")
    assert load_world_model(folder).vocabulary.num_used > 3
    (folder / "world_model.safetensors").unlink()
    (folder / "world_model.safetensors").write_bytes((exported / "world_model.safetensors").read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"world_model.safetensors has a wrong checksum"):
        load_world_model(folder)
    edited = json.loads((exported / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps({**edited, "export_format": 99}))
    with pytest.raises(UserError, match="its format is 99, this version of priorzero reads format 1"):
        load_world_model(folder)


# ---- the LLM ----


@pytest.mark.slow
def test_export_writes_a_model_that_transformers_and_llm_path_load(run, exported, tiny_llm_folder):
    expected = llm_logits(checkpoint_of(run) / "llm")
    assert torch.equal(llm_logits(exported / "llm"), expected)
    assert (llm_logits(tiny_llm_folder) - expected).abs().max() > 0.1, "training has not changed the LLM"
    logprobs = [
        llm.token_logprobs([llm.row("Go", [" north", " south"], end_of_turn=True)])[0]
        for folder in (exported, checkpoint_of(run))
        for llm in [load_language_model(make_settings({"llm": {"path": str(folder / "llm")}}).llm, device=CPU)]
    ]
    assert torch.equal(*logprobs)
    assert {file.stat().st_mode & 0o777 for file in (exported / "llm").iterdir()} == {0o644}


CPU = torch.device("cpu")


@pytest.mark.slow
def test_export_merges_an_adapter_or_keeps_it(lora_run, tmp_path, tiny_llm_folder):
    with_adapter = llm_logits(checkpoint_of(lora_run) / "llm")  # transformers loads it together with its base model
    base = llm_logits(tiny_llm_folder)
    assert (with_adapter - base).abs().max() > 0.1, "training has not changed the adapter"
    merged = export(lora_run, tmp_path / "merged")
    assert not (merged / "llm" / "adapter_config.json").exists()
    assert (llm_logits(merged / "llm") - with_adapter).abs().max() < 1e-4
    kept = export(lora_run, tmp_path / "kept", "--llm", "adapter")
    assert torch.equal(llm_logits(kept / "llm"), with_adapter)
    assert (kept / "llm" / "adapter_model.safetensors").stat().st_size < 1e6 and not (
        kept / "llm" / "README.md"
    ).exists()
    named = export(lora_run, tmp_path / "named", "--llm", "adapter", "--base_model", "someone/base", "--license", "mit")
    assert json.loads((named / "llm" / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/base"
    metadata = ModelCard.load(named / "README.md").data
    assert (metadata.base_model, metadata.license) == ("someone/base", "mit")
    llm = load_language_model(make_settings({"llm": {"path": str(kept / "llm")}}).llm, device=CPU)
    with torch.no_grad():
        assert (llm.model(torch.arange(20, 40)[None]).logits - with_adapter).abs().max() < 1e-4


# ---- everything else of the agent ----


@pytest.mark.slow
def test_export_contains_the_weights_of_the_prior_and_the_memory(run, exported):
    checkpoint = read_checkpoint(checkpoint_of(run))
    collector = torch.load(checkpoint.folder / "training.pt", weights_only=True)["collector"]
    state = read_play_state(exported, json.loads((exported / "manifest.json").read_text()))
    weights = PriorWeights("auto", floor=0.01)
    weights.load_state_dict(state.prior_weights_state)
    expected = PriorWeights("auto", floor=0.01)
    expected.load_state_dict(collector["prior_weights"])
    assert all(np.array_equal(weights.of_game(game), expected.of_game(game)) for game in ("toy", "coins", "other"))
    assert any(weight != 0.5 for game in ("toy", "coins") for weight in weights.of_game(game))
    assert state.memories == dict(zip(("toy", "coins"), collector["memories"], strict=True)) and state.memories["toy"]
    assert state == read_play_state(checkpoint.folder, checkpoint.manifest)


@pytest.mark.slow
def test_export_plays_as_the_checkpoint(run, exported):
    """Also with the LLM as an adapter, see ``test_export_merges_an_adapter_or_keeps_it``."""

    async def play():
        async with loaded_agent(prepare_agent(exported)) as saved:
            evaluators = make_evaluators(saved.settings, games=saved.trained, unseen=saved.unseen, player=saved.player)
            return await evaluators.evaluate(saved.memories)

    with toy_games(), restored_threads():
        results = asyncio.run(play())
    found = lines(run, "evaluations.jsonl")
    last = max(line["env_step"] for line in found)
    assert [
        {"env_step": last, "game": game, "unseen": unseen, **evaluation.results()}
        for (_, unseen), of_games in results.items()
        for game, evaluation in of_games.items()
    ] == [line for line in found if line["env_step"] == last]


@pytest.mark.slow
def test_export_of_an_agent_without_an_llm(run_without_llm, run, tmp_path, capsys):
    out = export(run_without_llm, tmp_path / "agent")
    alone = export(run, tmp_path / "alone", "--llm", "none")
    for folder in (out, alone):
        assert not (folder / "llm").exists() and "from_pretrained" not in (folder / "README.md").read_text()
        assert ("priorzero.evaluate" in (folder / "README.md").read_text()) == (folder == out)
        assert load_world_model(folder).predict(np.zeros((1, 384 * 3 + 128), np.float32))[0].shape == (256,)
    assert "The run used no LLM." in (out / "README.md").read_text()
    with pytest.raises(UserError, match="this agent was exported without its LLM, so it cannot play"):
        agent_settings(find_agent(alone))
    assert not agent_settings(find_agent(out)).prior.enabled
    assert "has no LLM (prior.enabled=false)" in refused(
        capsys, run_without_llm, "--to", tmp_path / "new", "--llm", "merged"
    )


@pytest.mark.slow
def test_export_of_a_run_on_a_ray_cluster(run, tmp_path):
    """Its checkpoints have no training state, and do not name the files of the games."""
    source = checkpoint_of(run)
    checkpoint = tmp_path / "cluster" / "checkpoints" / "iteration_4"
    save_checkpoint(
        checkpoint,
        write=lambda folder: shutil.copytree(
            source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("training.pt", "manifest.json")
        ),
        about={"counters": read_checkpoint(source).manifest["counters"]},
    )
    out = export(checkpoint, tmp_path / "agent")
    assert torch.equal(llm_logits(out / "llm"), llm_logits(source / "llm"))
    assert np.array_equal(*(load_world_model(f).predict(np.zeros((1, 1280), np.float32))[0] for f in (out, source)))
    card = (out / "README.md").read_text()
    assert "| toy | `toy` | not recorded |" in card and "python -m priorzero.ray_entry --config" in card
    assert "trained by PPO" in card and "The run was not evaluated before" in card


# ---- the card ----


@pytest.mark.slow
def test_card_states_the_last_evaluation_before_the_checkpoint(run, exported):
    metadata = ModelCard.load(exported / "README.md").data
    assert metadata.library_name == "priorzero" and metadata.license is None and metadata.base_model is None
    found = lines(run, "evaluations.jsonl")
    last = [line for line in found if line["env_step"] == max(line["env_step"] for line in found)]
    assert 0 < len(last) < len(found)
    results = {(result.dataset_name, result.metric_name): result.metric_value for result in metadata.eval_results}
    assert results == {
        (line["game"], f"mean score over 2 episodes, {line['mode']}"): sum(line["scores"]) / 2 for line in last
    }
    card = (exported / "README.md").read_text()
    assert f"at environment step {last[0]['env_step']}, without exploration. The games have the seed 10000 " in card
    assert "(run.seed plus 10000, one for each environment; games without chance ignore it)." in card
    for line in last:
        cells = [line["game"], "no" if line["unseen"] else "yes", 2, f"{sum(line['scores']) / 2:g}"]
        assert f"(`{line['mode']}`) | {' | '.join(map(str, cells))} | {max(line['scores']):g} | 5 |" in card
    games = read_checkpoint(checkpoint_of(run)).manifest["games"]
    assert [f"| {name} | `{name}` | {md5} |" in card for name, md5 in games.items()] == [True, True]


@pytest.mark.slow
def test_card_of_an_earlier_checkpoint_has_earlier_figures(tmp_path, tiny_llm_folder, run):
    """Also if the run was copied without its evaluations, which the card then says."""
    found = lines(run, "evaluations.jsonl")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    later = [{**found[0], "env_step": found[-1]["env_step"] + 10, "scores": [4.0, 5.0], "wall_s": 1.0}]
    with (copy / "evaluations.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in later)
    card = (export(copy, tmp_path / "first", "--llm", "none") / "README.md").read_text()
    assert f"at environment step {found[-1]['env_step']}," in card and "4.5" not in card
    (copy / "evaluations.jsonl").unlink()
    card = (export(copy, tmp_path / "second", "--llm", "none") / "README.md").read_text()
    assert "The run was not evaluated before" in card and "model-index" not in card


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_card_has_code_that_runs_in_the_folder(lora_run, tmp_path, monkeypatch, form):
    out = export(lora_run, tmp_path / "agent", "--llm", form)
    monkeypatch.chdir(out)
    blocks = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and names["policy_logits"].shape == (256,)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert (names["model"](ids).logits - llm_logits(checkpoint_of(lora_run) / "llm")).abs().max() < 1e-4
    assert names["tokenizer"].chat_template


@pytest.mark.slow
def test_card_has_commands_that_are_valid(run, exported):
    commands = re.findall(r"```bash\n(.*?)\n```", (exported / "README.md").read_text())
    arguments = [command.replace("FOLDER", str(exported)).split()[2:] for command in commands]
    assert [own[0] for own in arguments] == ["priorzero.evaluate", "priorzero.entry", "priorzero.entry"]
    assert evaluate.build_parser().parse_args(arguments[0][1:]).agent == str(exported)
    first, second = (settings_from(build_parser().parse_args(own[1:])) for own in arguments[1:])
    saved = read_checkpoint(checkpoint_of(run)).settings
    assert first.llm.path == str(exported / "llm") and first.run.env_id == "GAME"
    saved.run.output_dir, saved.run.exp_name = "./data_priorzero", ""
    assert second == saved


def test_export_names_story_files_without_their_folder(tmp_path):
    checkpoint = SimpleNamespace(
        settings=make_settings(
            {
                "run": {
                    "env_id": "/home/me/zork1.z5, textworld:simple?seed=7, textworld:file=/home/me/secret/my.z8",
                    "output_dir": "/home/me/runs",
                },
                "eval": {"unseen": "textworld:file=/home/me/other.z8, textworld:file=third.ulx"},
            }
        ),
        manifest={"games": {"zork1": "1", "textworld-simple-seed7": "2", "textworld-my": "3"}, "files": {}},
    )
    from priorzero.exporting.plan import ExportPlan

    plan = ExportPlan(checkpoint, tmp_path, "none", "")
    assert plan.env_ids == ["zork1.z5", "textworld:simple?seed=7", "textworld:file=my.z8"]
    assert plan.settings.eval.unseen == "textworld:file=other.z8,textworld:file=third.ulx"
    assert "/home/me" not in yaml.safe_dump(plan.settings.model_dump())


# ---- bad input ----


@pytest.mark.slow
def test_export_refuses_bad_input_and_writes_nothing(run, exported, tmp_path, capsys, monkeypatch):
    new = tmp_path / "new"
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    before = contents(tmp_path)
    for arguments, words in (
        ((tmp_path / "nothing", "--to", new), "there is no such folder"),
        ((tmp_path / "full", "--to", new), "it has no checkpoint"),
        ((exported, "--to", new), "is an exported agent already; to upload it, type hf upload USER/NAME"),
        ((run, "--to", tmp_path / "full"), "this folder is not empty; give a new folder"),
        ((run, "--to", tmp_path / "file"), "is a file; give another folder"),
        ((run, "--to", tmp_path / "file" / "new"), "is a file; give another folder"),
        ((run, "--to", ""), "--to is empty; give a path"),
        ((run, "--to", new, "--llm", "adapter"), "has no adapter (llm.use_lora=false); leave --llm out"),
        ((run, "--to", new, "--license", ""), "--license is empty"),
        ((run, "--to", new, "--llm", "none", "--base_model", "a/b"), "no LLM is exported; leave --base_model out"),
        ((run, "--to", new, "--private"), "--private has no effect without --push USER/NAME"),
        ((run, "--to", new, "--push", "agent"), "--push agent: this is not a name on the hub; give USER/NAME"),
        ((run, "--to", new, "--push", "a--b/c"), "this is not a name on the hub; give USER/NAME"),
    ):
        assert words in refused(capsys, *arguments)
    monkeypatch.setattr("priorzero.runtime.paths.shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, free=1000))
    assert "0 MB are free, but the export needs about" in refused(capsys, run, "--to", new)
    assert contents(tmp_path) == before and not new.exists()


def test_plan_export_refuses_a_folder_inside_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "iteration_2").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    (run / "checkpoints" / "iteration_2" / "manifest.json").write_text("{}")
    (tmp_path / "link").symlink_to(run / "checkpoints")
    for to, words in (
        (run / "checkpoints" / "iteration_2" / "x" / "y", "iteration_2 is a checkpoint or an exported agent"),
        (run / "checkpoints" / "x", "checkpoints contains the checkpoints of a run"),
        (tmp_path / "link" / "x", "checkpoints contains the checkpoints of a run"),
        (run / "x", "there is no such folder"),  # the folder is allowed; the run is refused
        (tmp_path / "checkpoints" / "x", "there is no such folder"),
    ):
        with pytest.raises(UserError, match=words):
            plan_export(str(tmp_path / "nothing"), to=str(to))


@pytest.mark.parametrize("licence", ["foo bar", "mit\n", "-mit", "a/b", "é", "mit: x"])
def test_plan_export_refuses_a_licence_that_is_no_identifier(tmp_path, licence):
    with pytest.raises(UserError, match=r"--license .*: give one identifier of letters, digits"):
        plan_export(str(tmp_path), to=str(tmp_path / "new"), licence=licence)
    with pytest.raises(UserError, match="it has no checkpoint"):
        plan_export(str(tmp_path), to=str(tmp_path / "new"), licence="apache-2.0")


@pytest.mark.slow
def test_export_names_the_missing_base_model_of_an_adapter(lora_run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(lora_run, copy)
    config = checkpoint_of(copy) / "llm" / "adapter_config.json"
    edited = {**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "gone")}
    checkpoint = checkpoint_of(copy)

    def write(folder):
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        (folder / "llm" / "adapter_config.json").write_text(json.dumps(edited))

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    save_checkpoint(checkpoint, write=write, about={name: manifest[name] for name in ("counters", "games")})
    assert "the base model of this adapter cannot be used" in refused(capsys, copy, "--to", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    export(copy, tmp_path / "new", "--llm", "adapter")


@pytest.mark.slow
def test_export_runs_code_of_a_base_model_only_if_the_user_trusts_it(lora_run, run, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "run"
    for source, target in ((lora_run, copy), (run, tmp_path / "full")):
        shutil.copytree(source, target)
        for checkpoint in (target / "checkpoints").iterdir():
            rewrite(checkpoint, llm={"trust_remote_code": True})
    trusted = []

    def load(cfg, *, device):
        trusted.append(cfg.trust_remote_code)
        return load_language_model(cfg, device=device)

    monkeypatch.setattr("priorzero.llm.models.load_language_model", load)
    message = refused(capsys, copy, "--to", tmp_path / "new")
    assert "its configuration runs code that comes with a model" in message
    assert message.endswith("if you trust it, type --trust_remote_code") and not (tmp_path / "new").exists()
    export(copy, tmp_path / "new", "--trust_remote_code")
    export(lora_run, tmp_path / "other")
    assert trusted == [True, False]
    export(copy, tmp_path / "kept", "--llm", "adapter")  # these forms load no model
    export(tmp_path / "full", tmp_path / "whole")
    assert trusted == [True, False]
    # The default does not depend on the checkpoint.
    write_llm(read_checkpoint(checkpoint_of(copy)), tmp_path / "merged", form="merged", base="")
    assert trusted == [True, False, False]


def rewrite(checkpoint, **changes):
    """Change settings in a checkpoint, with new checksums, as someone who passes it on could."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    for group, values in changes.items():
        config[group] |= values

    def write(folder):
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

    save_checkpoint(checkpoint, write=write, about={name: manifest[name] for name in ("counters", "games")})


@pytest.mark.slow
def test_export_does_not_publish_a_file_that_a_link_in_a_checkpoint_names(run, tmp_path, capsys):
    (tmp_path / "secret").write_text("my key")
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_of(run), checkpoint)
    (checkpoint / "llm" / "notes.txt").symlink_to(tmp_path / "secret")  # the manifest does not name it
    words = "it contains a link to a file outside of the folder: llm/notes.txt"
    assert words in refused(capsys, checkpoint, "--to", tmp_path / "new") and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_export_uses_the_newest_intact_checkpoint(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert [path.name for path in (copy / "checkpoints").iterdir()] != ["iteration_4"]
    (checkpoint_of(copy) / "world_model.pt").write_bytes(b"x")
    assert "world_model.pt has a wrong checksum" in refused(capsys, checkpoint_of(copy), "--to", tmp_path / "new")
    out = export(copy, tmp_path / "new", "--llm", "none")
    assert json.loads((out / "manifest.json").read_text())["source"] == "iteration_3"
    assert "cannot be used" in capsys.readouterr().err


@pytest.mark.slow
def test_export_that_fails_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty~").mkdir()
    (tmp_path / "empty~" / "mine.txt").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr("priorzero.exporting.run.write_llm", full_disk)
        message = refused(capsys, run, "--to", tmp_path / "empty")
    assert "a file cannot be read or written ([Errno 28] No space left on device); nothing of the export remains" in (
        message
    )
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "empty~", "mine.txt"]
    export(run, tmp_path / "empty", "--llm", "none")
    assert (tmp_path / "empty~" / "mine.txt").exists()


# ---- the hub ----


class FakeApi:
    """The requests of ``huggingface_hub.HfApi`` that an upload needs."""

    def __init__(self, *, files=None, private=False, error=None):
        self.files, self.private, self.error = files, private, error  # files None: the repository does not exist
        self.calls = []

    def whoami(self):
        if self.error is not None:
            raise self.error
        return {"name": "me", "orgs": [{"name": "lab"}]}

    def repo_exists(self, repo_id):
        return self.files is not None

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private)

    def list_repo_files(self, repo_id):
        return [".gitattributes", *self.files]

    def create_repo(self, repo_id, **kwargs):
        private, exist_ok = kwargs["private"], kwargs["exist_ok"]
        inspect.signature(HfApi.create_repo).bind(self, repo_id, **kwargs)
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **kwargs):
        inspect.signature(HfApi.upload_folder).bind(self, **kwargs)
        uploaded = contents(kwargs["folder_path"]).keys()
        self.calls.append(("upload_folder", kwargs["repo_id"], uploaded, kwargs["delete_patterns"]))


@pytest.fixture
def online(monkeypatch):
    """A machine with a token, and a hub that answers as the returned :class:`FakeApi`."""
    api = FakeApi()
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    monkeypatch.setattr(hub, "hub_api", lambda: api)
    return api


@pytest.mark.slow
def test_push_uploads_the_folder_and_prints_the_address(run, tmp_path, online, capsys):
    out = export(run, tmp_path / "agent", "--llm", "none", "--push", "lab/agent", "--private")
    assert capsys.readouterr().out == f"{out}\nhttps://huggingface.co/lab/agent\n"
    create, uploaded = online.calls
    assert create == ("create_repo", "lab/agent", True, True)
    assert uploaded == ("upload_folder", "lab/agent", contents(out).keys(), "*")
    assert 'huggingface_hub.snapshot_download("lab/agent")' in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("push", "private", "changes", "words"),
    [
        ("me/agent", False, {}, None),
        ("me/agent", False, {"files": []}, None),
        ("me/agent", True, {"files": ["world_model.safetensors"], "private": True}, None),
        ("you/agent", False, {}, "the token belongs to me, lab, not to you; give me/NAME"),
        ("me/agent", True, {"files": ["world_model.safetensors"]}, "this repository exists and is public"),
        ("me/agent", False, {"files": list("ab")}, r"contains 2 files, which are not from an export \(a, b\); give"),
        ("me/agent", False, {"files": list("abcd")}, r"contains 4 files, which are not .* \(a, b, c, \.\.\.\); give"),
        (
            "me/agent",
            False,
            {"error": ConnectionError("no route")},
            r"cannot be reached \(no route\); check the network",
        ),
    ],
)
def test_check_upload_asks_the_hub_first(online, push, private, changes, words):
    vars(online).update(changes)
    expected = contextlib.nullcontext() if words is None else pytest.raises(UserError, match=words)
    with expected:
        hub.check_upload(push, private=private, marker="world_model.safetensors")
    assert online.calls == []


def test_check_upload_says_what_to_do_about_an_invalid_token(online):
    online.error = HTTPError("401 Unauthorized")
    online.error.response = SimpleNamespace(status_code=401)
    with pytest.raises(UserError, match=r"refuses the request \(401 Unauthorized\); type hf auth login, with a token"):
        hub.check_upload("me/agent", private=False, marker="x")


@pytest.mark.slow
def test_push_without_token_or_network_writes_nothing(run, tmp_path, online, monkeypatch, capsys):
    arguments = (run, "--to", tmp_path / "agent", "--push", "me/agent")
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.get_token", lambda: None)
        assert "no access token is stored on this machine; type hf auth login" in refused(capsys, *arguments)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
        assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids to upload" in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == [] and online.calls == []


@pytest.mark.slow
def test_push_that_fails_keeps_the_folder_and_says_how_to_try_again(run, tmp_path, online, monkeypatch, capsys):
    def upload_folder(**_):
        raise HTTPError("connection lost")

    monkeypatch.setattr(online, "upload_folder", upload_folder)
    out = tmp_path / "agent"
    message = refused(capsys, run, "--to", out, "--llm", "none", "--push", "me/agent")
    assert "the upload failed (connection lost)" in message and f"type hf upload me/agent {out} ." in message
    assert load_world_model(out).vocabulary.num_used > 3
