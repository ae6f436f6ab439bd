"""Several processes that train one network, each on its part of every batch: what they have to tell each other.

Each process takes the gradient of its own loss, and what the optimiser sees is the mean over the processes. That is the
gradient of one process with the whole batch under two conditions, which whoever computes a loss has to keep:

1. A mean over as many values in each process (all pixels, all images) is right as it is.
2. A mean over a number of values that differs (labelled pixels) divides by the mean number, `mean_over_processes`.
3. What compares images with each other, or takes statistics over them (similarities, batch norm in training), needs
   those of all processes: `gather_rows`, through which gradients flow back to the process that a row came from.
4. What is logged and what is checked is the mean: a loss that is not finite in one process stops all of them, in the
   same iteration.

With one process all of this is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_ilseg.errors import TrainingError


class Layout(NamedTuple):
    """Where the processes of a run are."""

    devices: int
    """On each machine, a process each."""
    nodes: int
    """Machines."""

    @property
    def processes(self) -> int:
        """All of them."""
        return self.devices * self.nodes


def process_layout(devices: int, environment: Mapping[str, str] = os.environ) -> Layout:
    """The processes of a run: as torchrun says in the environment, or `devices` of them on this machine.

    Args:
        devices: what the user asked for; 1 leaves it to torchrun.
        environment: variables of the process.

    Raises:
        TrainingError: torchrun has started another number of processes than was asked for.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return Layout(devices, 1)
    local, world = int(environment["LOCAL_WORLD_SIZE"]), int(environment["WORLD_SIZE"])
    if devices not in (1, local):
        raise TrainingError(
            "torchrun has started another number of processes than was asked for",
            where="--devices",
            found=f"{devices}, and {local} processes on this machine",
            expected=f"{local}",
            hint="leave --devices out: torchrun's --nproc-per-node says it",
        )
    return Layout(local, world // local)


def check_batch(batch_size: int, processes: int) -> None:
    """Raise `TrainingError` unless each process gets as many images of a batch."""
    if batch_size % processes:
        raise TrainingError(
            "the batch cannot be divided among the devices",
            found=f"batch_size {batch_size}, {processes} devices",
            expected="a multiple",
            hint=f"give a --batch-size that {processes} divides, or other --devices",
        )


def process_count() -> int:
    """How many processes train together; 1 where none were started."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, without gradient."""
    if process_count() == 1:
        return value
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total / process_count()


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, one process behind another, with gradients; as many rows in each."""
    if process_count() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """All-gather; its gradient for a row is the sum over the processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(process_count())]
        torch.distributed.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(total)
        start = torch.distributed.get_rank() * int(ctx.count)
        return total[start : start + ctx.count]
