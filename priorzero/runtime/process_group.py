"""Collective communication between the data-parallel learners of one model.

Gradients and parameters are exchanged by PyTorch: DistributedDataParallel, or FSDP2's ``fully_shard``. Both average
gradients over the learners.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

Sharding = Literal["ddp", "fsdp"]


class ProcessGroup:
    """The process group of a single learner: every operation is local."""

    rank = 0  # this learner's index
    size = 1  # number of learners

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return ``module`` prepared for the exchange of gradients. Call it before the optimiser is created."""
        return module

    def accumulate(self, module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of the forward and backward pass of a micro-batch; only the last one exchanges the gradients."""
        return contextlib.nullcontext()

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum each value over all learners. All learners get the same result."""
        return dict(values)

    def shard(self, items: Sequence[Any]) -> list[Any]:
        """This learner's part of ``items``: every ``size``-th item from ``rank`` on."""
        return list(items[self.rank :: self.size])

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """Collect the items of all learners. This is the inverse of :meth:`shard`."""
        return list(items)

    def state_dict(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The full trained parameters and optimiser state, by parameter name. All learners must call it.

        On a CPU the tensors are not copies. Write or copy them before the next optimiser step.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        model, optim = get_state_dict(module, optimizer, options=options)
        return {"model": model, "optimizer": optim}

    def load_state_dict(self, module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Load the result of :meth:`state_dict`. The number of learners may differ."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            module,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True, strict=False),
        )

    def close(self) -> None:
        """Destroy the process group."""


class TorchGroup(ProcessGroup):
    """The process group of several learners, one per process, which ``torch.distributed`` connects.

    Args:
        address: ``tcp://HOST:PORT`` of rank 0.
        sharding: ``"ddp"`` replicates the parameters; ``"fsdp"`` shards parameters, gradients and optimiser state.
        device: the model's device. The backend is gloo on a CPU and nccl on a GPU.
        timeout_s: time limit of one collective operation, in seconds.
    """

    def __init__(
        self, *, rank: int, size: int, address: str, sharding: Sharding, device: torch.device, timeout_s: float
    ) -> None:
        self.rank, self.size = rank, size
        self._sharding = sharding
        self._device = device
        torch.distributed.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            init_method=address,
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )

    def wrap(self, module: nn.Module) -> nn.Module:
        if self._sharding == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            # The buffers of these models do not change in a forward pass.
            return DistributedDataParallel(module, forward_sync_buffers=False)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self._device.type, (self.size,))
        for layers in [m for m in module.modules() if isinstance(m, nn.ModuleList)]:
            for layer in layers:
                fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    def accumulate(self, module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        # FSDP reduces the gradients of each micro-batch into its shards. The result is the same; more data is sent.
        return contextlib.nullcontext() if last or self._sharding == "fsdp" else module.no_sync()  # type: ignore[operator]

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def gather(self, items: Sequence[Any]) -> list[Any]:
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, list(items))
        longest = max(map(len, parts))
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def close(self) -> None:
        torch.distributed.destroy_process_group()
