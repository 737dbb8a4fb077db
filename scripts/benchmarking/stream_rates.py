"""How fast rows go through the stream, each beside the rate that it cannot exceed."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sae.config import Config, StreamConfig
from sae.stream.buffer import ShuffleBuffer
from sae.stream.buffered import BufferedSource
from sae.stream.hookpoints import Hookpoint
from sae.stream.opening import OpenedModel
from sae.stream.rows import Block

Row = dict[str, Any]
FORWARDS = 6


def row(name: str, value: float, limit: float, unit: str, goal: float, note: str) -> Row:
    """Return a measured rate, what it is measured against, and whether their ratio is enough."""
    ratio = value / limit
    return {
        "name": name,
        "value": value,
        "limit": limit,
        "unit": unit,
        "ratio": ratio,
        "goal": f"≥ {goal}",
        "is_met": ratio >= goal,
        "note": note,
    }


def alternating(first: Callable[[], int], second: Callable[[], int], n: int) -> tuple[float, float]:
    """Return the median rates of two works that take turns; each returns what it has done."""
    rates: tuple[list[float], list[float]] = ([], [])
    for turn in range(n + 1):
        for work, found in zip((first, second), rates, strict=True):
            started = time.perf_counter()
            done = work()
            synchronise()
            if turn:  # the first of each warms up
                found.append(done / (time.perf_counter() - started))
    return statistics.median(rates[0]), statistics.median(rates[1])


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def live(opened: OpenedModel, cfg: Config, n: int) -> Row:
    """Measure text, tokens, forward, capture, choice and buffer against the bare forward."""
    reader = opened.reader()
    contexts = opened.contexts("train").next_batch(cfg.stream.sequences_per_forward)
    kept = int(contexts.is_kept.sum())
    # A turn hands out, and then fills again, what some forwards give.
    source = buffered(opened.rows(reader), cfg, buffer_tokens=2 * FORWARDS * kept)
    source.warm_up(lambda *_: None)
    forward = truncated(opened, contexts.tokens)

    def through() -> int:
        return len(source.next_rows(FORWARDS * kept)[0])

    def bare() -> int:
        for _ in range(FORWARDS):
            forward()
        return FORWARDS * kept

    value, limit = alternating(through, bare, n)
    name = f"live: {', '.join(reader.names)}"
    note = "limit: the forward up to the same layer, without hooks, on tokens that are there"
    return row(name, value, limit, "activations/s", 0.95, note)


def truncated(opened: OpenedModel, tokens: Tensor) -> Callable[[], None]:
    """Return a forward of the model's layers up to the deepest that is read, without hooks."""
    base: Any = opened.lm.module.base_model
    path, deepest = max(map(_layer, opened.hookpoints), key=lambda found: found[1])
    parent, _, name = path.rpartition(".")
    owner, layers = opened.lm.module.get_submodule(parent), opened.lm.module.get_submodule(path)
    there = tokens.to(opened.lm.device)
    assert isinstance(layers, torch.nn.ModuleList)

    @torch.no_grad()
    def forward() -> None:
        setattr(owner, name, layers[: deepest + 1])
        try:
            base(there, use_cache=False)
        finally:
            setattr(owner, name, layers)

    return forward


def _layer(hookpoint: Hookpoint) -> tuple[str, int]:
    """Return the path of the list of layers that a hookpoint is in, and its number there."""
    parts = hookpoint.path.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:place]), int(parts[place])


def buffered(stream: Any, cfg: Config, **changes: Any) -> BufferedSource:
    """Return a source of one lane over a stream."""
    settings = {"buffer_tokens": cfg.stream.buffer_tokens, **changes}
    return BufferedSource(
        {0: stream},
        StreamConfig(**settings),
        context_size=cfg.data.context_size,
        seed=0,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


class ReadyRows:
    """A stream whose blocks are there already: the fastest producer that there is."""

    def __init__(self, width: int, n: int, dtype: torch.dtype, device: torch.device):
        self.names, self.widths, self.dtypes, self.epoch = ("ready",), (width,), (dtype,), 0
        rows = torch.randn(n, width, device=device).to(dtype)
        self.block = Block((rows,), torch.arange(n))

    def next_block(self) -> Block:
        return self.block

    def sample(self) -> Block:
        return self.block

    def token_counts(self) -> dict[str, float]:
        return {}

    def metadata(self) -> dict[str, object]:
        return {}


def hand_out(width: int, capacity: int, batch: int, n: int) -> Row:
    """Measure batches out of the buffer against a plain gather of as many random rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    buffer = ShuffleBuffer(capacity, (width,), (dtype,), seed=0, reuse=100, device=device)
    ready = ReadyRows(width, 4096, dtype, device).block
    while buffer.room:
        k = min(buffer.room, 4096)
        buffer.put((ready.rows[0][:k],), ready.documents[:k])
        buffer.filled(k)
    buffer.turn()
    at_random = torch.randint(capacity, (n + 1, batch), device=device)
    turns = iter(range(n + 1))
    row_bytes = batch * width * dtype.itemsize

    def out() -> int:
        buffer.take(batch)
        buffer.taken(batch)
        return row_bytes

    def gather() -> int:
        buffer.storage[0].index_select(0, at_random[next(turns)])
        return row_bytes

    value, limit = alternating(out, gather, n)
    note = f"{batch} of {capacity:,} rows of {width} {str(dtype)[6:]}; limit: a plain gather"
    return row("buffer: hand-out", value / 1e9, limit / 1e9, "GB/s read", 0.8, note)
