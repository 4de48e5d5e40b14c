"""The world model's learner: a process with the world model, its optimiser and the replay buffer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import ray
import torch

from priorzero.cluster.actors import set_up_process
from priorzero.learning import update_world_model
from priorzero.play.collector import Collected
from priorzero.policy import PriorZeroPolicy
from priorzero.runs.checkpoint import read_state, save_checkpoint, save_tensors
from priorzero.runs.nonfinite import NonFiniteUpdates
from priorzero.runtime.random_state import global_random_state, seed_globals, set_global_random_state
from priorzero.settings import Settings
from priorzero.types import Plain
from priorzero.world_model.records import RecordTable, read_records
from priorzero.world_model.replay import PriorZeroGameBuffer

STATE_FILE = "world_model_learner.pt"


class WorldModelProcess:
    """Learns the world model. Its state is a function of the sequence of calls, so that calls can be replayed."""

    def __init__(self, settings: Settings, feature_size: int, folder: Path) -> None:
        device = set_up_process(settings)
        *global_seeds, buffer_seed, _ = np.random.SeedSequence(settings.run.seed).spawn(5)
        seed_globals(global_seeds)
        self._settings = settings
        self._policy = PriorZeroPolicy(settings, feature_size=feature_size, device=device.type, llm=None)
        config = self._policy.lightzero_config
        self._buffer = PriorZeroGameBuffer(config, rng=np.random.default_rng(buffer_seed))
        self._nonfinite = NonFiniteUpdates(folder / "not_finite", limit=settings.train.max_nonfinite_updates)
        self._train_iter = 0
        self._version = 0

    def push(self, collected: Plain) -> dict[str, float]:
        """Store the segments of :meth:`CollectorProcess.collect`; returns the metrics of the replay buffer."""
        records = read_records(collected["records"])
        config = self._policy.lightzero_config
        self._buffer.push(Collected.from_state_dict(collected["segments"], records, config=config).segments)
        return self._buffer.scalars()

    def learn(self) -> tuple[dict[str, float], int]:
        """A turn of ``train.update_per_collect`` updates; none while the buffer holds less than a batch.

        Returns the metrics, and the number of updates so far.
        """
        metrics: dict[str, float] = {}
        batch_size = self._settings.train.batch_size
        if self._buffer.get_num_of_transitions() >= batch_size:
            for _ in range(self._settings.train.update_per_collect):
                _, update_metrics = update_world_model(
                    self._policy, self._buffer, self._nonfinite, batch_size=batch_size, train_iter=self._train_iter
                )
                if update_metrics:
                    self._train_iter += 1
                metrics.update(update_metrics)
            self._version += 1
            metrics["train/updates_left_out"] = float(self._nonfinite.total)
        return metrics, self._train_iter

    @ray.method(num_returns=2)
    def parameters(self) -> tuple[dict[str, torch.Tensor], int]:
        """The parameters of the world model on the CPU, and the number of turns that have changed them."""
        return {name: tensor.cpu() for name, tensor in self._policy.world_model_state().items()}, self._version

    def save(self, folder: Path) -> None:
        """Write everything that the next call depends on."""
        table = RecordTable()
        state = {
            "world_model": self._policy.world_model_state(),
            "policy": self._policy.training_state(),
            "buffer": self._buffer.state_dict(table),
            "records": table.state_dict(),
            "train_iter": self._train_iter,
            "version": self._version,
            "nonfinite": self._nonfinite.state_dict(),
            "random": global_random_state(),
        }
        save_checkpoint(folder, write=lambda temporary: save_tensors(state, temporary / STATE_FILE), about={})

    def load(self, folder: Path) -> None:
        state = read_state(folder, STATE_FILE)
        self._policy.load_world_model_state(state["world_model"])
        self._policy.load_training_state(state["policy"])
        self._buffer.load_state_dict(state["buffer"], read_records(state["records"]))
        self._train_iter, self._version = state["train_iter"], state["version"]
        self._nonfinite.load_state_dict(state["nonfinite"])
        set_global_random_state(state["random"])
