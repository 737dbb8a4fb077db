"""The processes that train together: how they are found, and what they add up.

The only place that makes an `Accelerator`. A launch that would train unsynchronised copies is
refused.
"""

from __future__ import annotations

import os

import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from sae.config import RunConfig, TrainConfig
from sae.stream.opening import pick_device


def make_accelerator(run: RunConfig, train: TrainConfig) -> Accelerator:
    """Return the accelerator of this process.

    Errors: RuntimeError where the launcher started several processes that do not see each other,
    or where the device asked for is not there; ValueError where the batch cannot be divided.
    """
    accelerator = Accelerator(cpu=pick_device(run.device).type == "cpu")
    require_synchronised(accelerator)
    require_divisible(train, accelerator.num_processes)
    return accelerator


def require_synchronised(accelerator: Accelerator) -> None:
    """Stop where the launcher started more processes than the accelerator joins together."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise RuntimeError(
            f"all launched processes must train one coder; {launched} were launched, but "
            f"`Accelerator` joins {accelerator.num_processes}, so each would train its own "
            "unsynchronised copy. On CPU make it with `Accelerator(cpu=True)` or set "
            "ACCELERATE_USE_CPU=true; on GPUs launch one process a GPU."
        )


def require_divisible(train: TrainConfig, world_size: int) -> None:
    """Refuse a batch that processes and micro-batches cannot share evenly."""
    parts = world_size * train.grad_accumulation_steps
    if train.batch_tokens % parts:
        raise ValueError(
            "`train.batch_tokens` must be a multiple of processes × train.grad_accumulation_steps "
            f"({world_size} × {train.grad_accumulation_steps}); got {train.batch_tokens}. Use "
            f"{train.batch_tokens // parts * parts or parts}."
        )


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of `x` over all processes; `x` itself where there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
    return x


def max_over_ranks(x: Tensor) -> Tensor:
    """Return the elementwise maximum of `x` over all processes."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x
