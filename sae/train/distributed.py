"""The processes that train together: how they are found, and what they add up.

The only place that makes an `Accelerator`. A launch that would train unsynchronised copies is
refused.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor

from sae.config import RunConfig, TrainConfig
from sae.stream.opening import pick_device

SIZE_VARIABLES = (
    "WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
# The first process may download and convert a model while the others wait for it.
PATIENCE = timedelta(hours=3)
PLAIN_KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(run: RunConfig, train: TrainConfig) -> Accelerator:
    """Return the accelerator of this process.

    Errors: RuntimeError where the launcher started several processes that do not see each other,
    or where the device asked for is not there; ValueError where the batch cannot be divided.
    """
    device = pick_device(run.device)
    require_joinable()
    _forget_another_device(device)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",  # the trainer's module has its own autocast
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    require_synchronised(accelerator)
    require_plain(accelerator, device)
    require_divisible(train, accelerator.num_processes)
    return accelerator


def leave_group() -> None:
    """Take leave of the other processes, where there are any, once all is done.

    A process that ends with the group's threads running may be aborted, and its launcher then
    calls a finished run a failed one.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def require_synchronised(accelerator: Accelerator) -> None:
    """Stop where the launcher started more processes than the accelerator joins together."""
    if n_launched() != accelerator.num_processes:
        raise RuntimeError(unsynchronised_message(accelerator.num_processes))


def require_joinable() -> None:
    """Stop where a cluster's launcher started tasks that have no way to find each other."""
    if n_launched() > 1 and "MASTER_ADDR" not in os.environ:
        raise RuntimeError(unsynchronised_message(1))


def n_launched() -> int:
    """Return how many processes the launcher says it started."""
    return max(int(os.environ.get(name, "1")) for name in SIZE_VARIABLES)


def unsynchronised_message(n_joined: int) -> str:
    """Say that several processes would train copies that know nothing of each other."""
    return (
        f"all launched processes must train one coder; {n_launched()} were launched, but "
        f"`Accelerator` joins {n_joined}, so each would train its own unsynchronised copy. Launch "
        "with accelerate or torchrun, on GPUs one process a GPU; on CPU make it with "
        "`Accelerator(cpu=True)` or set ACCELERATE_USE_CPU=true."
    )


def require_plain(accelerator: Accelerator, device: torch.device) -> None:
    """Stop where the launcher asks for what this trainer does not do."""
    if accelerator.distributed_type not in PLAIN_KINDS:
        raise RuntimeError(
            "the launcher must ask for plain data-parallel training; it asks for "
            f"{accelerator.distributed_type.value}. Run `accelerate config` again without it."
        )
    if accelerator.device.type != device.type:
        raise RuntimeError(
            f"`run.device` asks for {device.type}, but the launcher (or ACCELERATE_USE_CPU) chose "
            f"{accelerator.device.type}. Change one of the two."
        )


def _forget_another_device(device: torch.device) -> None:
    """Let one process train on another device than before: accelerate keeps the first for good."""
    state = AcceleratorState._shared_state
    if state and state["device"].type != device.type and not dist.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)


def require_divisible(train: TrainConfig, n: int, of: str = "processes") -> None:
    """Refuse a batch that processes, or lanes, and micro-batches cannot share evenly."""
    parts = n * train.grad_accumulation_steps
    if train.batch_tokens % parts:
        raise ValueError(
            f"`train.batch_tokens` must be a multiple of {of} × train.grad_accumulation_steps "
            f"({n} × {train.grad_accumulation_steps}); got {train.batch_tokens}. Use "
            f"{train.batch_tokens // parts * parts or parts}."
        )


def require_divisible_lanes(lanes: int, n_processes: int) -> None:
    """Refuse processes that cannot share a stream's lanes evenly."""
    if lanes % n_processes:
        fitting = [str(n) for n in range(1, lanes + 1) if lanes % n == 0]
        raise ValueError(
            f"`stream.lanes` must be a multiple of the processes; got {lanes} lanes and "
            f"{n_processes} processes. Launch {', '.join(fitting)} of them, or, for a new run, set "
            f"`stream.lanes` to a multiple of {n_processes}."
        )


def is_first_process() -> bool:
    """Return whether this process speaks for all: where one message is enough."""
    return not dist.is_initialized() or dist.get_rank() == 0


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of `x` over all processes; `x` itself where there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of `x` over all processes."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return sum_over_ranks(x.clone()) / world_size


def gathered_rows(x: Tensor) -> Tensor:
    """Return the rows of `x` (n, …), n the same everywhere, of all processes, by their number."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def max_over_ranks(x: Tensor) -> Tensor:
    """Return the elementwise maximum of `x` over all processes."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x
