"""Start of a run: wrong input is reported before torch is imported, and the games start meanwhile."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from priorzero.envs import GameWorker
from priorzero.preflight import check_inputs, check_models, prepare
from priorzero.runtime.gpu import gpu_is_ruled_out
from priorzero.types import GameWorkerError, UserError
from tests.helpers.models import make_settings
from tests.helpers.toy_game import ToyGame, toy_games

ROOT = Path(__file__).parent.parent


def run_python(code, *, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=cwd, check=True)


def test_entry_makes_all_checks_without_torch(tmp_path, tiny_llm_folder):
    """The disk is checked last, after the games, the folder and both models."""
    arguments = ["--quick_test", "--set", f"llm.path={tiny_llm_folder}"]
    code = (
        "import shutil, sys, types\n"
        "from priorzero import entry\n"
        "shutil.disk_usage = lambda path: types.SimpleNamespace(total=10**9, free=10**6)\n"
        f"code = entry.main({arguments})\n"
        "print(code, {'torch', 'lzero', 'ding', 'scipy'} & set(sys.modules))"
    )
    done = run_python(code, cwd=tmp_path)
    assert done.stdout == "2 set()\n"
    assert "\nerror: run.output_dir=data_priorzero: 1 MB are free, but a checkpoint needs about" in done.stderr
    assert "--set run.output_dir=FOLDER" in done.stderr and list(tmp_path.iterdir()) == []


def test_entry_looks_for_a_run_to_resume_without_torch(tmp_path):
    code = "import sys; from priorzero import entry\nprint(entry.main(['--resume', '.']), 'torch' in sys.modules)"
    done = run_python(code, cwd=tmp_path)
    assert done.stdout == "2 False\n" and f"--resume {tmp_path}: it has no checkpoint" in done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": {"device": "cuda"}}, "run.device=cuda: torch sees no GPU"),
        ({"prior": {"engine": "vllm"}, "vllm": {"sleep": True}}, "vllm.sleep=true needs a GPU"),
        ({"prior": {"engine": "vllm"}, "vllm": {"tensor_parallel_size": 2}}, "tensor_parallel_size=2 needs that many"),
        ({"encoder": {"path": "./nowhere"}}, "encoder.path=./nowhere: no such folder"),
    ],
)
def test_check_models_refuses_settings_that_this_machine_cannot_run(monkeypatch, tiny_llm_folder, changes, words):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("priorzero.llm.engine_choice.importlib.util.find_spec", lambda _: object())
    settings = make_settings({"llm": {"path": str(tiny_llm_folder)}}, changes)
    with pytest.raises(UserError, match=words):
        check_models(settings)


@pytest.mark.parametrize(
    ("env_id", "unseen", "words"),
    [
        (",".join(f"textworld:simple?seed={n}" for n in range(12)), "", "multiple of the 12 games of run.env_id"),
        ("textworld:simple", "textworld:simple?seed=0&test=0", "eval.unseen contains games of run.env_id: textworld:s"),
        ("textworld:simple,textworld:simple?seed=0", "", "occurs twice"),
        ("", "", "run.env_id is empty"),
    ],
)
def test_check_inputs_refuses_games_that_do_not_fit_before_they_are_generated(monkeypatch, env_id, unseen, words):
    monkeypatch.setattr("priorzero.preflight.resolve_games", lambda _: pytest.fail("games are generated"))
    settings = make_settings({"run": {"env_id": env_id}, "eval": {"unseen": unseen}, "env": {"collector_env_num": 2}})
    with pytest.raises(UserError, match=words):
        check_inputs(settings)


def test_check_models_needs_no_disk_for_an_evaluation(monkeypatch, tiny_llm_folder):
    monkeypatch.setattr("priorzero.preflight.checkpoint_size", lambda *_, **__: 10**18)
    evaluation = {"llm": {"path": str(tiny_llm_folder)}, "run": {"max_env_step": 0}}
    check_models(make_settings(evaluation))
    evaluation["run"]["max_env_step"] = 1
    with pytest.raises(UserError, match="needs about 1000000000"):
        check_models(make_settings(evaluation))


def test_check_models_ignores_the_space_of_a_disk_that_does_not_know_its_size(monkeypatch, tiny_llm_folder):
    monkeypatch.setattr("priorzero.runtime.paths.shutil.disk_usage", lambda _: SimpleNamespace(total=0, free=0))
    check_models(make_settings({"llm": {"path": str(tiny_llm_folder)}}))


@pytest.mark.parametrize(
    ("build", "driver", "visible", "ruled_out"),
    [
        ({"cuda": None, "hip": None}, True, None, True),
        ({"cuda": "13.0", "hip": None}, True, None, False),
        ({"cuda": "13.0", "hip": None}, True, "0", False),
        ({"cuda": "13.0", "hip": None}, True, "", True),
        ({"cuda": "13.0", "hip": None}, True, "-1", True),
        ({"cuda": "13.0", "hip": None}, False, None, True),
        ({"cuda": None, "hip": "6.4"}, False, None, False),
    ],
)
def test_gpu_is_ruled_out(monkeypatch, build, driver, visible, ruled_out):
    def load(name):
        if not driver:
            raise OSError(name)

    monkeypatch.setattr(runpy, "run_path", lambda _: build)
    monkeypatch.setattr("priorzero.runtime.gpu.ctypes.CDLL", load)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_is_ruled_out() == ruled_out


def test_prepare_starts_the_games_and_ends_them(tmp_path, tiny_llm_folder):
    layer = {"run": {"env_id": "toy", "output_dir": str(tmp_path)}, "llm": {"path": str(tiny_llm_folder)}}
    with toy_games(in_process=False):
        with prepare(make_settings(layer)) as prepared:
            processes = [worker.pid for worker in prepared.workers]
            assert len(processes) == 2 and all(Path(f"/proc/{pid}").exists() for pid in processes)
            assert [path.name for path in prepared.folder.iterdir()] == [".lock"]
        assert list(tmp_path.iterdir()) == []  # nothing was written into the run's folder
        assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


def test_prepare_generates_no_game_before_the_models_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layer = {"run": {"env_id": "textworld:simple?seed=71"}, "llm": {"path": "./nowhere"}}
    for env_id, words in ((layer["run"]["env_id"], "llm.path=./nowhere"), ("textworld:simple?sed=7", "'sed'")):
        layer["run"]["env_id"] = env_id
        with pytest.raises(UserError, match=words), prepare(make_settings(layer)):
            pass
    assert list(tmp_path.iterdir()) == []


async def test_worker_that_was_launched_is_started_once():
    arguments = {"name": "toy", "seed": 0, "max_episode_steps": 5}
    worker = GameWorker(ToyGame, arguments, timeout_s=60, name="toy")
    worker.launch()
    pid = worker.pid
    await worker.start()
    state = await worker.reset()
    assert worker.pid == pid and state.valid_actions
    worker.kill()
    with pytest.raises(GameWorkerError, match="no worker process is running"):
        await worker.step("look")


@pytest.mark.slow
def test_imports_of_lightzero_leave_packages_out_that_can_be_imported_later(tmp_path):
    code = """
import sys
import priorzero.train
from priorzero.config import PRESETS, resolve_settings
from priorzero.policy import PriorZeroPolicy
from priorzero.world_model.imports import is_left_out
PriorZeroPolicy(resolve_settings(PRESETS["quick_test"]), feature_size=100, device="cpu", llm=None)
print([name for name in sys.modules if is_left_out(name)], "torch._inductor.compile_fx" in sys.modules)
import lzero.policy.unizero
try:
    lzero.policy.unizero.wandb.log({})
except ImportError as error:
    print(error)
import matplotlib.pyplot, scipy.stats, sklearn.metrics
print(round(float(scipy.stats.entropy([0.5, 0.5])), 4), sklearn.metrics.roc_curve([0, 1], [0.0, 1.0])[0][-1])
"""
    lines = run_python(code, cwd=tmp_path).stdout.splitlines()
    assert lines[0] == "[] False"
    assert lines[1].startswith("wandb.log was left out when LightZero was imported")
    assert lines[2] == "0.6931 1.0"
