"""The benchmarks: both implementations give the same results, and differences are detected."""

from __future__ import annotations

import dataclasses
import itertools
import json

import bench_llm
import bench_loop
import bench_prior
import bench_prompts
import bench_search
import bench_tools
import benchmark_prior
import check_world_model
import compare_llm_losses
import numpy as np
import profile_quick_test
import pytest
import sweep_pretraining
from bench_tools import Row

from priorzero.config import read_config_file, resolve_settings
from priorzero.llm.models import load_tokenizer
from priorzero.llm.packing import PromptRow
from priorzero.llm.prompts import prompt_style
from tests.helpers.models import make_settings, make_tiny_llm
from tests.helpers.records import record


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(make_settings().llm)


# ---- benchmarks ----


def test_learn_one_row_per_action_gives_the_same_gradient(tokenizer):
    llm = make_tiny_llm(tokenizer)
    learner, gradient = bench_llm.make_sft_learner(llm, top=5)
    samples, skipped = learner.samples(bench_llm.make_records(llm, states=3, tokens=60), np.zeros(3))
    assert skipped == 0 and {len(sample.row.completions) for sample in samples} == {5}
    # Prompts of different lengths, so that a micro-batch of 2 rows contains padding.
    shorter = dataclasses.replace(samples[1].row, prompt_ids=samples[1].row.prompt_ids[7:])
    samples[1] = dataclasses.replace(samples[1], row=shorter)
    ours = learner.learn(samples)["sft_loss"]
    our_gradient = list(gradient)
    assert bench_llm.learn_one_row_per_action(learner, samples) == pytest.approx(ours, rel=1e-5)
    assert bench_llm.relative_difference(our_gradient, gradient) < 1e-5
    assert learner.learn(samples)["sft_loss"] == pytest.approx(ours, rel=1e-7)  # the parameters have not changed
    samples[0] = dataclasses.replace(samples[0], target_probs=np.roll(samples[0].target_probs, 1))
    bench_llm.learn_one_row_per_action(learner, samples)
    assert bench_llm.relative_difference(our_gradient, gradient) > 1e-3


def make_llm_rows(monkeypatch, tokenizer):
    """The rows and tables of short episodes with short prompts and a small model."""
    monkeypatch.setattr(bench_llm, "EPISODE_STEPS", 6)
    monkeypatch.setattr(bench_llm, "prompt_cases", lambda: {"short": make_settings()})
    return bench_llm.decisions_rows(make_tiny_llm(tokenizer), rate=1e9, float64=True)


def test_decisions_rows_compare_the_tree_with_one_decision_at_a_time(tokenizer, monkeypatch):
    (row,), tables = make_llm_rows(monkeypatch, tokenizer)
    found = tables["relative differences"]["short"]
    assert row.equal and 0 < found["gradient"] < 1e-5
    assert 0 < found["ours | float64"] < 1e-5 and 0 < found["ref. | float64"] < 1e-5
    tokens = tables["tokens"]["short"]
    assert tokens["tree"] < tokens["one at a time"] < tokens["row per action"]
    assert tokens["ratio"] == tokens["one at a time"] / tokens["tree"]
    per_pass = list(tables["tokens of a forward pass"].values())
    assert [figures["forward passes"] for figures in per_pass] == [32, 16, 8, 4]
    assert all(more["sum"] < fewer["sum"] for fewer, more in itertools.pairwise(per_pass))


def test_decisions_rows_detect_a_wrong_gradient(tokenizer, monkeypatch):
    losses = bench_llm.LLMLearner._losses

    def wrong(self, micro_batch):  # only if the decisions are packed
        return {name: (1 + 1e-4 * (len(micro_batch) > 1)) * loss for name, loss in losses(self, micro_batch).items()}

    monkeypatch.setattr(bench_llm.LLMLearner, "_losses", wrong)
    (row,), tables = make_llm_rows(monkeypatch, tokenizer)
    assert not row.equal
    found = tables["relative differences"]["short"]
    assert found["gradient"] == pytest.approx(1e-4, rel=0.05) == found["ours | float64"]
    assert found["ref. | float64"] < 1e-5


def test_prompt_cases_have_the_walkthrough_prompts_of_the_textworld_results():
    from_file = resolve_settings(read_config_file(bench_tools.ROOT / "configs" / "learning_textworld.yaml"))
    assert prompt_style(bench_llm.prompt_cases()["walkthrough"]) == prompt_style(from_file)


def test_token_figures():
    """Hand-counted: the last token of a completion is not packed, and the common prefixes are packed once."""
    first = PromptRow([1, 2, 3, 4], [[5, 6], [5, 7, 8]])  # 4 + the nodes 5 and 7
    second = PromptRow([1, 2, 9], [[5], [6, 6]])  # 3 + the node 6; it shares two tokens with the first
    samples = [bench_llm.LLMSample(row, np.array([0.5, 0.5]), 0, 0.0, 0.0) for row in (first, second)]
    figures = bench_llm.token_figures(samples, [samples, samples[:1]])
    assert (figures["tree"], figures["one at a time"], figures["row per action"]) == (8, 10, 6 + 7 + 4 + 5)
    assert (figures["ratio"], figures["mean ratio"]) == (10 / 8, (10 / 8 + 1) / 2)
    assert bench_llm.num_tokens(samples, micro_batch_size=1) == [6, 4]
    assert bench_llm.num_tokens(samples, micro_batch_size=2) == [8]


@pytest.mark.parametrize("tied", [True, False])
def test_forward_operations(tokenizer, tied):
    """Two layers of width 32: 4 heads of 8, 2 of keys and values, an MLP of 64, and norms."""
    llm = make_tiny_llm(tokenizer, tie_word_embeddings=tied)
    layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 32
    operations = bench_prompts.forward_operations(llm, tokens=10, predictors=3)
    assert operations == 2 * (10 * (2 * layer + 32) + 3 * 32 * len(tokenizer))


def test_play_at_random_returns_states_with_the_decisions_that_were_taken_there():
    states, decisions = bench_prompts.play_at_random(steps=5, seed=0, drop_inert_commands=True)
    assert len(states) == len(decisions) == 5 and [state.moves for state in states] == [0, 1, 2, 3, 4]
    for state, decision in zip(states, decisions, strict=True):
        assert decision.action in state.valid_actions
        assert (decision.feedback, decision.score) == (state.feedback, state.score)
    assert bench_prompts.play_at_random(steps=5, seed=1, drop_inert_commands=True)[1] != decisions


def test_search_batch_gives_the_same_visits_and_differences_are_detected():
    roots = bench_search.make_roots(3, num_actions=100, num_legal=12)
    assert len({tuple(root.legal_actions) for root in roots}) == 3
    policy = bench_search.make_policy("small")
    policy.search_cfg.num_simulations = 4
    total_s, model_s, results = bench_search.search_batch(policy, roots, num_actions=100, repeats=1)
    assert 0 < model_s < total_s
    assert bench_search.same_visits(results, bench_search.search_each(policy, roots, num_actions=100))
    assert not bench_search.same_visits(results, results[::-1])


@pytest.mark.parametrize(("equal", "code"), [(True, 0), (False, 1)])
def test_report_returns_1_if_results_differ(tmp_path, monkeypatch, equal, code):
    monkeypatch.setattr(bench_tools, "RESULTS", tmp_path)
    assert bench_tools.report("x", [Row("a", 1.0, 4.0, 3, equal), Row("b", 1.0, 1.0, None, True)]) == code
    assert json.loads((tmp_path / "x.json").read_text())["rows"][0]["ratio"] == 4.0


def test_num_new_tokens():
    first = PromptRow([1, 2, 3, 4], [[5, 6], [5, 7, 8]])  # tokens that predict others: 5, and 7 after it
    assert bench_prior.num_new_tokens([first]) == 4 + 2
    assert bench_prior.num_new_tokens([first, first]) == 6 + 1 + 2  # the last token of a known prompt counts again
    longer = PromptRow([1, 2, 3, 9, 9], [[5]])
    assert bench_prior.num_new_tokens([first, longer]) == 6 + 2
    assert bench_prior.num_new_tokens([longer, first]) == 5 + 1 + 2


def test_same_decisions_detects_every_difference():
    ours = [record(0), record(1, chosen=1)]
    close = dataclasses.replace(ours[0].prior, logprobs=ours[0].prior.logprobs + 1e-5)
    assert bench_loop.same_decisions(ours, [dataclasses.replace(ours[0], prior=close), ours[1]])
    assert not bench_loop.same_decisions(ours, ours[:1])
    far = dataclasses.replace(close, logprobs=close.logprobs + 1e-3)
    for change in (
        {"prompt": "q"}, {"chosen": 2}, {"reward": 2.0}, {"prior": far}, {"visit_counts": np.array([2, 3, 4, 1])},
    ):  # fmt: skip
        assert not bench_loop.same_decisions(ours, [dataclasses.replace(ours[0], **change), ours[1]])


@pytest.mark.parametrize(
    ("stack", "part"),
    [
        ("run (threading.py:1);search (priorzero/search/mcts.py:9);select (priorzero/search/tree.py:9)", "search tree"),
        ("learn (priorzero/llm/fine_tuning.py:1);backward (torch/_tensor.py:600)", "backward and optimiser"),
        ("_score (priorzero/llm/engines/hf.py:1);forward (/x/site-packages/torch/nn/modules/linear.py:1)",
         "model forward"),
        ("_score (priorzero/llm/engines/hf.py:1);pack (/y/priorzero/llm/packing.py:72)",
         "other: pack (priorzero/llm/packing.py)"),
        ("_worker (concurrent/futures/thread.py:81)", "waiting"),
        ("run_training (priorzero/train.py:9);_run_once (asyncio/base_events.py:1);select (selectors.py:2)", "waiting"),
        ("sample (priorzero/world_model/replay.py:3);choice (numpy/random.py:4)",
         "other: sample (priorzero/world_model/replay.py)"),
    ],
)  # fmt: skip
def test_part_of_a_stack(stack, part):
    assert profile_quick_test.part_of(stack) == part


# ---- comparisons ----


def exit_code_of(main, arguments):
    """The exit code, whether ``main`` returns it or argparse ends the process."""
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (compare_llm_losses, ["--variants", "sft,ppo"], "--variants ppo: unknown; known are sft, sft_rft, rft"),
        (compare_llm_losses, ["--rounds", "0"], "--rounds: '0': give a whole number, at least 1"),
        (compare_llm_losses, ["--unseen", "textworld:simple?seed=101"], "is the game that is trained on"),
        (compare_llm_losses, ["--game", "nowhere.z5"], "nowhere.z5"),
        (compare_llm_losses, ["--out", __file__], f"--out {__file__}: the folder cannot be made (File exists)"),
        (
            benchmark_prior,
            ["--prompts", "walkthrough,poem"],
            "--prompts poem: unknown; known are config, question, quest",
        ),
        (benchmark_prior, ["--games", "nowhere.z5"], "nowhere.z5"),
        (
            benchmark_prior,
            ["--prompts", "question", "--set", "prior.use_cot=true"],
            "the benchmark generates no thoughts; type --set prior.use_cot=false",
        ),
        (benchmark_prior, ["--llm", "./nowhere", "--games", "textworld:simple?seed=7"], "llm.path=./nowhere: no such"),
        (
            sweep_pretraining,
            ["--data", ".", "--variants", "poem"],
            "--variants poem: unknown; known are observation_200",
        ),
        (sweep_pretraining, ["--data", "."], "contains no games; type python -m priorzero.pretrain"),
        (check_world_model, ["."], "contains no checkpoint"),
        (check_world_model, [".", "--seed", "-1"], "give a whole number, at least 0"),
        (check_world_model, [".", "--out", __file__], f"--out {__file__}: the folder cannot be made (File exists)"),
    ],
)
def test_comparisons_report_wrong_arguments(monkeypatch, tmp_path, capsys, script, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert exit_code_of(script.main, arguments) == 2
    assert message in capsys.readouterr().err


def test_benchmark_prior_keeps_earlier_rows_and_rejects_long_prompts(tokenizer, tmp_path, monkeypatch, capsys):
    """The prior of a prompt that does not fit into the model would be uniform, which says nothing about the LLM."""
    monkeypatch.setattr(benchmark_prior, "load_language_model", lambda cfg, *, device: llm)
    arguments = ["--games", "textworld:simple?seed=101&goal=brief", "--data", str(tmp_path), "--out", str(tmp_path)]
    llm = make_tiny_llm(tokenizer)
    assert benchmark_prior.main([*arguments, "--prompts", "walkthrough", "--label", "tiny"]) == 0
    rows = json.loads((tmp_path / "prior.json").read_text())["rows"]
    assert set(rows) == {"tiny: walkthrough"}
    (game,) = rows["tiny: walkthrough"]["games"].values()
    assert game["states"] >= 7 and 1 < game["place"] < 2 * game["uniform_place"]
    assert benchmark_prior.main([*arguments, "--prompts", "question"]) == 0
    assert len(json.loads((tmp_path / "prior.json").read_text())["rows"]) == 2
    assert "TextWorld, means over games" in capsys.readouterr().out
    assert benchmark_prior.main([*arguments, "--states", "3"]) == 2
    assert "contains figures of other states" in capsys.readouterr().err
    llm = make_tiny_llm(tokenizer, max_position_embeddings=100)
    assert benchmark_prior.main([*arguments, "--prompts", "walkthrough"]) == 2
    assert "a prompt does not fit into the model; leave this prompt out" in capsys.readouterr().err


def test_check_world_model_rejects_a_damaged_checkpoint(tmp_path, capsys):
    (tmp_path / "world_model.pt").write_bytes(b"PK")
    assert check_world_model.main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "cannot be used (manifest.json cannot be read" in capsys.readouterr().err
