"""What the benchmarks compare: the straightforward ways give the same results, and a difference is noticed."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.models import make_tiny_llm

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

import bench_learner
import bench_loop
import bench_prior
import bench_search
import bench_tools
import check_world_model
import compare_llm_losses
import compare_prompts
import profile_quick_test
from bench_tools import Row

from priorzero.llm.packing import PromptRow
from priorzero.types import ActionPrior, PriorRequest


def test_one_row_an_action_is_the_same_learning_step(smollm2):
    llm = make_tiny_llm(smollm2.tokenizer)
    learner, gradient = bench_learner.make_learner(llm, top=5)
    samples, skipped = learner.samples(bench_learner.make_records(llm, states=3, tokens=60), np.zeros(3))
    assert skipped == 0 and {len(sample.row.completions) for sample in samples} == {5}
    # Prompts of different lengths: in a micro-batch of 2 rows, one is padded.
    shorter = dataclasses.replace(samples[1].row, prompt_ids=samples[1].row.prompt_ids[7:])
    samples[1] = dataclasses.replace(samples[1], row=shorter)
    ours = learner.learn(samples)["sft_loss"]
    ours_gradient = list(gradient)
    assert bench_learner.one_row_an_action(learner, samples) == pytest.approx(ours, rel=1e-5)
    assert bench_learner.relative_difference(ours_gradient, gradient) < 1e-5
    assert learner.learn(samples)["sft_loss"] == pytest.approx(ours, rel=1e-7)  # the parameters stay
    samples[0] = dataclasses.replace(samples[0], target_probs=np.roll(samples[0].target_probs, 1))
    bench_learner.one_row_an_action(learner, samples)
    assert bench_learner.relative_difference(ours_gradient, gradient) > 1e-3


def test_searches_that_differ_are_noticed():
    roots = bench_search.make_roots(3, num_actions=100, num_legal=12)
    assert len({tuple(root.legal) for root in roots}) == 3
    policy = bench_search.make_policy("quick_test", tree="python")
    policy.search_cfg.num_simulations = 4
    total_s, model_s, results = bench_search.batched(policy, roots, num_actions=100, repeats=1)
    assert 0 < model_s < total_s
    assert bench_search.same(results, [policy.search([root], num_actions=100)[0] for root in roots])
    assert not bench_search.same(results, results[::-1])


@pytest.mark.parametrize(("equal", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_results_agree(tmp_path, monkeypatch, equal, code):
    monkeypatch.setattr(bench_tools, "RESULTS", tmp_path)
    assert bench_tools.report("x", [Row("a", 1.0, 4.0, 3, equal), Row("b", 1.0, 1.0, None, True)]) == code
    assert '"ratio": 4.0' in (tmp_path / "x.json").read_text()


def test_tokens_that_must_be_computed():
    first = PromptRow([1, 2, 3, 4], [[5, 6], [5, 7, 8]])  # its tree: 5, and 7 behind it
    assert bench_prior.tokens_computed([first]) == 4 + 2
    assert bench_prior.tokens_computed([first, first]) == 6 + 1 + 2  # the last token of a known prompt is asked again
    longer = PromptRow([1, 2, 3, 9, 9], [[5]])
    assert bench_prior.tokens_computed([first, longer]) == 6 + 2
    assert bench_prior.tokens_computed([longer, first]) == 5 + 1 + 2


def test_collections_that_differ_are_noticed():
    def noted(*, prompt="p", command="go", reward=0.0, prior=(0.0, -1.0), visits=(3, 2)):
        return prompt, command, reward, np.array(prior), np.array(visits)

    ours = [noted(), noted(reward=1.0)]
    assert bench_loop.equal(ours, [noted(prior=(1e-5, -1.0)), noted(reward=1.0)])
    assert not bench_loop.equal(ours, ours[:1])
    for change in ({"prompt": "q"}, {"command": "up"}, {"reward": 2.0}, {"prior": (1e-3, -1.0)}, {"visits": (2, 3)}):
        assert not bench_loop.equal(ours, [noted(**change), noted(reward=1.0)])


@pytest.mark.parametrize(
    ("stack", "part"),
    [
        ("run (threading.py:1);search (priorzero/search.py:9);batch_traverse (priorzero/tree.py:99)", "search tree"),
        ("learn (priorzero/llm_learner.py:1);backward (torch/_tensor.py:600)", "backward and optimiser"),
        ("_score (priorzero/engines/in_process.py:1);forward (/x/site-packages/torch/nn/modules/linear.py:1)",
         "model forward"),
        ("_score (priorzero/engines/in_process.py:1);pack (/y/priorzero/completions.py:72)",
         "other: pack (priorzero/completions.py)"),
        ("_worker (concurrent/futures/thread.py:81)", "waiting"),
        ("run_training (priorzero/train.py:9);_run_once (asyncio/base_events.py:1);select (selectors.py:2)", "waiting"),
        ("sample (priorzero/buffer.py:3);choice (numpy/random.py:4)", "other: sample (priorzero/buffer.py)"),
    ],
)  # fmt: skip
def test_what_a_sample_was_busy_with(stack, part):
    assert profile_quick_test.part_of(stack) == part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "sft,ppo"], "--variants ppo: there are sft, sft_rft, rft"),
        (["--rounds", "0"], "--rounds 0 --repeats 2: both must be 1 or more"),
        (["--unseen", "textworld:simple?seed=101"], "is the game that is learned from"),
        (["--game", "nowhere.z5"], "nowhere.z5"),
        (["--out", __file__], f"--out {__file__}: cannot be made (File exists)"),
    ],
)
def test_losses_that_cannot_be_compared_are_told_at_once(capsys, arguments, message):
    assert compare_llm_losses.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "walkthrough,poem"], "--prompts poem: there are question, question_short"),
        (["--goals", "long"], "--goals long: there are detailed, brief, none"),
        (["--games", "textworld:simple?seed=1&goal=brief"], "give games of textworld:simple and no goal"),
        (["--games", "textworld:coin-collector?level=5"], "give games of textworld:simple and no goal"),
        (["--games", "nowhere.z5"], "nowhere.z5"),
        (["--llm", "./nowhere"], "llm.path=./nowhere: no such folder"),
    ],
)
def test_prompts_that_cannot_be_compared_are_told_at_once(capsys, arguments, message):
    assert compare_prompts.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told


def test_where_the_right_command_stands():
    questions, answers = [], []
    for probs, right in [([0.5, 0.3, 0.2], 0), ([0.5, 0.3, 0.2], 2), ([0.4, 0.4, 0.1, 0.1], 1)]:
        actions = tuple("abcd"[: len(probs)])
        questions.append(compare_llm_losses.Question(None, PriorRequest("", actions), right))
        answers.append(ActionPrior(np.log(np.array(probs, dtype=np.float32)), "score", version=0))
    assert compare_prompts.figures(questions, answers) == pytest.approx(
        {"place": 5.5 / 3, "first": 1 / 3, "log-prob": (np.log(0.5) + np.log(0.2) + np.log(0.4)) / 3}
    )
    assert compare_prompts.chance(questions) == pytest.approx(
        {"place": 6.5 / 3, "first": 11 / 36, "log-prob": -(2 * np.log(3) + np.log(4)) / 3}
    )


def test_prompts_that_do_not_fit_are_no_answer(smollm2, tmp_path, monkeypatch, capsys):
    """The LLM is not asked then, and the prior is the same for all commands: chance, not the LLM's figure."""
    monkeypatch.setattr(compare_prompts, "load_language_model", lambda cfg, *, device: tiny)
    arguments = ["--games", "textworld:simple?seed=101", "--goals", "brief", "--prompts", "walkthrough"]
    arguments += ["--out", str(tmp_path)]
    tiny = make_tiny_llm(smollm2.tokenizer)
    assert compare_prompts.main(arguments) == 0
    rows = json.loads((tmp_path / "prompts.json").read_text())["rows"]
    assert set(rows) == {"brief: chance", "brief: walkthrough"}
    assert 1 < rows["brief: walkthrough"]["place"] < 2 * rows["brief: chance"]["place"]
    assert compare_prompts.main([*arguments[:4], "--prompts", "question", *arguments[6:]]) == 0
    assert len(json.loads((tmp_path / "prompts.json").read_text())["rows"]) == 3  # the earlier row stays
    assert compare_prompts.main([*arguments, "--normalise", "sum"]) == 2
    assert "holds figures of another LLM, other games or settings" in capsys.readouterr().err
    tiny = make_tiny_llm(smollm2.tokenizer, max_position_embeddings=100)
    assert compare_prompts.main(arguments) == 2
    told = capsys.readouterr().err
    assert "--prompts walkthrough: 1" in told and "context of 100 tokens; leave it out" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", __file__], f"--out {__file__}: cannot be made (File exists)"),
        ([], "holds no checkpoint"),
        (["--seed", "-1"], "give a whole number from 0 on"),
        (["--env_steps", "0"], "give a whole number from 1 on"),
    ],
)
def test_a_world_model_that_cannot_be_checked_is_told_at_once(tmp_path, capsys, arguments, message):
    try:
        code = check_world_model.main([str(tmp_path), "--out", str(tmp_path), *arguments])
    except SystemExit as ended:  # argparse
        code = ended.code
    assert code == 2 and message in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_checked(tmp_path, capsys):
    (tmp_path / "world_model.pt").write_bytes(b"PK")
    assert check_world_model.main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "cannot be used (manifest.json cannot be read" in capsys.readouterr().err
