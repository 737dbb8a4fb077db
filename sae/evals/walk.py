"""Activations on their way through a dictionary and its evals: the dictionary's, or a null's.

Both are given what was captured once, so that the model runs once. Codes shuffled in time take a
way of their own: `rotation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from sae.coder.latents import Latents, joined
from sae.config import EvalName
from sae.evals.evaluable import Evaluable
from sae.evals.finishing import Clock
from sae.evals.inputs import Capture
from sae.evals.interface import Accumulator, ContextBatch, EvalBatch, ModelBatch, Reads
from sae.evals.nulls import ShuffledCodes, pass_on
from sae.evals.registry import EVALS
from sae.evals.rotation import NO_CODES, Rotation
from sae.evals.shared import Shared
from sae.evals.truth import SampledContexts, TruthBatch
from sae.stream.contexts import CapturedContexts
from sae.stream.source import require_finite

ON_ROWS: tuple[Reads, ...] = ("activations", "world")
WALKED: tuple[Reads, ...] = (*ON_ROWS, "contexts")


class Walk:
    """A dictionary, its evals in progress, and its L0.

    Args:
        evals: by name, just started. capture: of which model the activations are, and where; None
            on a world. clock: told what coder and evals take. shared: told of every batch, for the
            one dictionary whose results these are.
    """

    def __init__(
        self,
        coder: Evaluable,
        evals: Mapping[EvalName, Accumulator],
        capture: Capture | None = None,
        *,
        clock: Clock | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.coder, self.evals = coder, dict(evals)
        self.lm, self.places, self.place = None, None, "the world"
        if capture is not None:
            self.lm, self.places, self.place = capture.lm, capture.places, capture.place
        self.clock, self._shared = clock or Clock(), shared
        shuffled = coder.coder if isinstance(coder.coder, ShuffledCodes) else None
        self.rotation = None if shuffled is None else Rotation()
        # Of shuffled codes, the dictionary whose codes they are encodes and writes.
        self._inner = coder if shuffled is None else shuffled.inner
        self._on_model: dict[EvalName, Evaluable] = {}
        self._n_tokens = self._n_active = 0

    @property
    def l0(self) -> float:
        """Latents a token so far."""
        return self._n_active / max(self._n_tokens, 1)

    def add(self, captured: CapturedContexts) -> None:
        """Encode a batch's unmasked tokens once and feed every eval of activations."""
        latents = self.encoded(captured)
        if self.rotation is None:
            self._feed(captured, latents)
            return
        for piece in self.rotation.add(captured, latents):
            self._feed(*piece)

    def finish(self) -> None:
        """Feed what was held back."""
        for piece in self.rotation.finish() if self.rotation else ():
            self._feed(*piece)

    @torch.no_grad()
    def encoded(self, captured: CapturedContexts) -> Latents:
        """Return the code of a batch's unmasked tokens, (n, k)."""
        x, kept = kept_rows(captured)
        require_finite(x, self.place, "of an evaluated batch")
        codes = [Latents(*(part.to(x.device) for part in NO_CODES))]
        for rows in self.coder.chunks(len(x)):
            if isinstance(captured, SampledContexts):
                pass_on(self._inner, captured.codes.flatten(0, 1)[kept[rows]])
            with self.clock.timed("coder"):
                codes.append(self._inner.code_of(self._inner.sites.read(x[rows])))
        return joined(codes)

    def run_model(self, name: EvalName, make_batch: Callable[..., ModelBatch]) -> None:
        """Feed an eval that runs the model.

        Codes shuffled in time start anew for each, where they started on the activations.
        """
        if name not in self._on_model:
            self._on_model[name] = self._for_model()
        with self.clock.timed(name):
            self.evals[name].update(make_batch(self._on_model[name]))

    def _for_model(self) -> Evaluable:
        if self.rotation is None:
            return self.coder
        shuffled = ShuffledCodes(self._inner, first=self.rotation.first)
        return Evaluable(shuffled, self.coder.sites.width)

    def _feed(self, captured: CapturedContexts, latents: Latents) -> None:
        x, kept = kept_rows(captured)
        tokens, document_ids = (
            part.to(x.device).flatten()[kept] for part in (captured.tokens, captured.document_ids)
        )
        for rows in self.coder.chunks(len(x)):
            code = Latents(latents.values[rows], latents.indices[rows])
            with self.clock.timed("coder"):
                x_hat = self._inner.write(code, self._inner.sites.read(x[rows]))
            make = EvalBatch
            if isinstance(captured, SampledContexts):
                make = partial(TruthBatch, codes=captured.codes.flatten(0, 1)[kept[rows]])
            batch = make(self.coder.written(x[rows]), x_hat, code, tokens[rows], document_ids[rows])
            if self._shared is not None:
                self._shared.update(batch)
            self._update(ON_ROWS, batch)
        self._n_tokens += len(x)
        self._n_active += int(latents.l0().sum())
        self._update(("contexts",), ContextBatch(captured, latents, kept, self.lm, self.places))

    def _update(self, kinds: tuple[str, ...], batch: EvalBatch | ContextBatch) -> None:
        for name, accumulator in self.evals.items():
            if EVALS[name].reads in kinds:
                with self.clock.timed(name):
                    accumulator.update(batch)


def kept_rows(captured: CapturedContexts) -> tuple[Tensor, Tensor]:
    """Return the unmasked tokens' rows (n, Σ widths), in float32 or 64, and where they lie."""
    x = captured.activations.flatten(0, 1)
    kept = captured.is_kept.to(x.device).flatten().nonzero()[:, 0]
    x = x[kept]
    return (x if x.dtype == torch.float64 else x.float()), kept
