"""What the learners of one model say to one another: nothing where there is one, PyTorch's collectives where several.

How gradients are exchanged and parameters are cut up is PyTorch's business: DistributedDataParallel, or FSDP2's
``fully_shard``. Both average gradients over the learners.
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
    """A learner alone.

    Attributes:
        rank: this learner's number, from 0.
        size: how many there are.
    """

    rank = 0
    size = 1

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose forward passes have their gradients exchanged; call it before an optimiser is made."""
        return module

    def accumulating(self, module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward pass of a micro-batch: gradients are exchanged in the last one."""
        return contextlib.nullcontext()

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over all learners, which all get the same."""
        return dict(values)

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """What :meth:`share` cut up, put together again."""
        return list(items)

    def share(self, items: Sequence[Any]) -> list[Any]:
        """This learner's part: every ``size``-th item. Parts are as long as one another if their number divides."""
        return list(items[self.rank :: self.size])

    def state_dict(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Trained parameters and optimiser state, whole, by name; all learners must call it.

        On a CPU these are the live tensors: write or copy them before the next step.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        model, optim = get_state_dict(module, optimizer, options=options)
        return {"model": model, "optimizer": optim}

    def load_state_dict(self, module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`, with as many learners as one likes."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            module,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True, strict=False),
        )

    def close(self) -> None:
        """Leave the group."""


class TorchGroup(ProcessGroup):
    """One of several learners, each in a process of its own, joined by ``torch.distributed``.

    Args:
        rank: this learner's number, from 0.
        size: how many there are.
        address: ``tcp://HOST:PORT`` of rank 0.
        sharding: ``"ddp"``: each has all parameters; ``"fsdp"``: each has a part of them, of their gradients and of the
            optimiser's state.
        device: where the model is; decides between gloo and nccl.
        timeout_s: the longest that one waits for the others.
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

            # No buffer of these models changes in a forward pass.
            return DistributedDataParallel(module, forward_sync_buffers=False)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self._device.type, (self.size,))
        for layers in [m for m in module.modules() if isinstance(m, nn.ModuleList)]:
            for layer in layers:
                fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    def accumulating(self, module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        # FSDP adds up what each micro-batch leaves in the shards: as good, with a little more to send.
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
