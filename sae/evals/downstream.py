"""What the language model loses when it runs on reconstructions.

Four forward passes over the same contexts, which differ only in what is written at the places:
    clean      nothing is written
    spliced    x_hat                    at every token that is not masked
    ablated    0, or the mean of x      at the same tokens
x is what the coder is to write: of a transcoder the activation at its target, of a coder of several
places that at each (of two models, the first's alone). How what is spliced in is made: `replacing`.
Masked tokens (BOS, padding, special, excluded, norm outliers: whatever `data.mask`,
`data.exclude_tokens` and `max_norm` leave out) keep their own activation in all four.

With CE the next token's negative log-probability in nats, means over the counted positions:
    ce_clean, ce_spliced, ce_ablated_zero, ce_ablated_mean
    delta_ce = ce_spliced − ce_clean; delta_ce_p50, _p95, _p99 its percentiles over positions
    loss_recovered_zero = (ce_ablated_zero − ce_spliced) / (ce_ablated_zero − ce_clean); _mean alike
    kl = mean of KL(clean ‖ spliced) over the vocabulary      top1_agreement = share of equal argmax
A position counts when its own activation may be replaced and its next token belongs to the same
document and is not masked by the stream (so BOS, padding and special tokens are no targets; a norm
outlier may be one). The same positions count in every term.
Loss recovered is given for two ablations because the zero one is a low bar: it saturates near 0.99.
It is undefined where ablating does no harm.
Source: Bricken et al. 2023, "Towards monosemanticity" (loss recovered against zero ablation).

Percentiles come from bins 0.001 nats wide: right to 0.0005 nats, but for losses that move by more
than 32 nats, which count as 32.
Cost: four full forward passes of the model, by far the dearest of the first three evals; one more
for each null beside it. Memory: the logits of two passes over at most LOGIT_ELEMENTS / (context ·
vocabulary) contexts.
Cannot see: absorption and splitting; whether latents mean anything; what the model would need on
other text. A dictionary that passes x through (identity) is perfect here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.evals.blocks import BlockSums, block_of
from sae.evals.bootstrap import with_intervals
from sae.evals.interface import EvalSetup, Label, ModelBatch, Seen, Undefined, Value
from sae.evals.replacing import clean_pass, logits_of, replaced, spliced
from sae.stream.contexts import Contexts

if TYPE_CHECKING:
    from sae.stream.language_model import LanguageModel

LOGIT_ELEMENTS = 2**26
CHUNK_ELEMENTS = 2**23
BIN_NATS = 0.001
MAX_NATS = 32
ZERO_BIN = round(MAX_NATS / BIN_NATS)
PERCENTILES = (50, 95, 99)
NO_TARGET = "no position counts: none has an unmasked next token in its document"
SUMS = ("n", "clean", "spliced", "zero", "mean", "kl", "agreement")

LABELS = {
    "ce_clean": Label("loss of the model", "nats"),
    "ce_spliced": Label("with reconstructions spliced in", "nats"),
    "ce_ablated_zero": Label("with activations set to 0", "nats"),
    "ce_ablated_mean": Label("with activations set to their mean", "nats"),
    "delta_ce": Label("loss added by the dictionary", "nats", better="lower", best=0),
    "delta_ce_p50": Label("its median over tokens", "nats"),
    "delta_ce_p95": Label("its 95th percentile", "nats"),
    "delta_ce_p99": Label("its 99th percentile", "nats"),
    "loss_recovered_zero": Label("loss recovered, against zero ablation", better="higher", best=1),
    "loss_recovered_mean": Label("loss recovered, against mean ablation", better="higher", best=1),
    "kl": Label("KL(clean ‖ spliced)", "nats", better="lower", best=0),
    "top1_agreement": Label("same most likely next token", "share", better="higher", best=1),
}


class Downstream:
    """Accumulate per-position losses of the four passes."""

    def __init__(self, setup: EvalSetup) -> None:
        self.setup, self.seen = setup, Seen()
        self.sums = BlockSums(SUMS)
        self.tokens_by_delta = torch.zeros(2 * ZERO_BIN + 1, dtype=torch.int64)

    def update(self, batch: ModelBatch) -> None:
        """Run the model on the batch's contexts, a few at once, and add the counted positions."""
        n_at_once = contexts_at_once(batch.lm, batch.contexts)
        for start in range(0, len(batch.contexts.tokens), n_at_once):
            rows = slice(start, start + n_at_once)
            contexts = Contexts(
                tokens=batch.contexts.tokens[rows].to(batch.lm.device),
                document_ids=batch.contexts.document_ids[rows].to(batch.lm.device),
                is_kept=batch.contexts.is_kept[rows].to(batch.lm.device),
            )
            is_whole = n_at_once >= len(batch.contexts.tokens)
            self._add(position_losses(batch, contexts, batch.shared if is_whole else None))

    def merge(self, other: Downstream) -> None:
        """Add another's positions."""
        self.seen.merge(other.seen)
        self.sums.merge(other.sums)
        self.tokens_by_delta += other.tokens_by_delta

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module; intervals for all but the percentiles."""
        n = self.seen.n_tokens
        harmless = "ablating the activations does not raise the loss" if n else NO_TARGET
        reasons = dict.fromkeys(LABELS, NO_TARGET)
        metrics = with_intervals(
            lambda weights: _statistics(self.sums.weighted(weights)),
            self.sums["n"] > 0,
            seed=self.setup.seed,
            n_resamples=self.setup.n_resamples,
            reasons=reasons
            | dict.fromkeys(("loss_recovered_zero", "loss_recovered_mean"), harmless),
        )
        return {**metrics, **self._percentiles()}

    def arrays(self) -> dict[str, Tensor]:
        """Return nothing: all of this module's results are numbers."""
        return {}

    def _add(self, losses: dict[str, Tensor]) -> None:
        document_ids = losses["document_ids"]
        self.seen.update(document_ids)
        self.sums.add(block_of(document_ids), losses)
        delta = losses["spliced"] - losses["clean"]
        bins = (delta.clamp(-MAX_NATS, MAX_NATS) / BIN_NATS).round().long() + ZERO_BIN
        self.tokens_by_delta += torch.bincount(bins, minlength=len(self.tokens_by_delta)).cpu()

    def _percentiles(self) -> dict[str, Value]:
        n, reached = self.seen.n_tokens, self.tokens_by_delta.cumsum(0) * 100
        if n == 0:
            return {f"delta_ce_p{p}": Undefined(NO_TARGET) for p in PERCENTILES}
        bins = {p: int((reached >= n * p).int().argmax()) for p in PERCENTILES}
        return {f"delta_ce_p{p}": (at - ZERO_BIN) * BIN_NATS for p, at in bins.items()}


@dataclass(frozen=True)
class Untouched:
    """What the passes without a dictionary's writing give; the same for all dictionaries.

    Shapes: logits (b, t, vocabulary); rows (b·t, Σ widths); may_replace (b·t) bool; counted,
    targets (n) int64; zero, mean (n) losses of the two ablations.
    """

    logits: Tensor
    rows: Tensor
    may_replace: Tensor
    counted: Tensor
    targets: Tensor
    zero: Tensor
    mean: Tensor


@torch.no_grad()
def position_losses(
    batch: ModelBatch, contexts: Contexts, shared: dict[object, object] | None = None
) -> dict[str, Tensor]:
    """Run the four passes and return, (n) each, what every counted position adds to each sum.

    The three that no dictionary writes into are kept in `shared`, and taken from there.
    """
    untouched = (shared or {}).get(Untouched)
    if not isinstance(untouched, Untouched):
        untouched = _untouched(batch, contexts)
    if shared is not None:
        shared[Untouched] = untouched
    counted, targets, may_replace = untouched.counted, untouched.targets, untouched.may_replace
    with spliced(batch.lm, batch.places, batch.coder, untouched.rows, may_replace):
        logits = logits_of(batch.lm, contexts.tokens)
    losses = _compared(untouched.logits, logits, counted, targets)
    return {
        **losses,
        "zero": untouched.zero,
        "mean": untouched.mean,
        "n": torch.ones_like(losses["clean"]),
        "document_ids": contexts.document_ids.flatten().to(counted.device)[counted],
    }


def _untouched(batch: ModelBatch, contexts: Contexts) -> Untouched:
    lm, places, coder = batch.lm, batch.places, batch.coder
    clean, rows = clean_pass(lm, places, contexts.tokens)
    may_replace = contexts.is_kept.flatten().to(rows.device)
    if batch.max_norm is not None:
        first = rows[:, coder.columns()[0]]
        may_replace = may_replace & (first.float().norm(dim=1) <= batch.max_norm)
    counted = counted_positions(contexts, may_replace)
    targets = contexts.tokens.flatten().to(counted.device)[counted + 1]

    def ablated(values: Tensor) -> Tensor:
        parts = coder.by_place(values.to(rows.device, torch.float32))
        with replaced(lm, places, may_replace, parts.__getitem__):
            return _cross_entropy(logits_of(lm, contexts.tokens), counted, targets)

    zero, mean = ablated(torch.zeros_like(batch.mean)), ablated(batch.mean)
    return Untouched(clean, rows, may_replace, counted, targets, zero, mean)


def contexts_at_once(lm: LanguageModel, contexts: Contexts) -> int:
    """Return how many contexts' logits are held at once."""
    size = contexts.tokens.shape[1] * _vocabulary_size(lm.module)
    return max(LOGIT_ELEMENTS // size, 1)


def counted_positions(contexts: Contexts, may_replace: Tensor) -> Tensor:
    """Return the positions that count, as int64 indices into the b·t flattened tokens."""
    ids = contexts.document_ids
    has_target = torch.zeros_like(contexts.is_kept)
    has_target[:, :-1] = contexts.is_kept[:, 1:] & (ids[:, 1:] == ids[:, :-1])
    return (has_target.flatten().to(may_replace.device) & may_replace).nonzero().squeeze(1)


def _vocabulary_size(module: torch.nn.Module) -> int:
    config = getattr(module, "config", None)
    text_config = getattr(config, "get_text_config", lambda: config)()
    return int(getattr(text_config, "vocab_size", 2**16))


def _log_probs(logits: Tensor, counted: Tensor) -> Iterator[Tensor]:
    """Yield log-probabilities in float32 at the counted positions, (chunk, vocabulary)."""
    rows = logits.flatten(0, 1)
    for chunk in _chunks(counted, rows.shape[-1]):
        yield rows[chunk].float().log_softmax(-1)


def _chunks(values: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    return values.split(max(CHUNK_ELEMENTS // vocabulary, 1))


def _at(log_probs: Tensor, targets: Tensor) -> Tensor:
    return -log_probs.gather(-1, targets[:, None]).squeeze(-1).double()


def _cross_entropy(logits: Tensor, counted: Tensor, targets: Tensor) -> Tensor:
    chunks = _chunks(targets, logits.shape[-1])
    losses = zip(_log_probs(logits, counted), chunks, strict=True)
    return torch.cat([_at(log_probs, chunk) for log_probs, chunk in losses])


def _compared(
    clean: Tensor, spliced: Tensor, counted: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Return losses of both passes, their KL divergence and agreement, (n) float64 each."""
    parts: dict[str, list[Tensor]] = {"clean": [], "spliced": [], "kl": [], "agreement": []}
    chunks = _chunks(targets, clean.shape[-1])
    pairs = zip(_log_probs(clean, counted), _log_probs(spliced, counted), chunks, strict=True)
    for p, q, chunk in pairs:
        parts["clean"].append(_at(p, chunk))
        parts["spliced"].append(_at(q, chunk))
        parts["kl"].append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
        parts["agreement"].append((p.argmax(-1) == q.argmax(-1)).double())
    return {name: torch.cat(values) for name, values in parts.items()}


def _statistics(s: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the metrics of weighted sums, (r) each."""
    return {
        "ce_clean": s["clean"] / s["n"],
        "ce_spliced": s["spliced"] / s["n"],
        "ce_ablated_zero": s["zero"] / s["n"],
        "ce_ablated_mean": s["mean"] / s["n"],
        "delta_ce": (s["spliced"] - s["clean"]) / s["n"],
        "loss_recovered_zero": _recovered(s["zero"], s),
        "loss_recovered_mean": _recovered(s["mean"], s),
        "kl": s["kl"] / s["n"],
        "top1_agreement": s["agreement"] / s["n"],
    }


def _recovered(ablated: Tensor, s: dict[str, Tensor]) -> Tensor:
    harm = ablated - s["clean"]
    return torch.where(harm > 0, (ablated - s["spliced"]) / harm, torch.nan)
