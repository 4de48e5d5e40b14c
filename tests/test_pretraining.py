"""Tests of the pretraining on walkthroughs."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from priorzero import pretrain
from priorzero.envs.walkthrough_steps import WalkthroughStep, write_steps
from priorzero.llm.adapter_files import PROMPT_SETTINGS
from priorzero.llm.engines import PriorBuilder, TransformersEngine
from priorzero.llm.models import load_language_model, load_tokenizer
from priorzero.llm.packing import PromptRow, split_completions
from priorzero.llm.prompts import prompt_style
from priorzero.pretraining import run as pretraining_run
from priorzero.pretraining.collect import collect
from priorzero.pretraining.data import (
    Decision,
    Episode,
    PromptMaker,
    SampleKey,
    TrainingData,
    load_episodes,
    num_batches,
    searched_decisions,
    training_batches,
    unsearched_decisions,
)
from priorzero.pretraining.evaluation import (
    Calibration,
    Outcome,
    completion_scores,
    figures,
    figures_by_game,
    fit_calibration,
    outcomes,
)
from priorzero.pretraining.games import (
    HELD_OUT,
    RESERVED,
    VALIDATION,
    PretrainingGame,
    jericho_games,
    textworld_games,
)
from priorzero.pretraining.plan import PretrainingPlan
from priorzero.pretraining.training import Pretrainer
from priorzero.types import UserError
from tests.helpers.models import make_settings, make_tiny_llm


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(make_settings().llm)


ACTIONS = ("close door", "go east", "go west", "open chest", "take lamp")
PROMPT = {"llm": {"prompt_layout": "walkthrough", "observation_chars": 40}}


def make_steps(game: str, *, searched=(0, 1, 2, 3)) -> list[WalkthroughStep]:
    """Five decisions. The last one changes nothing; its command is not a valid action."""
    return [
        WalkthroughStep(
            game=game,
            step=n,
            goal="",
            feedback=f"You are in room {n}.",
            look=f"Room {min(n, 4)}",
            inventory="nothing",
            score=float(n),
            max_score=5.0,
            moves=n,
            reward=0.0 if n == 4 else 1.0,
            command=action,
            action=action,
            valid_actions=ACTIONS if n in searched else None,
            correct=ACTIONS.index(action) if n in searched else None,
        )
        for n, action in enumerate(("go east", "open chest", "take lamp", "go west", "examine lamp"))
    ]


def make_episode(game: str = "game", **arguments) -> Episode:
    steps = make_steps(game, **arguments)
    return Episode(game, "train", tuple(steps), tuple(step.history_step() for step in steps))


def make_data(folder, *, train=("one", "two"), held_out=("three",)):
    for split, names in (("train", train), ("validation", ("four",)), ("held_out", held_out)):
        (folder / split).mkdir(parents=True)
        for name in names:
            write_steps(folder / split / f"{name}.jsonl", make_steps(name))
    return folder


# ---- games ----


def test_no_game_that_is_evaluated_is_learnt_from():
    games = jericho_games()
    stems = {game.env_id.split(".")[0]: game.split for game in games}
    assert all(stems[name] == "held_out" for name in HELD_OUT) and not set(RESERVED) & stems.keys()
    assert all(stems[name] == "validation" for name in VALIDATION)
    assert {name for name, split in stems.items() if split == "train"} >= {"905", "infidel", "trinity"}
    generated = textworld_games(train=3, held_out=2)
    assert len({game.env_id for game in generated}) == len(generated) == 6 * 5
    seeds = {int(game.env_id.rpartition("seed=")[2]) for game in generated}
    assert not seeds & {7, *range(101, 111), *range(201, 211)}


def test_games_that_are_evaluated_are_refused(tmp_path, capsys):
    data = make_data(tmp_path / "data", train=("zork1",))
    assert pretrain.main(["--data", str(data), "--no_collect", "--out", str(tmp_path / "out")]) == 2
    assert "zork1 is a game that agents are evaluated on" in capsys.readouterr().err


def test_collect_leaves_out_games_that_cannot_be_played(tmp_path):
    """TextWorld cannot generate the first game: the map does not permit a quest of this length."""
    games = [
        PretrainingGame("textworld:treasure-hunter?level=10&seed=5019", "train"),
        PretrainingGame("no-such-story.z5", "train"),
        PretrainingGame("textworld:coin-collector?level=3&seed=5001", "train"),
    ]
    collect(games, tmp_path)
    (episode,) = load_episodes(tmp_path, ["train"])
    assert (episode.game, len(episode.steps)) == ("textworld-coin-collector-level3-seed5001", 3)
    with pytest.raises(UserError, match="no-such-story"):
        collect(games[1:], tmp_path, require_all=True)


# ---- data ----


def test_decisions_are_split_by_what_is_known():
    episodes = [make_episode(), make_episode(searched=(0, 2))]
    assert [decision.step for decision in searched_decisions(episodes)] == [0, 1, 2, 3, 0, 2]
    assert [decision.step for decision in searched_decisions(episodes, per_game=2)] == [1, 3, 0, 2]
    # The last command of an episode may have ended the game.
    assert unsearched_decisions(episodes) == [Decision(0, 4), Decision(1, 1), Decision(1, 3), Decision(1, 4)]


def test_samples_have_the_correct_action_among_drawn_ones(tokenizer):
    llm = make_tiny_llm(tokenizer)
    style = prompt_style(make_settings(PROMPT))
    prompts = PromptMaker(llm, style, [make_episode(searched=(0, 2))])
    data = TrainingData(prompts, negatives=2, seed=0, borrow=1)

    def texts(key):
        sample = data[key]
        return [llm.tokenizer.decode(ids).strip() for ids in sample.row.completions], sample

    seen = set()
    for epoch in range(6):
        actions, sample = texts(SampleKey(Decision(0, 0), "actions", epoch))
        assert len(actions) == 3 and actions[sample.chosen] == "go east"
        assert sample.target_probs.tolist() == [float(k == sample.chosen) for k in range(3)]
        seen.add(tuple(actions))
    assert len(seen) > 1
    assert texts(SampleKey(Decision(0, 0), "actions", 1))[0] == texts(SampleKey(Decision(0, 0), "actions", 1))[0]
    assert texts(SampleKey(Decision(0, 1), "tokens", 0))[0] == ["open chest"]
    borrowed, sample = texts(SampleKey(Decision(0, 1), "actions", 0))
    assert borrowed[sample.chosen] == "open chest" and set(borrowed) < set(ACTIONS)
    assert set(texts(SampleKey(Decision(0, 4), "actions", 0))[0]) == {"examine lamp", "go west"}
    assert data.can_borrow(Decision(0, 4)) and not TrainingData(prompts, negatives=2, seed=0).can_borrow(Decision(0, 4))


def test_training_batches_contain_every_decision_once():
    searched, unsearched = [Decision(0, n) for n in range(10)], [Decision(1, n) for n in range(5)]
    batches = training_batches(searched, unsearched, batch_size=4, epoch=0, seed=1)
    assert len(batches) == num_batches(10, 5, batch_size=4) == 5
    assert all(len({key.objective for key in batch}) == 1 for batch in batches)
    assert sorted(key.decision for batch in batches for key in batch) == searched + unsearched
    assert batches == training_batches(searched, unsearched, batch_size=4, epoch=0, seed=1)
    assert batches != training_batches(searched, unsearched, batch_size=4, epoch=1, seed=1)


# ---- evaluation ----


def test_figures_are_those_of_the_correct_action():
    found = [
        Outcome("a", np.log([0.5, 0.3, 0.2]), 0),
        Outcome("a", np.log([0.5, 0.3, 0.2]), 2),
        Outcome("a", np.log([0.4, 0.4, 0.1, 0.1]), 1),
    ]
    assert figures(found) == pytest.approx(
        {
            "states": 3,
            "place": 5.5 / 3,
            "first": 1 / 3,
            "logprob": (np.log(0.5) + np.log(0.2) + np.log(0.4)) / 3,
            "uniform_place": 6.5 / 3,
            "uniform_first": 11 / 36,
            "uniform_logprob": -(2 * np.log(3) + np.log(4)) / 3,
        }
    )


def test_calibration_of_a_useless_prior_is_uniform_and_comes_from_other_games():
    wrong = [Outcome("a", np.log([0.9, 0.1]), 1), Outcome("a", np.log([0.1, 0.9]), 1)] * 3
    right = [Outcome("b", np.log([0.6, 0.4]), 0)] * 6
    assert fit_calibration(wrong).logprobs(wrong[0]) == pytest.approx(np.log([0.5, 0.5]), abs=0.1)
    assert fit_calibration(right).temperature < 1
    rows = figures_by_game([*wrong, *right])
    assert rows["a"]["calibrated_logprob"] < rows["a"]["logprob"]  # what suits the other game does not suit this one
    assert "calibrated_logprob" not in figures_by_game(right)["b"]
    assert Calibration(2.0, 0.5).logprobs(right[0])[0] == pytest.approx(
        math.log(0.25 + 0.5 * 0.6**0.5 / (0.6**0.5 + 0.4**0.5))
    )


# ---- training ----


def make_pretrainer(tokenizer, *, plan=None, seed=0, **llm):
    settings = make_settings(PROMPT, {"llm": {"learning_rate": 3e-3, "batch_size": 4, "micro_batch_size": 2, **llm}})
    return Pretrainer(
        make_tiny_llm(tokenizer, seed=seed),
        settings.llm,
        style=prompt_style(settings),
        temperature=1.0,
        plan=plan or PretrainingPlan(epochs=8, evaluations=1, negatives=2),
        training=[make_episode("one"), make_episode("two", searched=(0, 1))],
        evaluation=[make_episode("three")],
    )


def test_run_learns_what_the_walkthroughs_have_in_common(tokenizer):
    pretrainer = make_pretrainer(tokenizer)
    pretrainer.run(save=lambda: None)
    evaluations = pretrainer.progress.evaluations
    assert [entry["step"] for entry in evaluations][::2] == [0, pretrainer.num_steps] and len(evaluations) == 3
    before, after = (entry["games"]["three"] for entry in (evaluations[0], evaluations[-1]))
    assert after["logprob"] > before["logprob"] + 0.5 and after["place"] < before["place"]
    assert pretrainer.is_finished and pretrainer.progress.skipped == 0


def test_a_resumed_training_ends_with_the_same_parameters(tokenizer):
    plan = PretrainingPlan(epochs=2, evaluations=0)

    def parameters(pretrainer):
        return torch.cat([p.detach().ravel() for p in pretrainer.llm.model.parameters()])

    class Stop(Exception):
        pass

    whole = make_pretrainer(tokenizer, plan=plan)
    whole.run(save=lambda: None)
    first = make_pretrainer(tokenizer, plan=plan)
    learn = first._learn

    def learn_two(samples):
        if first.progress.step == 2:
            raise Stop
        return learn(samples)

    first._learn = learn_two
    with pytest.raises(Stop):
        first.run(save=lambda: None)
    second = make_pretrainer(tokenizer, plan=plan, seed=5)
    second.load_state_dict(first.state_dict())
    second.run(save=lambda: None)
    assert second.progress.step == whole.progress.step == whole.num_steps
    torch.testing.assert_close(parameters(second), parameters(whole))


def test_rate_rises_and_falls():
    plan = PretrainingPlan(warmup=0.1, decay="linear", final_rate=0.1)
    rates = [plan.rate(x) for x in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.02, 0.5, 1.0, 0.55, 0.1])
    assert dataclasses.replace(plan, decay="cosine").rate(0.55) == pytest.approx(0.55)
    assert dataclasses.replace(plan, decay="none").rate(0.9) == 1.0


def test_prompts_that_list_commands_are_not_trained_on_unknown_ones(tokenizer):
    pretrainer = make_pretrainer(tokenizer, list_commands=True)
    assert pretrainer.num_steps == 8 * 2  # 4 + 2 decisions among valid actions


# ---- the command line ----


def test_main_writes_an_adapter_that_llm_path_takes(tmp_path, tiny_llm_folder, capsys):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    arguments = ["--data", str(data), "--no_collect", "--out", str(out), "--device", "cpu", "--workers", "0"]
    arguments += [
        "--set",
        f"llm.path={tiny_llm_folder}",
        "--set",
        "llm.batch_size=4",
        "--set",
        "llm.micro_batch_size=4",
    ]
    arguments += ["--epochs", "1", "--evaluations", "0", "--save_dtype", "bfloat16"]
    assert pretrain.main(arguments) == 0, capsys.readouterr().err
    card = (out / "README.md").read_text()
    assert "| three | 4 |" in card and "| two | 5 | 4 | 4 |" in card and "--save_dtype bfloat16" in card
    content = json.loads((out / "figures.json").read_text())
    assert len(content["evaluations"]) == 2 and content["plan"]["epochs"] == 1
    assert not (out / "training_state.pt").exists()
    assert f"`--set llm.path={tiny_llm_folder} --set llm.adapter={out}`" in card
    prompt = json.loads((out / "prompt.json").read_text())["llm"]
    assert prompt == {name: content["llm"][name] for name in PROMPT_SETTINGS} and prompt["history"] == "loop_free"
    settings = make_settings({"llm": {"path": str(out), "use_lora": False}})
    llm = load_language_model(settings.llm, device=torch.device("cpu"))
    assert llm.has_merged_adapter
    assert pretrain.main(arguments) == 2
    assert "contains a pretraining already; give another --out" in capsys.readouterr().err


def test_main_resumes_a_training_that_was_stopped(tmp_path, tiny_llm_folder, capsys):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    arguments = ["--data", str(data), "--no_collect", "--out", str(out), "--device", "cpu", "--workers", "0"]
    arguments += [
        "--set",
        f"llm.path={tiny_llm_folder}",
        "--set",
        "llm.batch_size=4",
        "--set",
        "llm.micro_batch_size=4",
    ]
    assert pretrain.main([*arguments, "--minutes", "1e-9"]) == 0, capsys.readouterr().err
    assert (
        "Training: 0 of 8 batches of 4 (not finished; --minutes 1e-09 limits the time)"
        in (out / "README.md").read_text()
    )
    assert pretrain.main(arguments) == 2
    assert "contains a pretraining already; type --resume" in capsys.readouterr().err
    assert pretrain.main([*arguments, "--resume", "--epochs", "3"]) == 2
    assert "the saved training has 8 batches, this one 12" in capsys.readouterr().err
    assert pretrain.main([*arguments, "--resume"]) == 0
    assert "Training: 8 of 8 batches of 4," in (out / "README.md").read_text()
    assert not (out / "training_state.pt").exists()


def test_main_trains_an_adapter_further(tmp_path, tiny_llm_folder, capsys):
    """The third training begins with the figures of the second, which differ from those of the first."""
    data = make_data(tmp_path / "data")
    common = ["--data", str(data), "--no_collect", "--device", "cpu", "--workers", "0", "--evaluations", "0"]
    common += ["--set", "llm.batch_size=4", "--set", "llm.micro_batch_size=4", "--set", "llm.learning_rate=0.01"]
    starts = [[f"llm.path={tiny_llm_folder}"], [f"llm.path={tiny_llm_folder}", f"llm.adapter={tmp_path / 'out0'}"]]
    starts.append([f"llm.path={tmp_path / 'out1'}"])
    figures = []
    for n, start in enumerate(starts):
        out = tmp_path / f"out{n}"
        arguments = [*common, "--out", str(out), *(word for text in start for word in ("--set", text))]
        assert pretrain.main(arguments) == 0, capsys.readouterr().err
        evaluations = json.loads((out / "figures.json").read_text())["evaluations"]
        figures.append([evaluation["games"]["three"]["logprob"] for evaluation in evaluations])
        named = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == str(tiny_llm_folder)
    (before, first), (second, third), (fourth, _) = figures
    assert abs(first - before) > 0.01 and abs(third - second) > 0.01
    assert second == pytest.approx(first, abs=1e-4) and fourth == pytest.approx(third, abs=1e-4)
    assert pretrain.main([*common, "--out", str(tmp_path / "r"), "--set", "llm.lora_r=4", "--set", starts[2][0]]) == 2
    assert "type --set llm.lora_r=6 --set llm.lora_alpha=12 to continue" in capsys.readouterr().err


TRANSCRIPT = ["--out", "o", "--no_collect", "--set", "llm.prompt_layout=transcript"]
RANKED = [*TRANSCRIPT, "--set", "prior.mode=rank"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "o", "--epochs", "0"], "--epochs 0: give a number of at least 1"),
        (["--no_collect"], "--out is missing"),
        (["--out", ""], "--out is empty"),
        (["--out", "o", "--games", ","], "--games is empty"),
        (["--out", "o", "--minutes", "nan"], "--minutes nan: give a number of at least 0"),
        (["--out", "o", "--workers", "-1"], "--workers -1: give a number of at least 0"),
        (["--out", "o", "--no_collect", "--set", "llm.memory_lines=3"], "llm.memory_lines=3: walkthroughs have no"),
        (["--out", "o", "--data", "nowhere", "--no_collect"], "contains no games; type python -m priorzero.pretrain"),
        (RANKED, "pretraining is for priors that score the valid actions; type --set prior.mode=score"),
        ([*TRANSCRIPT, "--set", "prior.use_cot=true"], "solutions contain no thoughts; type --set prior.use_cot=false"),
        (["--out", "o", "--no_collect", "--resume", "--data", "data", "--device", "cpu"], "training_state.pt does not"),
        (["--out", "o", "--no_collect", "--data", "data", "--games", "five"], "--games five: not in"),
    ],
)
def test_main_reports_wrong_arguments(tmp_path, monkeypatch, tokenizer, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data")
    monkeypatch.setattr(pretraining_run, "load_language_model", lambda cfg, *, device: make_tiny_llm(tokenizer))
    assert pretrain.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_outcomes_are_the_priors_of_the_engine(tokenizer):
    """The evaluation must measure what an agent gets."""
    llm = make_tiny_llm(tokenizer)
    style = prompt_style(make_settings(PROMPT))
    prompts = PromptMaker(llm, style, [make_episode()])
    decisions = searched_decisions(prompts.episodes)
    engine = TransformersEngine(PriorBuilder(llm, style), rows_per_forward=1, prompt_cache_tokens=0)
    priors = asyncio.run(engine.priors([prompts.request(decision) for decision in decisions]))
    for rows_per_forward in (1, 3):
        found = outcomes(llm, prompts, decisions, rows_per_forward=rows_per_forward)
        for outcome, prior in zip(found, priors, strict=True):
            assert outcome.logprobs == pytest.approx(prior.logprobs, abs=1e-4)
    padded = outcomes(dataclasses.replace(llm, pads_rows=True), prompts, decisions, rows_per_forward=4)
    for outcome, prior in zip(padded, priors, strict=True):
        assert outcome.logprobs == pytest.approx(prior.logprobs, abs=1e-4)


class LittleMemory:
    """A language model on a GPU whose memory suffices for ``limit`` rows at a time."""

    def __init__(self, llm, limit):
        self.llm, self.limit, self.sizes = llm, limit, []

    def token_logprobs(self, rows):
        self.sizes.append(len(rows))
        if len(rows) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.llm.token_logprobs(rows)


@torch.no_grad()
def test_completion_scores_splits_the_rows_if_the_memory_is_too_small(tokenizer):
    llm = make_tiny_llm(tokenizer)
    rows = [PromptRow([5, 6, n], [[1, 2, n], [4]]) for n in range(5)]
    small = LittleMemory(llm, 2)
    scores = completion_scores(small, rows)
    assert small.sizes == [5, 2, 3, 1, 2]
    expected = split_completions(*llm.token_logprobs(rows[:5]))
    assert len(scores) == 10
    for got, want in zip(scores, expected, strict=True):
        assert got == pytest.approx(want, abs=1e-5)
    with pytest.raises(UserError, match="out of GPU memory while one state"):
        completion_scores(LittleMemory(llm, 0), rows)
