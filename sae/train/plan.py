"""What a run will cost, before it starts: memory, disk, time.

The run is set up as it would be, only with a buffer of two forward passes, and goes on for a few
seconds. What it takes meanwhile is measured; what grows with the run is added by arithmetic.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from sae.coder.sites import Sites
from sae.config import Config
from sae.configuration import from_flat
from sae.stream.buffered import BufferedSource, buffer_tokens
from sae.train.distributed import make_accelerator
from sae.train.memory import available, in_use, peak, reset_peak
from sae.train.run import open_source, resolve, with_dtypes, with_lanes
from sae.train.schedule import n_steps
from sae.train.state import TrainState
from sae.train.steps import make_step
from sae.train.trainer import make_state

CALIBRATION_SECONDS = 5.0
MIN_TURNS = 3
# A checkpoint makes a copy of the coder in raw units, and turns W_enc round for the file.
CHECKPOINT_COPIES = 1.5


@dataclass(frozen=True)
class Speed:
    """What was measured: rows a second out of the model or the disk, and seconds a step."""

    rows_per_second: float
    step_seconds: float


@dataclass(frozen=True)
class Plan:
    """What a run costs.

    memory: bytes by part, of one process on `device`; together they are its peak. disk: bytes by
    part, all that the run's folder will hold. seconds: all of the run, on `n_processes`. members:
    names of a fleet's, whose parts are those of all together.
    """

    device: str
    n_processes: int
    tokens: int
    steps: int
    memory: dict[str, int]
    memory_available: int
    disk: dict[str, int]
    disk_free: int
    speed: Speed
    seconds: float
    members: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes of memory at the worst moment."""
        return sum(self.memory.values())

    def problems(self) -> list[str]:
        """Return what does not fit, each with the field to change."""
        found = []
        if self.peak > self.memory_available:
            largest = max(self.memory, key=self.memory.__getitem__)
            remedy = REMEDIES.get(largest, REMEDY)
            if largest == "shuffle buffer" and self.device != "cpu":
                remedy = "Lower `stream.buffer_tokens`, or set `stream.device: cpu`."
            found.append(
                f"memory: {gigabytes(self.peak)} are needed, {gigabytes(self.memory_available)} "
                f"are there; most is {largest}. {remedy}"
            )
        needed = sum(self.disk.values())
        if needed > self.disk_free:
            found.append(
                f"disk: {gigabytes(needed)} are needed, {gigabytes(self.disk_free)} are free. "
                "Lower `train.keep_checkpoints` or `stream.buffer_tokens`, or set `run.folder`."
            )
        return found


REMEDY = "Use a larger machine."
REMEDIES = {
    "model": "Set `model.dtype: bfloat16`, or `model.device` to another device.",
    "shuffle buffer": "Lower `stream.buffer_tokens`.",
    "coder": "Lower `coder.d_sae`.",
    "optimiser": "Set `train.adam_moments: 8bit`, or lower `coder.d_sae`.",
    "average": "Leave out `train.ema_decay`, or lower `coder.d_sae`.",
    "work and libraries": "Lower `stream.sequences_per_forward` or `train.batch_tokens`.",
    "checkpoint": "Lower `coder.d_sae`.",
}


def plan(cfg: Config, *, seconds: float = CALIBRATION_SECONDS) -> Plan:
    """Return what a run of `cfg` will cost, from its first `seconds`. Nothing is written.

    Errors: those of the run itself, for a configuration that cannot work.
    """
    require_measurable(cfg)
    if not cfg.fleet.is_empty:
        from sae.train.fleet_plan import plan_fleet  # which is made of this module's parts

        return plan_fleet(cfg, seconds)
    accelerator = make_accelerator(cfg.run, cfg.train)
    device, folder = accelerator.device, Path(cfg.run.folder or "runs/run")
    cfg = with_lanes(cfg, folder, accelerator.num_processes)
    reset_peak(device)
    source = open_source(with_small_buffer(cfg), accelerator)
    assert isinstance(source, BufferedSource)
    try:
        sites = Sites.of(cfg.coder, source.widths)
        cfg = resolve(with_dtypes(cfg, source), sites, folder, device)
        loading = peak(device)
        reset_peak(device)
        state = make_state(cfg, source, accelerator)
        speed = measure(cfg, state, accelerator, seconds)
        memory = memory_parts(cfg, source, [state], device, loading)
    finally:
        source.close()
    disk = disk_parts(cfg, [state], memory["shuffle buffer"], accelerator.num_processes)
    return plan_of(cfg, source, accelerator, speed, memory, disk)


def require_measurable(cfg: Config) -> None:
    """Refuse a world, whose speed is seen by training on it."""
    if cfg.world.name:
        raise ValueError(
            "`sae plan` must be given a model and text, or shards; got the world "
            f"{cfg.world.name!r}. Train on it with a small `train.tokens` to see its speed."
        )


def plan_of(
    cfg: Config,
    source: BufferedSource,
    accelerator: Accelerator,
    speed: Speed,
    memory: dict[str, int],
    disk: dict[str, int],
    members: tuple[str, ...] = (),
) -> Plan:
    """Return the plan of a resolved `cfg` from what was measured and what was added up."""
    device = accelerator.device
    return Plan(
        device=str(device),
        n_processes=accelerator.num_processes,
        tokens=cfg.train.tokens,
        steps=n_steps(cfg.train),
        memory=memory,
        memory_available=available(device),
        disk=disk,
        disk_free=disk_free(Path(cfg.run.folder or "runs/run")),
        speed=speed,
        seconds=duration(cfg, speed, source, accelerator),
        members=members,
    )


def with_small_buffer(cfg: Config) -> Config:
    """Return `cfg` with a buffer that two forward passes fill."""
    two = 2 * cfg.stream.sequences_per_forward * cfg.data.context_size
    tokens = min(two, buffer_tokens(cfg.stream, cfg.data.context_size))
    small = {"stream.buffer_tokens": tokens, "stream.reserved_tokens": 0, "stream.refill": "inline"}
    return from_flat(small, cfg)


def measure(cfg: Config, state: TrainState, accelerator: Accelerator, seconds: float) -> Speed:
    """Read blocks for half of the time and take training steps for the other."""
    source, device = state.source, accelerator.device
    assert isinstance(source, BufferedSource)
    step = make_step(cfg, state, accelerator)
    n_micro = cfg.train.grad_accumulation_steps
    n = cfg.train.batch_tokens // accelerator.num_processes // n_micro
    x = state.calibration.normaliser.apply(source.calibration_sample().to(device))
    x = x.repeat(-(-n // len(x)), 1)[:n].clone()

    def one_step() -> None:
        step([x] * n_micro, 0.0)
        state.step += 1

    return timed(source, one_step, device, seconds)


def timed(
    source: BufferedSource, take_step: Callable[[], None], device: torch.device, seconds: float
) -> Speed:
    """Return how fast blocks are read and steps are taken, each for half of the time."""
    lane = next(iter(source.lanes.values()))

    def one_step() -> int:
        take_step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1

    rows, read_seconds = repeated(lambda: len(lane.stream.next_block().documents), seconds / 2)
    steps, step_seconds = repeated(one_step, seconds / 2)
    return Speed(rows / read_seconds, step_seconds / steps)


def repeated(turn: Callable[[], int], seconds: float) -> tuple[int, float]:
    """Return what some turns give together and how long they take, the first left out."""
    turn()
    total, n, started = 0, 0, time.monotonic()
    while n < MIN_TURNS or time.monotonic() - started < seconds:
        total, n = total + turn(), n + 1
    return total, time.monotonic() - started


def memory_parts(
    cfg: Config,
    source: BufferedSource,
    states: Sequence[TrainState],
    device: torch.device,
    loading: int,
) -> dict[str, int]:
    """Return the bytes of each part at the worst moment; `loading` is the peak before the run.

    `states` are those of all coders that train together.
    """
    averages = [tensor for state in states if state.ema for tensor in state.ema.tensors.values()]
    parts = {
        "model": source.model_bytes(device),
        "shuffle buffer": buffer_bytes(cfg, source) if on(device, source) else 0,
        "coder": sum(map(coder_bytes, states)),
        "optimiser": sum(t.nbytes for s in states for t in s.optimiser.tensors().values()),
        "average": sum(tensor.nbytes for tensor in averages),
    }
    small = sum(
        tensor.nbytes
        for lane in source.lanes.values()
        for tensor in lane.buffer.tensors().values()
        if tensor.device.type == device.type
    )
    known = sum(parts.values()) - parts["shuffle buffer"] + small
    now, most = in_use(device), peak(device)
    parts["work and libraries"] = max(0, most - known)
    if device.type == "cpu":
        # Where averages are kept, they pass through a coder of their own.
        copies = CHECKPOINT_COPIES + any(bool(state.averages()) for state in states)
        extra = int(copies * max(map(coder_bytes, states))) - (most - now)
        parts["checkpoint"] = max(0, extra)
    if loading > sum(parts.values()):
        parts["loading the model"] = loading - sum(parts.values())
    return parts


def on(device: torch.device, source: BufferedSource) -> bool:
    """Say whether the buffers lie in the memory that is planned."""
    return next(iter(source.lanes.values())).buffer.device.type == device.type


def buffer_bytes(cfg: Config, source: BufferedSource) -> int:
    """Return the bytes of this process's buffers and of what belongs to them."""
    tokens = buffer_tokens(cfg.stream, cfg.data.context_size) * len(source.lanes)
    widths = zip(source.widths, source.dtypes, strict=True)
    a_row = sum(width * dtype.itemsize for width, dtype in widths)
    # Beside a row: its document, its place in the order of each pass, and the slot that it frees.
    replaced = cfg.stream.refill_fraction * (cfg.stream.reuse + 1)
    return int(tokens * (a_row + 8 * (1 + replaced)))


def coder_bytes(state: TrainState) -> int:
    """Return the bytes of a coder."""
    return sum(t.nbytes for t in state.coder.state_dict().values())


def disk_parts(
    cfg: Config, states: Sequence[TrainState], buffers: int, n_processes: int
) -> dict[str, int]:
    """Return the bytes that the run's folder will hold, while one checkpoint more is written."""
    coder = sum(map(coder_bytes, states))
    shared = coder + sum(t.nbytes for state in states for t in state.tensors().values())
    own = buffers + sum(t.nbytes for state in states for t in state.own_tensors().values())
    kept = min(cfg.train.keep_checkpoints + 1, 1 + n_steps(cfg.train) // checkpoint_interval(cfg))
    return {"dictionary": coder, "checkpoints": kept * (shared + n_processes * own)}


def checkpoint_interval(cfg: Config) -> int:
    """Return the steps between checkpoints of a resolved `cfg`."""
    assert cfg.train.checkpoint_every_steps is not None
    return cfg.train.checkpoint_every_steps


def disk_free(folder: Path) -> int:
    """Return the free bytes of the disk that `folder` is, or will be, on."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(there).free


def duration(cfg: Config, speed: Speed, source: BufferedSource, accelerator: Accelerator) -> float:
    """Return the seconds of the whole run: filling the buffers, then reading and training."""
    held = buffer_tokens(cfg.stream, cfg.data.context_size) * len(source.lanes)
    fresh = cfg.train.tokens / cfg.stream.reuse / accelerator.num_processes
    reading, training = fresh / speed.rows_per_second, n_steps(cfg.train) * speed.step_seconds
    is_threaded = cfg.stream.refill == "thread" or (
        cfg.stream.refill == "auto" and accelerator.device.type == "cuda"
    )
    both = max(reading, training) if is_threaded else reading + training
    return held / speed.rows_per_second + both


def gigabytes(n: float) -> str:
    """Return bytes as a person reads them."""
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"
