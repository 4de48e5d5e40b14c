"""Tests of training on a Ray cluster: the parts in this process, and one run whose processes are killed."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.exceptions import ActorDiedError

from priorzero import ray_entry
from priorzero.cluster import collectors, connection
from priorzero.cluster.actors import prior_server, registry
from priorzero.cluster.actors.collector import CollectorReport
from priorzero.cluster.actors.prior_server import PriorServer, load_trained_parameters
from priorzero.cluster.actors.registry import Registry, RemoteVocabulary
from priorzero.cluster.calls import result_of
from priorzero.cluster.collectors import Collectors
from priorzero.cluster.connection import Share, check_game_packages, check_settings, connect, plan_resources
from priorzero.cluster.restart import RestartableLearner
from priorzero.cluster.run import ClusterRun, merge_prior_metrics
from priorzero.cluster.train import run_on_cluster
from priorzero.config import PRESETS, resolve_settings
from priorzero.envs import GameSpec
from priorzero.envs.registry import GameRequest, RegisteredGame
from priorzero.llm.models import load_language_model
from priorzero.llm.packing import PromptRow
from priorzero.play.action_vocabulary import ActionVocabulary
from priorzero.policy import PriorZeroPolicy
from priorzero.run_state import load_world_model_state
from priorzero.runs.loggers.csv_file import read_metrics_csv
from priorzero.runs.report.data import read_run
from priorzero.runtime.timeline import TimeUsage
from priorzero.types import PriorRequest, ProcessError, UserError
from tests.helpers.models import make_settings, make_tiny_llm
from tests.helpers.processes import send_stop_signals
from tests.helpers.records import ACTIONS
from tests.helpers.runs import lines, read_events

# ---- settings and resources ----


def fits(shares, gpus):
    """Whether processes fit onto GPUs, one GPU for each process, largest first (exact for these few sizes)."""
    free = [1.0] * gpus
    for share in sorted(shares, reverse=True):
        enough = [g for g in range(gpus) if free[g] >= share - 1e-9]
        if not enough:
            return False
        free[min(enough, key=free.__getitem__)] -= share
    return True


@pytest.mark.parametrize("gpus", range(1, 17))
@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 1, 1), (3, 2, 1), (8, 1, 1), (2, 2, 2), (8, 2, 4), (8, 1, 8)])
def test_plan_resources_fits_onto_the_gpus(gpus, counts):
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
    assert min(shares) > 0 and fits(shares, gpus)
    assert all(share.num_cpus == 1 for share in plan.values())
    if gpus > servers + learners:
        assert plan["learner"].num_gpus == plan["server"].num_gpus == 1


def test_plan_resources_without_gpus_and_with_few_cores():
    settings = make_settings()
    assert set(plan_resources(settings, cpus=2, gpus=0).values()) == {Share(0.0, 0.0)}
    assert set(plan_resources(settings, cpus=5, gpus=0).values()) == {Share(1.0, 0.0)}
    settings.run.device = "cuda"
    with pytest.raises(UserError, match=r"run\.device=cuda: the cluster has no GPU"):
        plan_resources(settings, cpus=5, gpus=0)


def settings_of(*flags, **environment):
    return ray_entry.settings_from(ray_entry.build_parser().parse_args(flags), environment)


def test_ray_entry_reads_flags_and_debug_mode():
    settings = settings_of("--num_collectors", "3", "--wm_update_every", "2", "--llm_update_every", "5")
    assert (settings.cluster.num_collectors, settings.train.update_every, settings.llm.update_every) == (3, 2, 5)
    assert settings.run.env_id == "zork1.z5" and settings.ppo.engine == "torch"
    debug = settings_of(DEBUG_MODE="True")
    cluster = debug.cluster
    assert debug.run.max_iter // debug.llm.update_every > debug.ppo.critic_warmup_steps  # a step changes the LLM
    assert (cluster.num_collectors, cluster.num_servers, cluster.num_learners) == (1, 1, 1)
    assert debug.run.env_id.startswith("textworld:")
    assert settings_of("--num_collectors", "2", DEBUG_MODE="1").cluster.num_collectors == 2
    assert settings_of("--preset", "lora") == resolve_settings(PRESETS["lora"])
    assert settings_of("--preset", "lora", DEBUG_MODE="True").run.env_id == debug.run.env_id
    with pytest.raises(UserError, match="DEBUG_MODE=please: use True or False"):
        settings_of(DEBUG_MODE="please")
    with pytest.raises(UserError, match=r"cluster\.num_collectors=0 must be .*at least 1"):
        settings_of("--num_collectors", "0")
    with pytest.raises(UserError, match=r"cluster\.num_learners=3 must divide llm\.batch_size=32"):
        settings_of("--set", "cluster.num_learners=3")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"prior": {"enabled": False}, "eval": {"modes": ["world_model"]}}, r"PPO has no LLM to train"),
        ({"prior": {"mode": "rank"}}, r"type --set prior\.mode=score --set llm\.objective=actions"),
        ({"prior": {"use_cot": True}}, r"type --set prior\.use_cot=false"),
        ({"ppo": {"sharding": "fsdp"}, "llm": {"use_lora": True}}, r"type --set ppo\.sharding=ddp"),
        ({"ppo": {"engine": "orz"}}, r"needs ppo\.credit=none"),
        ({"ppo": {"engine": "orz", "credit": "none"}, "llm": {"adapter": "x"}}, r"and no llm\.adapter"),
        (
            {"ppo": {"engine": "orz", "credit": "none"}},
            r"orz\.ppo\.trainer cannot be imported; get https:.*--ppo_engine torch",
        ),
        (
            {"ppo": {"engine": "orz", "credit": "none"}, "replay": {"segment_length": 20}},
            r"segment_length=20 must be at least env\.max_episode_steps=25; type --set replay\.segment_length=25",
        ),
        (
            {
                "ppo": {"engine": "orz", "credit": "none"},
                "env": {"max_episode_steps": "a=30, b=70"},
                "replay": {"segment_length": 60},
            },
            r"must be at least env\.max_episode_steps=a=30, b=70; type --set replay\.segment_length=70",
        ),
        ({"llm": {"enable_rft": False}}, r"no effect on a cluster.*: llm\.enable_rft;"),
        (
            {"llm": {"imitation_share": 0.5}},
            r"no effect on a cluster, where PPO .*: llm\.imitation_share; leave them out",
        ),
        ({"run": {"max_env_step": 0}}, r"run\.max_env_step=0 only evaluates"),
    ],
)
def test_check_settings_says_what_ppo_cannot_do(layer, message):
    with pytest.raises(UserError, match=message):
        check_settings(make_settings(layer))


def test_check_game_packages_refuses_games_that_only_this_process_knows():
    def spec(source):
        request = GameRequest("maze:", RegisteredGame("maze", "mazes:make", source, "1.0"), "", ())
        return GameSpec("maze:", "registered", None, request.md5, request.name, request)

    check_game_packages([GameSpec("zork1.z5", "jericho", Path("zork1.z5"), "0", "zork1"), spec("mazes")])
    with pytest.raises(UserError, match=r"maze:: the game was registered by register_game .* add an entry point"):
        check_game_packages([spec("register_game")])


def test_connect_fails_at_once_if_there_is_no_cluster():
    settings = make_settings({"cluster": {"address": "127.0.0.1:1"}})
    with pytest.raises(UserError, match=r"cluster\.address=127\.0\.0\.1:1: cannot connect"):
        connect(settings, namespace="test")
    assert not ray.is_initialized()


def test_connect_explains_why_ray_does_not_start(tmp_path, monkeypatch):
    """The path of a Unix socket has at most 107 characters, and Ray's are long already."""
    folder = tmp_path / ("x" * 80)
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    message = rf"AF_UNIX path length .* Ray's folder is {folder}/ray; give another one .* RAY_TMPDIR=/tmp"
    with pytest.raises(UserError, match=message):
        connect(make_settings(), namespace="test")
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"Ray's folder .*/file/ray cannot be written .* RAY_TMPDIR=/tmp"):
        connect(make_settings(), namespace="test")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(connection, "MIN_FREE", 2**60)
    with pytest.raises(UserError, match=r"Ray's folder /tmp/ray: \d+ MB are free, but Ray needs at least"):
        connect(make_settings(), namespace="test")
    assert not ray.is_initialized()


def start_fails(message):
    def init(**arguments):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Exception(message)

    return init


def test_connect_reports_any_error_of_ray_and_keeps_the_handler_of_sigterm(monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(connection.ray, "init", start_fails("The current node timed out during startup."))
    with pytest.raises(UserError, match=r"timed out during startup.* logs are in .*/session_latest/logs.* ulimit -a"):
        connect(make_settings(), namespace="test")
    monkeypatch.setattr(connection.ray, "init", start_fails("Version mismatch: The cluster was started with:\n Ray: 1"))
    with pytest.raises(UserError, match=r"cluster\.address=auto: Version mismatch.* Use the same versions of Ray and"):
        connect(make_settings({"cluster": {"address": "auto"}}), namespace="test")
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: True)
    with pytest.raises(UserError, match=r"call ray\.shutdown\(\) before the run"):
        connect(make_settings(), namespace="test")
    assert signal.getsignal(signal.SIGTERM) is handler


async def test_run_on_cluster_in_a_running_event_loop_names_the_function_to_await():
    with pytest.raises(UserError, match=r"type: await run_on_cluster_async\(settings\)"):
        run_on_cluster(make_settings())


# ---- calls and restarts ----


def test_result_of_has_a_time_limit():
    with pytest.raises(ProcessError, match=r"the server did not reply within 0\.05 s"):
        asyncio.run(result_of(asyncio.sleep(5), timeout_s=0.05, process="the server"))


class FakeLearner:
    """Adds up values, and fails where the test wants it to."""

    def __init__(self, *, fails_at=()):
        self.num_starts, self.values, self.fails_at = 1, [], set(fails_at)
        self.saved = {}

    async def add(self, value):
        if value in self.fails_at:
            self.fails_at.remove(value)
            raise ProcessError(f"died at {value}")
        self.values.append(value)
        return sum(self.values)

    async def start(self):
        self.num_starts, self.values = self.num_starts + 1, []

    async def kill(self): ...

    async def save(self, folder):
        self.saved[folder] = list(self.values)

    async def load(self, folder):
        self.values = list(self.saved[folder])


async def test_restartable_learner_replays_the_calls_since_its_saved_state(tmp_path):
    learner = FakeLearner(fails_at={3, 6})
    restartable = RestartableLearner(learner, name="learner", folder=tmp_path, save_every=4, max_restarts=2)
    sums = [await restartable.step(lambda v=value: learner.add(v)) for value in range(1, 8)]
    assert sums == [1, 3, 6, 10, 15, 21, 28]  # as without a failure
    # The calls 1 and 2 are replayed; after the state was saved, at 4, only the call 5.
    assert (restartable.restarts, learner.num_starts, restartable.replayed) == (2, 3, 2 + 1)


def test_restartable_learner_ends_the_run_after_too_many_failures(tmp_path):
    learner = FakeLearner()

    async def fail():
        raise ProcessError("the learner died")

    restartable = RestartableLearner(learner, name="learner", folder=tmp_path, save_every=4, max_restarts=2)
    with pytest.raises(UserError, match=r"the learner died; the learner has already been restarted 2 times"):
        asyncio.run(restartable.step(fail))
    assert learner.num_starts == 3


# ---- actors in this process, without Ray ----


class LocalActor:
    """Has the interface of a Ray handle. A call returns its result, or an awaitable of it."""

    def __init__(self, actor, *, awaitable=False):
        self._actor, self._awaitable = actor, awaitable

    def __getattr__(self, name):
        return LocalMethod(getattr(self._actor, name), awaitable=self._awaitable)


@dataclasses.dataclass
class LocalMethod:
    method: object
    awaitable: bool

    def remote(self, *arguments):
        result = self.method(*arguments)
        return Ready(result) if self.awaitable else result


class Ready:
    """A finished awaitable, like Ray's references."""

    def __init__(self, value):
        self.value = value

    def __await__(self):
        return self.value
        yield


@pytest.fixture(scope="module")
def tiny_llm_folder(tmp_path_factory, smollm2):
    folder = tmp_path_factory.mktemp("llm")
    make_tiny_llm(smollm2.tokenizer).save(folder)
    return folder


def test_remote_vocabulary_shares_the_indices_of_the_registry(monkeypatch):
    monkeypatch.setattr(registry.ray, "get", lambda result, timeout: result)
    shared = LocalActor(Registry(make_settings({"env": {"action_space_size": 8}})))
    one, other = (RemoteVocabulary(shared, capacity=8, timeout_s=60.0) for _ in range(2))
    assert [v.indices(a).tolist() for v, a in [(one, "ab"), (other, "ba"), (other, "ac")]] == [[0, 1], [1, 0], [0, 2]]
    assert (one.num_used, other.num_used) == (2, 3)


def test_load_trained_parameters_refuses_missing_and_unknown_ones(smollm2):
    model = make_tiny_llm(smollm2.tokenizer).model
    state = dict(model.state_dict())
    load_trained_parameters(model, state)
    with pytest.raises(ValueError, match="unknown"):
        load_trained_parameters(model, {**state, "other.weight": torch.zeros(1)})
    state.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"missing \['model\.norm\.weight'\]"):
        load_trained_parameters(model, state)


async def test_prior_server_serves_published_parameters_also_after_a_restart(
    tmp_path, tiny_llm_folder, smollm2, monkeypatch
):
    settings = make_settings({"llm": {"path": str(tiny_llm_folder)}, "run": {"num_threads": 1}})
    shared = Registry(settings)
    monkeypatch.setattr(prior_server.ray, "get_actor", lambda name: LocalActor(shared, awaitable=True))
    other = make_tiny_llm(smollm2.tokenizer, seed=1)
    parameters = [Ready(other.model.state_dict())]
    request = PriorRequest("Where to?", ACTIONS)
    server = PriorServer(settings.model_copy(deep=True), tmp_path / "vllm.log")
    (before,) = await server.priors([request])
    shared.publish(2, parameters)
    assert await server.load_parameters(2, parameters) == 2
    (after,) = await server.priors([request])
    restarted_server = PriorServer(settings.model_copy(deep=True), tmp_path / "vllm2.log")
    (restarted,) = await restarted_server.priors([request])
    assert (before.version, after.version, restarted.version) == (0, 2, 2)
    assert np.abs(after.logprobs - before.logprobs).max() > 1e-3
    assert restarted.logprobs == pytest.approx(after.logprobs, abs=1e-5)
    row = other.row("Where to?", ACTIONS, end_of_turn=True)
    assert isinstance(row, PromptRow)
    with torch.no_grad():
        logprobs, mask = other.token_logprobs([row])
    assert after.rollout_logprobs == pytest.approx((logprobs * mask).sum(dim=1).numpy(), abs=1e-4)


class DeadCollector:
    """A collector that Ray has given up."""

    def collect(self, *arguments):
        return None, result_of_dead_actor()

    def __ray_ready__(self):
        return result_of_dead_actor()


async def result_of_dead_actor():
    raise ActorDiedError


class LiveCollector:
    def collect(self, num_steps, versions, world_model):
        report = CollectorReport({}, {}, [], num_steps, TimeUsage(0.0, {}, 0.0, 0.0), [], pid=1)
        return "segments", Ready(report)


async def test_collectors_continue_without_a_lost_one_and_end_the_run_without_any(monkeypatch):
    actors = iter([LocalActor(DeadCollector()), LocalActor(LiveCollector())])
    monkeypatch.setattr(collectors.ray, "remote", lambda actor: SimpleNamespace(options=lambda **options: factory))
    factory = SimpleNamespace(remote=lambda settings, servers: next(actors))
    settings = make_settings({"cluster": {"num_collectors": 2}})
    both = Collectors(settings, share=Share(0, 0), servers=["server 0"])
    both.start_all()
    result = await both.next_result()
    with pytest.raises(UserError, match="none of 2 collectors is left"):
        await both.next_result()  # the live one was not started again
    assert (result.collector, result.segments) == (1, "segments")
    assert result.report.env_steps == settings.train.collect_env_steps
    assert (both.restarts, both.lost) == (1, 1)


def test_merge_prior_metrics_adds_the_failures_of_both_sides():
    names = ("prior/fallbacks", "prior/retries", "prior/timeouts", "prior/latency_p50_s")
    collector, servers = dict(zip(names, (1.0, 2.0, 3.0, 4.0), strict=True)), dict.fromkeys(names, 0.5)
    merged = merge_prior_metrics({**collector, "prior/staleness_mean": 7.0}, servers)
    assert merged == {**dict(zip(names, (1.5, 2.5, 3.5, 0.5), strict=True)), "prior/staleness_mean": 7.0}


# ---- a run ----


def processes_of(name):
    """Processes of an actor class among the descendants of this process."""
    descendants = psutil.Process().children(recursive=True)
    return [p for p in descendants if f"ray::{name}" in " ".join(p.cmdline())]


def settings_of_nine_iterations(tmp_path, tiny_llm_folder):
    """Two collectors on a TextWorld game: the world model learns in every second iteration, the LLM in every third."""
    return make_settings(
        {
            "run": {
                "max_iter": 9,
                "output_dir": str(tmp_path),
                "exp_name": "run",
                "num_threads": 1,
                "seed": 3,
                "loggers": ["tensorboard", "csv"],
            },
            "env": {"max_episode_steps": 8, "collector_env_num": 1},
            "world_model": {"embed_dim": 64, "num_heads": 2},
            "search": {"num_simulations": 4},
            "train": {"collect_env_steps": 8, "batch_size": 8, "update_per_collect": 2, "update_every": 2},
            "prior": {"timeout_s": 300.0},
            "llm": {
                "path": str(tiny_llm_folder),
                "batch_size": 4,
                "micro_batch_size": 1,
                "update_every": 3,
                "learning_rate": 1e-3,
            },
            "ppo": {"critic_warmup_steps": 1, "max_staleness": 3, "max_decisions": 0},
            "cluster": {"num_collectors": 2, "num_learners": 2, "save_every": 2},
            "replay": {"segment_length": 8},
            "eval": {"every": 1000, "at_start": True, "modes": ["world_model_with_prior"]},
        }
    )


def check_checkpoint(folder, settings):
    """The checkpoint can be loaded: the world model with its action vocabulary, and the LLM, which has changed."""
    own = make_settings({"prior": {"enabled": False}, "eval": {"modes": ["world_model"]}})
    own.world_model.embed_dim, own.world_model.num_heads = 64, 2
    features = torch.load(folder / "world_model.pt", weights_only=True)
    size = next(t.shape[0] for name, t in features.items() if name.endswith("encoder.feature_mean"))
    vocabulary = ActionVocabulary(own.env.action_space_size)
    policy = PriorZeroPolicy(own, feature_size=size, device="cpu", llm=None)
    load_world_model_state(folder, policy=policy, indexer=vocabulary)
    assert vocabulary.num_used > 5
    llm = load_language_model(make_settings({"llm": {"path": str(folder / "llm")}}).llm, device=torch.device("cpu"))
    before = load_language_model(settings.llm, device=torch.device("cpu"))
    assert not torch.equal(llm.model.state_dict()["lm_head.weight"], before.model.state_dict()["lm_head.weight"])


@pytest.mark.slow
def test_run_on_cluster_survives_the_death_of_each_process(tmp_path, tiny_llm_folder, monkeypatch):
    """Two collectors on a TextWorld game; a collector, the server and a learner of each model are killed.

    Before the last is killed, all processes get all stop signals, and do not react.
    """
    victims = {2: "CollectorProcess", 4: "PriorServer", 5: "LearnerProcess", 7: "WorldModelProcess"}
    killed = []
    log = ClusterRun.log

    async def log_and_kill(run, report):
        await log(run, report)
        if run.counters.iteration == 6:  # as a batch system does, to all processes, Ray's own included
            for process in psutil.Process().children(recursive=True):
                send_stop_signals(process)
        name = victims.get(run.counters.iteration)
        if name is not None:
            # The collector that is busy; the second PPO learner, whose death breaks the connection of the first.
            found = processes_of(name)
            victim = next((p for p in found if ".collect" in " ".join(p.cmdline())), found[-1])
            victim.send_signal(signal.SIGKILL)
            killed.append(name)

    monkeypatch.setattr(ClusterRun, "log", log_and_kill)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # as fast as the other processes of this machine
    settings = settings_of_nine_iterations(tmp_path, tiny_llm_folder)
    summary = run_on_cluster(settings)
    assert killed == list(victims.values())
    _, left = psutil.wait_procs([p for name in victims.values() for p in processes_of(name)], timeout=30)
    assert not left

    # 9 iterations: the world model learns in every 2nd, the LLM in every 3rd.
    rows, scalars = summary.rows, read_events(summary.folder)
    assert rows["iterations"] == 9 and rows["environment steps"] >= 9 * 8
    assert rows["world-model updates"] == "8 in 4 turns"
    assert rows["PPO steps"] == "3, of which 2 changed the LLM"
    table = read_metrics_csv(summary.folder / "metrics.csv")
    assert [value for _, value in table["ppo/steps"]] == [1, 2, 3]
    assert {name: len(points) for name, points in table.items()} == {name: len(v) for name, v in scalars.items()}
    assert scalars["ppo/steps"] == [1, 2, 3] and len(scalars["train/wm_total_loss"]) == 4
    for name in ("collector", "server", "learner", "world_model"):
        assert scalars[f"cluster/{name}_restarts"][-1] == 1, name
    assert scalars["cluster/calls_replayed"][-1] > 0 and scalars["cluster/collectors_lost"][-1] == 0
    assert sum(scalars["ppo/samples"]) > 0 and all(np.isfinite(scalars["ppo/value_loss"]))
    assert sum(scalars["prior/fallbacks"]) == 0  # requests to the server that died have waited for its restart
    episodes = lines(summary.folder, "episodes.jsonl")
    assert len(episodes) == rows["episodes finished"] > 0
    assert [e["env_step"] for e in episodes] == sorted(e["env_step"] for e in episodes)
    assert "world_model_with_prior" in summary.evaluations
    run = read_run(summary.folder)
    assert (run.iteration, run.env_step) == (9, rows["environment steps"]) and run.on_cluster and run.is_evaluated
    assert (run.world_model_updates, run.llm_updates) == (8, 3) and len(run.transcripts[0]["steps"]) > 0
    assert (summary.folder / "report.html").is_file()
    evaluated = [line["env_step"] for line in lines(summary.folder, "evaluations.jsonl")]
    assert evaluated == [0, rows["environment steps"]]
    log = (summary.folder / "log" / "run.log").read_text()
    assert "before     after" in log and "updates     world model 8, LLM 2" in log
    check_checkpoint(summary.folder / "checkpoints" / "iteration_9", settings)
