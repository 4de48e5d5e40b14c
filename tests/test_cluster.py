"""Training on a Ray cluster: with real processes, which are killed, and a real game."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import ray
import torch

import priorzero.cluster.train as loop
from priorzero import ray_entry
from priorzero.cluster.actors import PriorServer, Registry, SharedVocabulary, load_trained_parameters
from priorzero.cluster.handles import Durable, answer
from priorzero.cluster.ppo.orz_engine import SEAM, OrzPPOEngine, jericho_reward_trainer, orz_config
from priorzero.cluster.ppo.torch_engine import TorchPPOEngine
from priorzero.cluster.ppo.trajectories import Trajectory
from priorzero.cluster.resources import Share, plan_resources
from priorzero.llm.models import load_language_model
from priorzero.llm.packing import PromptRow
from priorzero.play.action_vocabulary import make_action_indexer
from priorzero.policy import PriorZeroPolicy
from priorzero.runs.checkpoint import load_world_model
from priorzero.types import ActionPrior, PriorRequest, ProcessError, UserError
from tests.helpers.models import make_settings, make_tiny_llm
from tests.helpers.records import ACTIONS, record
from tests.helpers.runs import lines, read_events

# ---- what needs no cluster ----


def packs(shares, gpus):
    """Whether processes fit onto GPUs, a process on one GPU, largest first (exact for these few sizes)."""
    free = [1.0] * gpus
    for share in sorted(shares, reverse=True):
        fits = [g for g in range(gpus) if free[g] >= share - 1e-9]
        if not fits:
            return False
        free[min(fits, key=free.__getitem__)] -= share
    return True


@pytest.mark.parametrize("gpus", range(1, 17))
@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 1, 1), (3, 2, 1), (8, 1, 1), (2, 2, 2), (8, 2, 4), (8, 1, 8)])
def test_what_is_asked_for_fits_onto_the_gpus(gpus, counts):
    collectors, servers, learners = counts
    cluster = {"num_collectors": collectors, "num_servers": servers, "num_learners": learners}
    settings = make_settings({"cluster": cluster})
    if learners > 1 and gpus < servers + learners:
        with pytest.raises(UserError, match="would have to share GPUs"):
            plan_resources(settings, cpus=64, gpus=gpus)
        return
    plan = plan_resources(settings, cpus=64, gpus=gpus)
    shares = [plan["collector"].num_gpus] * collectors + [plan["server"].num_gpus] * servers
    shares += [plan["learner"].num_gpus] * learners + [plan["world_model"].num_gpus]
    assert min(shares) > 0 and packs(shares, gpus)
    assert all(share.num_cpus == 1 for share in plan.values())
    if gpus > servers + learners:
        assert plan["learner"].num_gpus == plan["server"].num_gpus == 1


def test_without_gpus_and_with_few_cores_nothing_is_set_aside():
    settings = make_settings()
    assert set(plan_resources(settings, cpus=2, gpus=0).values()) == {Share(0.0, 0.0)}
    assert set(plan_resources(settings, cpus=5, gpus=0).values()) == {Share(1.0, 0.0)}
    settings.run.device = "cuda"
    with pytest.raises(UserError, match=r"run\.device=cuda: the cluster has no GPU"):
        plan_resources(settings, cpus=5, gpus=0)


def settings_of(*flags, **environment):
    return ray_entry.settings_from(ray_entry.build_parser().parse_args(flags), environment)


def test_flags_and_debug_mode():
    settings = settings_of("--num_collectors", "3", "--wm_update_every", "2", "--llm_update_every", "5")
    assert (settings.cluster.num_collectors, settings.train.update_every, settings.llm.update_every) == (3, 2, 5)
    assert settings.run.env_id == "zork1.z5" and settings.ppo.engine == "torch"
    debug = settings_of(DEBUG_MODE="True")
    least = debug.cluster
    assert debug.run.max_iter // debug.llm.update_every > debug.ppo.critic_warmup_steps  # a step changes the LLM
    assert (least.num_collectors, least.num_servers, least.num_learners) == (1, 1, 1)
    assert settings_of(DEBUG_MODE="True").run.env_id.startswith("textworld:")
    assert settings_of("--num_collectors", "2", DEBUG_MODE="1").cluster.num_collectors == 2
    with pytest.raises(UserError, match="DEBUG_MODE=please: use True or False"):
        settings_of(DEBUG_MODE="please")
    with pytest.raises(UserError, match=r"cluster\.num_collectors=0 must be at least 1"):
        settings_of("--num_collectors", "0")
    with pytest.raises(UserError, match=r"cluster\.num_learners=3 must divide llm\.batch_size=32"):
        settings_of("--set", "cluster.num_learners=3")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"prior": {"enabled": False}, "eval": {"modes": ["world_model"]}}, r"leaves PPO nothing to learn"),
        ({"prior": {"mode": "rank"}}, r"needs prior\.mode=score and llm\.objective=actions"),
        ({"ppo": {"sharding": "fsdp"}, "llm": {"use_lora": True}}, r"type --set ppo\.sharding=ddp"),
        ({"ppo": {"engine": "orz"}}, r"takes ppo\.credit=none"),
        (
            {"ppo": {"engine": "orz", "credit": "none"}},
            r"orz\.ppo\.trainer cannot be imported; get https:.*--ppo_engine torch",
        ),
        (
            {"ppo": {"engine": "orz", "credit": "none"}, "replay": {"segment_length": 20}},
            r"replay\.segment_length=20 must be at least env\.max_episode_steps=25",
        ),
        ({"llm": {"enable_rft": False}}, r"llm\.enable_rft: no meaning on a cluster"),
        ({"run": {"max_env_step": 0}}, r"run\.max_env_step=0 trains nothing"),
    ],
)
def test_what_ppo_cannot_do_is_said_before_anything_is_started(layer, message):
    with pytest.raises(UserError, match=message):
        loop.check_settings(make_settings(layer))


def test_a_cluster_that_is_not_there_is_said_at_once():
    settings = make_settings({"cluster": {"address": "127.0.0.1:1"}})
    with pytest.raises(UserError, match=r"cluster\.address=127\.0\.0\.1:1: nobody answers there"):
        loop.connect(settings, namespace="test")
    assert not ray.is_initialized()


class Part:
    """Counts what it is told; dies where it is told to."""

    def __init__(self):
        self.starts, self.state, self.dies_at = 1, [], set()
        self.files = {}

    async def add(self, value):
        if value in self.dies_at:
            self.dies_at.remove(value)
            raise ProcessError(f"died at {value}")
        self.state.append(value)
        return sum(self.state)

    async def start(self):
        self.starts, self.state = self.starts + 1, []

    async def kill(self): ...

    async def save(self, folder):
        self.files[folder] = list(self.state)

    async def load(self, folder):
        self.state = list(self.files[folder])


def test_a_learner_that_dies_is_where_it_would_have_been(tmp_path):
    part = Part()
    part.dies_at = {3, 6}
    durable = Durable(part, name="part", folder=tmp_path, save_every=4, max_restarts=2)

    async def run():
        return [await durable.step(lambda v=value: part.add(v)) for value in range(1, 8)]

    assert asyncio.run(run()) == [1, 3, 6, 10, 15, 21, 28]
    assert (durable.restarts, part.starts, durable.replayed) == (2, 3, 2 + 1)  # 1 and 2; after four steps were saved: 5


def test_a_learner_that_dies_too_often_ends_the_run(tmp_path):
    part = Part()

    async def die():
        raise ProcessError("the part died")

    durable = Durable(part, name="part", folder=tmp_path, save_every=4, max_restarts=2)
    with pytest.raises(UserError, match=r"the part died; the part has been started again 2 times already"):
        asyncio.run(durable.step(die))
    assert part.starts == 3


def test_every_wait_has_a_limit():
    with pytest.raises(ProcessError, match=r"the part did not answer within 0\.05 s"):
        asyncio.run(answer(asyncio.sleep(5), timeout_s=0.05, who="the part"))


def test_parameters_that_do_not_fit_are_refused(smollm2):
    model = make_tiny_llm(smollm2.tokenizer).model
    state = dict(model.state_dict())
    load_trained_parameters(model, state)
    with pytest.raises(ValueError, match="unknown"):
        load_trained_parameters(model, {**state, "other.weight": torch.zeros(1)})
    state.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"missing \['model\.norm\.weight'\]"):
        load_trained_parameters(model, state)


# ---- Open-Reasoner-Zero's trainer, played by a double with its methods ----


class Buffer(list):
    def split_to_n_batches(self, n):
        return [self[i::n] for i in range(n)]


class TrainerDouble:
    """Does what ORZ's trainer does with what it is given, but for learning."""

    def __init__(self, cfg, strategy, tokenizer, train_dataset, eval_dataset=None, vllm_engines=None, colocate_pg=None):
        self.cfg, self.tokenizer, self.replay_buffer, self.calls = cfg, tokenizer, Buffer(), []
        self.prompts_dataloader = self.build_dataloader(train_dataset)

    def build_dataloader(self, dataset):
        raise AssertionError("there is no data set")

    async def build_models(self, PolicyRayActor, CriticRayActor, RefRayActor, RewardRayActor=None): ...

    async def generate_vllm(self, gen_func, prompts, extras=None, **kwargs):
        raise AssertionError("what was played is learned from, not what would be written now")

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


def check_seam(source, name):
    """Raises AssertionError unless the class has the methods that the adapter relies on."""
    found = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == name)
    methods = {f.name: f for f in found.body if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))}
    for method, parameters in SEAM.items():
        assert method in methods, method
        missing = set(parameters) - set(parameters_of(methods[method]))
        assert not missing, f"{method} has no {missing}"


def test_the_double_has_the_trainers_methods():
    check_seam(Path(__file__).read_text(), "TrainerDouble")
    with pytest.raises(AssertionError, match="make_experience has no"):
        check_seam(Path(__file__).read_text().replace("all_inputs", "inputs"), "TrainerDouble")


def test_so_has_the_trainer():
    checkout = os.environ.get("ORZ_PATH")
    if not checkout:
        pytest.skip("ORZ_PATH names no checkout of Open-Reasoner-Zero; the double is checked above")
    check_seam(Path(checkout, "orz", "ppo", "trainer.py").read_text(), "RayPPOTrainer")


def orz_engine(smollm2, **ppo):
    settings = make_settings(
        {
            "ppo": {"engine": "orz", "credit": "none", "critic_warmup_steps": 1, **ppo},
            "search": {"discount_factor": 0.5},
        }
    )

    async def make_trainer(settings):
        cfg = SimpleNamespace(**orz_config(settings), advantage_normalize=False, actor_num_nodes=1, critic_num_nodes=1)
        return jericho_reward_trainer(TrainerDouble)(cfg, None, smollm2.tokenizer, [], vllm_engines=[None])

    async def hand_on(version, parameters): ...

    return OrzPPOEngine(settings, share=Share(0, 0), hand_on=hand_on, make_trainer=make_trainer)


def test_orz_learns_from_what_was_played_and_its_discounted_return(smollm2):
    engine = orz_engine(smollm2)
    records = tuple(dataclasses.replace(record(t, chosen=t), reward=float(t)) for t in range(3))
    no_prior = dataclasses.replace(record(3), prior=None)

    async def run():
        await engine.start()
        first = await engine.ppo_step([Trajectory((*records, no_prior), None)], 1)
        again = await engine.ppo_step([Trajectory(records, None)], 1)
        return first, again, await engine.ppo_step([Trajectory(records, None)], 2)

    first, again, second = asyncio.run(run())
    calls = engine._trainer.calls
    assert [(kind, step) for kind, _, step in calls] == [("critic", 1), ("policy", 1), ("critic", 2), ("policy", 2)]
    ((_, (batch,), _), *_) = calls
    assert [output for _, output, _ in batch] == [f"{action}<|im_end|>" for action in ACTIONS[:3]]
    # The returns of rewards 0, 1, 2 and 0 (without a prior, but part of the episode) with a discount of 1/2.
    assert [float(rewards[-1]) for *_, rewards in batch] == [1.0, 2.0, 2.0]
    assert all(float(rewards[:-1].abs().sum()) == 0 for *_, rewards in batch)
    assert first == again == {"left_out": "", "ppo/samples": 3.0, "ppo/stale": 0.0, "ppo/value_loss": 2.0}
    assert second["train/llm_loss"] == 0.5 and engine._version == 1  # the first step warmed the critic up


def test_orz_leaves_out_what_is_too_old(smollm2):
    engine = orz_engine(smollm2, max_staleness=0)
    engine._version = 1

    async def run():
        await engine.start()
        return await engine.ppo_step([Trajectory((record(),), None)], 1)

    assert asyncio.run(run())["ppo/stale"] == 1 and engine._trainer.calls == []
    assert not engine.capabilities.resumable and engine.capabilities.needs_gpu


# ---- with processes ----


def cluster_settings(folder, llm, *layers):
    return make_settings(
        {
            "run": {"max_iter": 12, "output_dir": str(folder), "exp_name": "run", "num_threads": 1, "seed": 3},
            "env": {"max_episode_steps": 8, "collector_env_num": 1},
            "world_model": {"embed_dim": 64, "num_heads": 2},
            "search": {"num_simulations": 4},
            "train": {"collect_env_steps": 8, "batch_size": 8, "update_per_collect": 2, "update_every": 2},
            "prior": {"timeout_s": 300.0},
            "llm": {"path": str(llm), "batch_size": 4, "micro_batch_size": 1, "update_every": 3, "learning_rate": 1e-3},
            "ppo": {"critic_warmup_steps": 1, "max_staleness": 3, "max_decisions": 0},
            "cluster": {"num_collectors": 2, "num_learners": 2, "save_every": 2},
            "replay": {"segment_length": 8},
            "eval": {"every": 1000, "modes": ["world_model_with_prior"]},
        },
        *layers,
    )


@pytest.fixture(scope="module")
def tiny_llm_folder(tmp_path_factory, smollm2):
    folder = tmp_path_factory.mktemp("llm")
    make_tiny_llm(smollm2.tokenizer).save(folder)
    return folder


def made_up(n, *, version=0):
    """Episodes of two decisions, which anybody can learn from."""
    rng = np.random.default_rng(n)
    trajectories = []
    for e in range(n):
        records = []
        for t in range(2):
            logits = rng.normal(size=4)
            prior = ActionPrior((logits - np.log(np.exp(logits).sum())).astype(np.float32), "score", version)
            made = dataclasses.replace(record(7 * e + t, chosen=int(rng.integers(4))), prior=prior)
            records.append(dataclasses.replace(made, reward=float(rng.normal()), done=t == 1, behaviour_prob=0.5))
        trajectories.append(Trajectory(tuple(records), None))
    return trajectories


@pytest.mark.slow
def test_two_learners_are_one_and_servers_agree_with_them(tmp_path, tiny_llm_folder):
    """DDP and FSDP with two processes, and one process alone, from the same trajectories; then a server takes over."""
    layer = {"ppo": {"critic_warmup_steps": 0, "epochs": 2}, "llm": {"kl_weight": 0.1}}
    settings = cluster_settings(tmp_path, tiny_llm_folder, layer)
    handed_on = []

    async def hand_on(version, parameters):
        handed_on.append((version, parameters, await parameters))

    def engine(num_learners, sharding):
        own = cluster_settings(
            tmp_path, tiny_llm_folder, layer, {"cluster": {"num_learners": num_learners}, "ppo": {"sharding": sharding}}
        )
        return TorchPPOEngine(own, share=Share(0, 0), hand_on=hand_on)

    async def learn(made, *, through=None):
        """Two steps; in between, if asked for, everything is saved, killed, started and loaded."""
        told = [await made.ppo_step(made_up(5), 1)]
        if through is not None:
            await made.save(through)
            await made.kill()
            await made.start()
            await made.load(through)
            assert await made.ppo_step(made_up(5), 1) == told[0]  # made already: nothing happens
        told.append(await made.ppo_step(made_up(5, version=1), 2))
        await made.publish()
        return told

    async def run():
        loop.connect(settings, namespace="test")
        try:
            alone, ddp, fsdp = engine(1, "ddp"), engine(2, "ddp"), engine(2, "fsdp")
            registry = ray.remote(Registry).options(name="registry", num_cpus=0).remote(settings)
            actor = ray.remote(PriorServer).options(num_cpus=0, max_concurrency=10)
            server = actor.remote(settings, "registry", str(tmp_path / "vllm.log"))
            await asyncio.gather(*(made.start() for made in (alone, ddp, fsdp)), server.ready.remote())
            told = [await learn(alone), await learn(ddp), await learn(fsdp, through=tmp_path / "state")]

            # A server takes over, answers with the version, and knows it when it is asked to begin again.
            version, parameters, _ = handed_on[-1]
            request = PriorRequest("Where to?", ACTIONS)
            (before,) = await server.priors.remote([request])
            await registry.publish.remote(version, [parameters])
            assert await server.take_over.remote(version, [parameters]) == version == 2
            (after,) = await server.priors.remote([request])
            again = actor.remote(settings, "registry", str(tmp_path / "vllm2.log"))
            (fetched,) = await again.priors.remote([request])
            await ddp.export(tmp_path / "exported")
            vocabulary = SharedVocabulary(registry, capacity=8, timeout_s=60.0)
            other = SharedVocabulary(registry, capacity=8, timeout_s=60.0)
            numbers = [v.indices(a).tolist() for v, a in [(vocabulary, "ab"), (other, "ba"), (other, "ac")]]
            return told, before, after, fetched, numbers, vocabulary.num_used, other.num_used
        finally:
            ray.shutdown()

    told, before, after, fetched, numbers, *used = asyncio.run(run())
    assert numbers == [[0, 1], [1, 0], [0, 2]] and used == [2, 3]
    first = load_language_model(settings.llm, device=torch.device("cpu")).model.state_dict()
    states = [state for *_, state in handed_on]
    for name, tensor in states[0].items():
        for other in states[1:]:
            assert (other[name] - tensor).norm() <= 2e-3 * (tensor - first[name]).norm() + 1e-6, name
    assert all((states[0][name] - first[name]).norm() > 1e-3 for name in ("lm_head.weight", "model.norm.weight"))
    for one, ddp, fsdp in zip(*told, strict=True):
        assert one.keys() == ddp.keys() == fsdp.keys() and one["ppo/samples"] == 10
        assert one.pop("left_out") == ddp.pop("left_out") == fsdp.pop("left_out") == ""
        for name, value in one.items():
            assert ddp[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name
            assert fsdp[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name

    llm = load_language_model(settings.llm, device=torch.device("cpu"))
    load_trained_parameters(llm.model, states[-1])
    row = llm.row("Where to?", ACTIONS, end_of_turn=True)
    assert isinstance(row, PromptRow)
    with torch.no_grad():
        logprobs, mask = llm.token_logprobs([row])
    assert after.rollout_logprobs == pytest.approx((logprobs * mask).sum(dim=1).numpy(), abs=1e-4)
    assert (before.version, after.version, fetched.version) == (0, 2, 2)
    assert np.abs(after.logprobs - before.logprobs).max() > 1e-3
    assert fetched.logprobs == pytest.approx(after.logprobs, abs=1e-5)
    exported = load_language_model(make_settings({"llm": {"path": str(tmp_path / "exported")}}).llm, device=llm.device)
    assert torch.allclose(exported.model.state_dict()["model.norm.weight"], states[1]["model.norm.weight"])


def processes(name):
    """Processes of an actor class on this machine."""
    return [p for p in psutil.process_iter(["cmdline"]) if f"ray::{name}" in " ".join(p.info["cmdline"] or [])]


@pytest.mark.slow
def test_a_run_survives_the_death_of_every_part(tmp_path, tiny_llm_folder, monkeypatch):
    """Two collectors on a TextWorld game; a collector, the server and both learners are killed on the way."""
    victims = {3: "CollectorProcess", 5: "PriorServer", 7: "LearnerProcess", 9: "WorldModelProcess"}
    killed = []

    class Killer(loop.ClusterTeller):
        def show(self, counters):
            super().show(counters)
            name = victims.get(counters["iteration"])
            if name is not None:
                # Of the collectors the one that plays; of the learners the second: the first one's exchange breaks off.
                found = processes(name)
                victim = next((p for p in found if ".collect" in " ".join(p.cmdline())), found[-1])
                victim.send_signal(signal.SIGKILL)
                killed.append(name)

    monkeypatch.setattr(loop, "ClusterTeller", Killer)
    settings = cluster_settings(tmp_path, tiny_llm_folder)
    summary = loop.run_on_cluster(settings)
    assert killed == list(victims.values())
    _, left = psutil.wait_procs([p for name in victims.values() for p in processes(name)], timeout=30)
    assert not left

    # The two frequencies, exactly: 12 iterations, every 2nd and every 3rd.
    rows, scalars = summary.rows, read_events(summary.folder)
    assert rows["iterations"] == 12 and rows["environment steps"] >= 12 * 8
    assert rows["world-model updates"] == "12 in 6 turns"
    assert rows["PPO steps"] == "4, of which 3 changed the LLM"
    assert scalars["ppo/steps"] == [1, 2, 3, 4] and len(scalars["train/wm_total_loss"]) == 6
    for part in ("collector", "server", "learner", "world_model"):
        assert scalars[f"cluster/{part}_restarts"][-1] == 1, part
    assert scalars["cluster/calls_replayed"][-1] > 0 and scalars["cluster/collectors_lost"][-1] == 0
    assert sum(scalars["ppo/samples"]) > 0 and all(np.isfinite(scalars["ppo/value_loss"]))
    assert sum(scalars["prior/fallbacks"]) == 0  # who asked the server that died has waited for it
    # Every decision that was told of was stored, and is in a trajectory but for those at which an episode was cut.
    episodes = lines(summary.folder, "episodes.jsonl")
    assert len(episodes) == rows["episodes finished"] > 0
    assert [e["env_step"] for e in episodes] == sorted(e["env_step"] for e in episodes)
    assert "world_model_with_prior" in summary.evaluations

    # What it leaves can be loaded: the world model with its actions, and the LLM.
    folder = summary.folder / "checkpoints" / "iteration_12"
    own = make_settings({"prior": {"enabled": False}, "eval": {"modes": ["world_model"]}})
    own.world_model.embed_dim, own.world_model.num_heads = 64, 2
    features = torch.load(folder / "world_model.pt", weights_only=True)
    size = next(t.shape[0] for name, t in features.items() if name.endswith("encoder.feature_mean"))
    indexer = make_action_indexer("vocabulary", own.env.action_space_size)
    load_world_model(folder, policy=PriorZeroPolicy(own, feature_size=size, device="cpu", llm=None), indexer=indexer)
    assert indexer.num_used > 5
    llm = load_language_model(make_settings({"llm": {"path": str(folder / "llm")}}).llm, device=torch.device("cpu"))
    before = load_language_model(settings.llm, device=torch.device("cpu"))
    assert not torch.equal(llm.model.state_dict()["lm_head.weight"], before.model.state_dict()["lm_head.weight"])
