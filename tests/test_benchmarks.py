"""What the benchmarks compare: the straightforward ways give the same results, and a difference is noticed."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tiny_llm

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

import bench_learner
import bench_search
import bench_tools
from bench_tools import Row


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
