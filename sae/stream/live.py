"""Activations straight from a language model: text → contexts → forward → shuffle buffer.

`captured_contexts` keeps tokens and activations together, for evaluation and reports;
`LanguageModelSource` mixes the kept tokens' activations for training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.config import StreamConfig
from sae.stream.buffer import ShuffleBuffer
from sae.stream.contexts import CapturedContexts, Contexts
from sae.stream.hookpoints import Hookpoint, capture, width
from sae.stream.source import SourceState, require_finite
from sae.stream.tokens import ContextStream

if TYPE_CHECKING:
    from sae.stream.language_model import LanguageModel

DEFAULT_BUFFER_TOKENS = 131_072
MIN_CONTEXTS_IN_BUFFER = 64


def buffer_tokens(cfg: StreamConfig, context_size: int) -> int:
    """Return the buffer's size in tokens that `cfg` means."""
    return cfg.buffer_tokens or max(DEFAULT_BUFFER_TOKENS, MIN_CONTEXTS_IN_BUFFER * context_size)


def capture_contexts(
    lm: LanguageModel, hookpoint: Hookpoint, contexts: Contexts, *, max_norm: float | None = None
) -> CapturedContexts:
    """Run the model on `contexts` up to the hookpoint.

    `max_norm`, in raw units, also drops tokens of larger activation norm from `is_kept`.
    """
    activations = capture(lm.module, [hookpoint], contexts.tokens)[hookpoint]
    is_kept = contexts.is_kept.to(activations.device)
    if max_norm is not None:
        is_kept = is_kept & (activations.float().norm(dim=-1) <= max_norm)
    fields = {f.name: getattr(contexts, f.name) for f in dataclasses.fields(Contexts)}
    return CapturedContexts(**{**fields, "is_kept": is_kept}, activations=activations)


def captured_contexts(
    lm: LanguageModel,
    hookpoint: Hookpoint,
    contexts: Iterable[Contexts],
    *,
    max_norm: float | None = None,
) -> Iterator[CapturedContexts]:
    """Yield each batch of contexts with its activations."""
    for batch in contexts:
        yield capture_contexts(lm, hookpoint, batch, max_norm=max_norm)


class LanguageModelSource:
    """Shuffled activations of one hookpoint; an `ActivationSource`.

    Args:
        make_contexts: makes a `ContextStream` at its beginning; called once to train from and once
            for every calibration, so that calibrating consumes nothing.
        max_norm_ratio: drop tokens whose norm exceeds this multiple of the calibration's median.
        over_ranks: averages a number over the processes that train together.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hookpoint: Hookpoint,
        make_contexts: Callable[[], ContextStream],
        cfg: StreamConfig,
        *,
        context_size: int,
        seed: int,
        device: torch.device,
        max_norm_ratio: float | None = None,
        over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
    ):
        self.lm, self.hookpoint, self.cfg = lm, hookpoint, cfg
        self.make_contexts, self.contexts = make_contexts, make_contexts()
        self.name = str(hookpoint)
        self.d_in = width(lm.module, hookpoint, lm.device)
        self.max_norm_ratio, self.max_norm = max_norm_ratio, None
        self.context_size, self.over_ranks = context_size, over_ranks
        self.pending, self.n_filled = torch.empty(0, self.d_in), 0
        self._tell: Callable[[int, int], None] = _tell_nobody
        self.buffer = ShuffleBuffer(
            self._fill,
            buffer_tokens(cfg, context_size),
            self.d_in,
            seed=seed,
            reuse=cfg.reuse,
            refill_fraction=cfg.refill_fraction,
            dtype=lm.dtype if cfg.dtype == "auto" else getattr(torch, cfg.dtype),
            device=device if cfg.device == "auto" else torch.device(cfg.device),
        )

    def warm_up(self, tell: Callable[[int, int], None]) -> None:
        """Fill the buffer, telling (rows ready, rows needed) after every forward pass."""
        self._tell = tell
        self.buffer.warm_up()
        self._tell = _tell_nobody

    def next_batch(self, n: int) -> Tensor:
        """Return the next n activations, (n, d_in), in the buffer's dtype."""
        return self.buffer.next_batch(n)

    def calibration_sample(self) -> Tensor:
        """Return activations from the beginning of the text and set the norm filter from them."""
        self.max_norm = None
        contexts = self.make_contexts()
        batch_size = min(self.cfg.sequences_per_forward, self.cfg.calibration_sequences)
        n_batches = -(-self.cfg.calibration_sequences // batch_size)
        rows = [self._kept_rows(contexts.next_batch(batch_size)).cpu() for _ in range(n_batches)]
        sample = torch.cat(rows).float()
        if self.max_norm_ratio is not None:
            norms = sample.norm(dim=1)
            median = self.over_ranks(norms.median().to(self.lm.device))
            self.max_norm = self.max_norm_ratio * float(median)
            sample = sample[norms <= self.max_norm]
        return sample

    def state(self) -> SourceState:
        """Return the place in the text, the buffer, and the rows made but not yet stored."""
        position = {
            "contexts": self.contexts.state_dict(),
            "buffer": self.buffer.position_dict(),
            "max_norm": self.max_norm,
        }
        tensors = {"buffer": self.buffer.storage, "pending": self.pending}
        return SourceState(position, tensors)

    def load_state(self, state: SourceState) -> None:
        """Continue bit for bit from a saved place."""
        self.contexts.load_state_dict(state.position["contexts"])
        self.max_norm = state.position["max_norm"]
        self.pending = state.tensors["pending"].to(self.lm.device)
        self.buffer.load(state.position["buffer"], state.tensors["buffer"])

    def metadata(self) -> dict[str, object]:
        """Return what SAELens calls the origin of a dictionary."""
        return {
            "model_name": self.lm.name,
            "hook_name": self.name,
            "context_size": self.context_size,
            "max_norm": self.max_norm,
        }

    def _fill(self, n: int) -> Tensor:
        """Give the buffer at most n rows: the rest of the last forward, or a new one's."""
        if len(self.pending) == 0:
            self._require_enough_text()
            self.pending = self._kept_rows(self.contexts.next_batch(self.cfg.sequences_per_forward))
        rows, self.pending = self.pending[:n], self.pending[n:].clone()
        self.n_filled += len(rows)
        self._tell(self.n_filled, self.buffer.capacity)
        return rows

    def _kept_rows(self, contexts: Contexts) -> Tensor:
        captured = capture_contexts(self.lm, self.hookpoint, contexts, max_norm=self.max_norm)
        rows = captured.activations[captured.is_kept]
        require_finite(rows, self.name, "of one forward pass")
        return rows

    def _require_enough_text(self) -> None:
        """Refuse text whose first epoch ends before the buffer is full: it would hold copies."""
        if self.buffer.is_filled or self.contexts.epoch == 0:
            return
        raise ValueError(
            f"`data.source` must fill the buffer of {self.buffer.capacity} tokens once; "
            f"all its training documents give only about {self.n_filled} kept tokens, "
            f"{self.buffer.capacity - self.n_filled} too few. Give more text, or set "
            f"`stream.buffer_tokens` to at most {self.n_filled}."
        )


def _tell_nobody(_rows: int, _capacity: int) -> None:
    pass
