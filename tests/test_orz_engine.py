"""Tests of the adapter to Open-Reasoner-Zero's trainer, with a stub that has the trainer's methods."""

from __future__ import annotations

import ast
import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from priorzero.cluster.connection import Share
from priorzero.cluster.ppo.engine import PPOResult
from priorzero.cluster.ppo.orz_engine import OrzPPOEngine, jericho_reward_trainer, orz_config
from priorzero.cluster.ppo.trajectories import Trajectory
from tests.helpers.models import make_settings
from tests.helpers.records import ACTIONS, record


class Buffer(list):
    def split_to_n_batches(self, n):
        return [self[i::n] for i in range(n)]


# The methods of the trainer that are called or overridden, and the names of the parameters that must exist.
TRAINER_METHODS = {
    "__init__": ("cfg", "strategy", "tokenizer", "train_dataset", "vllm_engines"),
    "build_dataloader": ("dataset",),
    "build_models": ("PolicyRayActor", "CriticRayActor", "RefRayActor"),
    "make_experience": ("all_inputs",),
    "generate_vllm": ("gen_func", "prompts", "extras"),
    "custom_reward_fn": ("prompts", "outputs", "extras", "reward_model_fn"),
    "ppo_local_train_policy": ("replay_buffers", "global_steps"),
    "ppo_local_train_critic": ("replay_buffers", "global_steps"),
    "_tokenize": ("texts", "max_length", "padding"),
}


class TrainerStub:
    """Does what ORZ's trainer does, except for learning."""

    def __init__(self, cfg, strategy, tokenizer, train_dataset, eval_dataset=None, vllm_engines=None, colocate_pg=None):
        self.cfg, self.tokenizer, self.replay_buffer, self.calls = cfg, tokenizer, Buffer(), []
        self.prompts_dataloader = self.build_dataloader(train_dataset)

    def build_dataloader(self, dataset):
        raise AssertionError("there is no data set")

    async def build_models(self, PolicyRayActor, CriticRayActor, RefRayActor, RewardRayActor=None): ...

    async def generate_vllm(self, gen_func, prompts, extras=None, **kwargs):
        raise AssertionError("the actions that were taken must be used")

    async def custom_reward_fn(self, prompts, outputs, extras, reward_model_fn):
        raise NotImplementedError

    def _tokenize(self, texts, max_length=99999999, padding=True, device=None):
        return self.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=max_length)

    async def make_experience(self, all_inputs, **generate_kwargs):
        prompts, extras = [p for p, _ in all_inputs], [e for _, e in all_inputs]
        outputs = await self.generate_vllm(None, prompts, extras=extras)
        prompts, outputs, rewards = await self.custom_reward_fn(prompts, outputs, extras, reward_model_fn=None)
        lengths = [len(ids) for ids in self._tokenize(outputs, self.cfg.generate_max_len, padding=False)["input_ids"]]
        assert [len(r) for r in rewards] == lengths
        self.replay_buffer.extend(zip(prompts, outputs, rewards, strict=True))

    async def ppo_local_train_policy(self, replay_buffers, global_steps):
        self.calls.append(("policy", [list(b) for b in replay_buffers], global_steps))
        return {"policy_loss": 0.5} if global_steps > self.cfg.freezing_actor_steps else None

    async def ppo_local_train_critic(self, replay_buffers, global_steps):
        self.calls.append(("critic", [list(b) for b in replay_buffers], global_steps))
        return {"critic_loss": 2.0}


def parameters_of(function):
    return [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]


@pytest.mark.parametrize("name", ["TrainerStub", "RayPPOTrainer"])
def test_trainer_methods_exist_in_the_stub_and_in_open_reasoner_zero(name):
    path = Path(__file__)
    if name == "RayPPOTrainer":
        if not (checkout := os.environ.get("ORZ_PATH")):
            pytest.skip("ORZ_PATH names no checkout of Open-Reasoner-Zero; the stub is checked")
        path = Path(checkout, "orz", "ppo", "trainer.py")
    found = next(n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef) and n.name == name)
    methods = {f.name: f for f in found.body if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))}
    for method, parameters in TRAINER_METHODS.items():
        assert set(parameters) <= set(parameters_of(methods[method])), method


def make_orz_engine(tokenizer, **ppo):
    settings = make_settings(
        {
            "ppo": {"engine": "orz", "credit": "none", "critic_warmup_steps": 1, **ppo},
            "search": {"discount_factor": 0.5},
        }
    )

    async def make_trainer(settings):
        cfg = SimpleNamespace(**orz_config(settings), advantage_normalize=False, actor_num_nodes=1, critic_num_nodes=1)
        return jericho_reward_trainer(TrainerStub)(cfg, None, tokenizer, [], vllm_engines=[None])

    async def send_parameters(version, parameters): ...

    return OrzPPOEngine(settings, share=Share(0, 0), send_parameters=send_parameters, make_trainer=make_trainer)


async def test_orz_engine_learns_from_the_actions_taken_and_their_discounted_returns(smollm2):
    engine = make_orz_engine(smollm2.tokenizer)
    records = tuple(dataclasses.replace(record(t, chosen=t), reward=float(t)) for t in range(3))
    no_prior = dataclasses.replace(record(3), prior=None)
    await engine.start()
    first = await engine.ppo_step([Trajectory((*records, no_prior), None)], 1)
    again = await engine.ppo_step([Trajectory(records, None)], 1)
    second = await engine.ppo_step([Trajectory(records, None)], 2)
    calls = engine._trainer.calls
    assert [(kind, step) for kind, _, step in calls] == [("critic", 1), ("policy", 1), ("critic", 2), ("policy", 2)]
    ((_, (batch,), _), *_) = calls
    assert [output for _, output, _ in batch] == [f"{action}<|im_end|>" for action in ACTIONS[:3]]
    # The returns of rewards 0, 1, 2 and 0 (without a prior, but part of the episode) with a discount of 1/2.
    assert [float(rewards[-1]) for *_, rewards in batch] == [1.0, 2.0, 2.0]
    assert all(float(rewards[:-1].abs().sum()) == 0 for *_, rewards in batch)
    assert first == again == PPOResult({"ppo/samples": 3.0, "ppo/stale": 0.0, "ppo/value_loss": 2.0})
    assert second.metrics["train/llm_loss"] == 0.5 and engine._version == 1  # in the first step only the critic learns


async def test_orz_engine_skips_stale_decisions(smollm2):
    engine = make_orz_engine(smollm2.tokenizer, max_staleness=0)
    engine._version = 1
    await engine.start()
    result = await engine.ppo_step([Trajectory((record(),), None)], 1)
    assert result.metrics["ppo/stale"] == 1 and engine._trainer.calls == []
    assert not engine.resumable
