"""The sections `stream` and `harvest`: how activations reach training, or shards on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .names import DtypeName, NormalisationName
from .rules import require, require_positive


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """The shuffle buffer between the language model and the coder."""

    buffer_tokens: int | None = None
    """Activations held by the shuffle buffer, in tokens a lane; None: the larger of 131,072 and
    64 contexts."""

    lanes: int | None = None
    """Parts that the text is divided into, each with its own buffer; None: one a process. A run can
    be continued on any number of processes that divides it."""

    reuse: int = 1
    """Times each activation is handed out before it is replaced: 1 streams, more makes passes."""

    reserved_tokens: int = 0
    """Activations that are set aside for good, the first of the first lane's buffer: training never
    sees them, and thresholds are set by them when a dictionary is saved, so that its L0 is what was
    asked for on new text (batchtopk, jumprelu with a target). For runs with `reuse`."""

    refill_fraction: float = 0.5
    """Share of the buffer replaced at a refill, in (0, 1]; 1 alternates whole buffers."""

    refill: Literal["auto", "inline", "thread"] = "auto"
    """Who refills the buffer: the trainer between two cycles, or a thread meanwhile; auto: a thread
    where there is a GPU. Batches are the same."""

    sequences_per_forward: int = 16
    """Contexts in one forward pass of the language model."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the buffer lives; auto: beside the coder."""

    dtype: DtypeName = "auto"
    """Precision of stored activations; auto: the model's own."""

    normalisation: NormalisationName = "mean_norm"
    """Units in which the coder is trained: mean_norm scales the mean norm to √d_in, standardise
    and whiten centre and scale by dimension or by covariance, layer_norm by token. Saved
    dictionaries work on raw activations."""

    calibration_sequences: int = 64
    """Contexts looked at before training for the normalisation, b_dec and the norm filter; the
    stream is not consumed by it."""

    shards: str | None = None
    """A folder that `sae harvest` wrote, read in place of running the model; None runs it."""

    resident_tokens: int = 0
    """Activations of `stream.shards`, in tokens over all processes, that stay in memory once read;
    0 leaves it to the system's file cache."""

    def __post_init__(self) -> None:
        require_positive(
            "stream",
            self,
            "buffer_tokens",
            "lanes",
            "reuse",
            "sequences_per_forward",
            "calibration_sequences",
        )
        require(
            0 < self.refill_fraction <= 1,
            "stream.refill_fraction",
            "must be in (0, 1]",
            self.refill_fraction,
            "Use 0.5.",
        )
        require(
            self.reserved_tokens >= 0,
            "stream.reserved_tokens",
            "must not be negative",
            self.reserved_tokens,
            "Use 0 to set nothing aside.",
        )
        require(
            self.buffer_tokens is None or self.reserved_tokens < self.buffer_tokens,
            "stream.reserved_tokens",
            f"must be below stream.buffer_tokens, {self.buffer_tokens}",
            self.reserved_tokens,
            "Lower it: a twelfth of the buffer is plenty.",
        )
        require(
            self.resident_tokens >= 0,
            "stream.resident_tokens",
            "must not be negative",
            self.resident_tokens,
            "Use 0 to keep nothing.",
        )


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """What `sae harvest` writes to disk."""

    folder: str | None = None
    """Where the shards go; None: `shards/` and the name of the YAML file."""

    tokens: int | None = None
    """Kept tokens written at most; None: one whole pass over the training documents."""

    shard_tokens: int | None = None
    """Kept tokens after which a file ends, with the forward pass they are in; None: what makes
    256 MiB."""

    def __post_init__(self) -> None:
        require_positive("harvest", self, "tokens", "shard_tokens")
