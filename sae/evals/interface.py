"""What an eval is: a mergeable accumulator, what it is fed, and what it may answer.

The one idea: an eval holds sums. `update` adds a batch, `merge` adds another accumulator of the
same kind, `compute` divides once. But for float64 rounding the value does not depend on how tokens
were split into batches, on their order, or on which process saw them. The rows that make evals
known by name are in `registry`; the loop that feeds them is in `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import field as record_field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.config import EvalConfig
from sae.stream.contexts import CapturedContexts, Contexts

if TYPE_CHECKING:
    from sae.evals.evaluable import Evaluable
    from sae.evals.replacing import Places
    from sae.evals.truth import Truth
    from sae.stream.language_model import LanguageModel


@dataclass(frozen=True)
class Undefined:
    """The answer where a metric has no value, and why; never NaN."""

    reason: str


Value: TypeAlias = float | Undefined
Reads: TypeAlias = Literal["activations", "contexts", "model", "labelled", "world", "weights"]
Unit: TypeAlias = Literal["number", "share", "nats", "latents"]
Better: TypeAlias = Literal["higher", "lower", ""]


DEFECTS = (
    *("random", "pca", "identity", "permuted decoder", "shuffled codes"),
    *("absorption", "splitting", "noise fitting", "half dead"),
)
"""How a dictionary may be worse than it looks; docs/defects.md has each, planted."""


class Label(NamedTuple):
    """How a metric is shown, and how it judges.

    Attributes:
        text, unit: its name in words, its unit.
        better: "higher" or "lower" where a dictionary is better that scores so; "" where neither.
        best: the value of a perfect dictionary; None: nothing bounds it.
        is_below_truth: on a world the truth's value, not `best`, is the end of the scale.
    """

    text: str
    unit: Unit = "number"
    better: Better = ""
    best: float | None = None
    is_below_truth: bool = True


@dataclass(frozen=True)
class EvalSetup:
    """What an accumulator must know before the first batch.

    Attributes:
        d_in: width of what is reconstructed (the coder's d_out). d_sae: number of latents.
        seed: of everything random inside the eval, such as its bootstrap.
        n_resamples: bootstrap draws behind an interval.
        truth: of the world that the rows are of, for evals that read it.
        coder: what is evaluated, for evals that read its weights.
        settings: what `eval` in the configuration says.
    """

    d_in: int
    d_sae: int
    seed: int = 0
    n_resamples: int = 1000
    truth: Truth | None = None
    coder: Evaluable | None = None
    settings: EvalConfig = record_field(default_factory=EvalConfig)

    def require_truth(self, name: str) -> Truth:
        """Return the truth that the eval `name` reads.

        Errors: ValueError where there is none.
        """
        if self.truth is None:
            raise ValueError(
                f"{name} must be given a world's truth; this setup has none. Use "
                "`evaluate_on_world`."
            )
        return self.truth


@dataclass(frozen=True)
class EvalBatch:
    """Evaluated tokens with what the coder makes of them; masked tokens are not in it.

    Shapes: x (n, d_in) raw activations that are to be written, of a transcoder those at its
    target; x_hat (n, d_in); latents (n, k) each; tokens (n) int64; document_ids (n) int64.
    """

    x: Tensor
    x_hat: Tensor
    latents: Latents
    tokens: Tensor
    document_ids: Tensor


@dataclass(frozen=True)
class ContextBatch:
    """Whole contexts with the code of their tokens, for evals in which order or text counts.

    Attributes:
        contexts: b contexts of t tokens, the masked ones too; activations (b, t, Σ widths).
        latents: (n, k) each, of the tokens that are not masked, row after row.
        kept: (n) int64, where those tokens lie in the flattened (b · t).
        lm: whose tokenizer reads the tokens; None where no language model gave the activations.
        places: where the coder reads and writes in it; None alike.
    """

    contexts: CapturedContexts
    latents: Latents
    kept: Tensor
    lm: LanguageModel | None = None
    places: Places | None = None


@dataclass(frozen=True)
class ModelBatch:
    """Contexts on which an eval runs the language model itself.

    Attributes:
        places: where the coder reads and writes.
        mean: (d_in), mean of the activations that are written, for mean ablation.
        max_norm: tokens of larger activation norm count as masked; None keeps all.
        shared: what evals found on these contexts that is the same for every dictionary, under
            keys of their own; dictionaries that are measured side by side are given one.
    """

    coder: Evaluable
    lm: LanguageModel
    places: Places
    contexts: Contexts
    mean: Tensor
    max_norm: float | None = None
    shared: dict[object, object] = record_field(default_factory=dict)


class Seen:
    """How many tokens, and which documents, an accumulator was fed; 8 bytes a document."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._documents = torch.empty(0, dtype=torch.int64)

    @property
    def n_documents(self) -> int:
        return len(self._documents)

    @property
    def documents(self) -> Tensor:
        """Their ids, sorted, (n_documents) int64."""
        return self._documents

    def update(self, document_ids: Tensor) -> None:
        """Add one token for each of `document_ids` (n)."""
        self.n_tokens += document_ids.numel()
        self._add(document_ids.unique().cpu())

    def merge(self, other: Seen) -> None:
        """Add what `other` saw."""
        self.n_tokens += other.n_tokens
        self._add(other._documents)

    def _add(self, documents: Tensor) -> None:
        self._documents = torch.cat([self._documents, documents]).unique()


class Accumulator(Protocol):
    """An eval in progress. `update` takes the kind of batch that its row says."""

    seen: Seen

    def update(self, batch: Any, /) -> None:
        """Add one batch."""
        ...

    def merge(self, other: Any, /) -> None:
        """Add what another accumulator of this kind and setup has seen; `other` is unchanged."""
        ...

    def compute(self) -> Mapping[str, Value]:
        """Return the flat metrics: `name`; `name/low`, `name/high` where it has an interval."""
        ...

    def arrays(self) -> Mapping[str, Tensor]:
        """Return results that are no single numbers, by a name of their own.

        `latents/NAME` is a score of every latent, (d_sae), NaN where it has none.
        """
        ...


class Explanation(NamedTuple):
    """What is said of a latent in words, and by whom."""

    latent: int
    text: str
    by: str


@runtime_checkable
class Explains(Protocol):
    """An accumulator that has words for latents, beside its numbers."""

    def explanations(self) -> list[Explanation]:
        """Return them, at most one a latent."""
        ...


@dataclass(frozen=True)
class EvalRow:
    """A row of the registry.

    Attributes:
        make: starts an accumulator.
        reads: what its `update` takes: "activations" an EvalBatch, "contexts" a ContextBatch,
            "model" a ModelBatch, "labelled" a LabelledBatch of its source's `texts`, "world" a
            TruthBatch; "weights" is never updated and reads `EvalSetup.coder`.
        labels: words and unit for each of its metrics, in the order of the printed table.
        cost: "fast" for those that `--evals fast` runs, "full" for those that take longer,
            "minutes" for those that run only where they are asked for, by name or `--evals full`.
        cannot_see: which of DEFECTS none of its metrics sees, by name (docs/defects.md), and what
            else leaves them unmoved, in a few words each.
        latent_labels: words and unit for each of its scores by latent.
    """

    make: Callable[[EvalSetup], Accumulator]
    reads: Reads
    labels: Mapping[str, Label]
    cost: Literal["fast", "full", "minutes"] = "fast"
    cannot_see: tuple[str, ...] = ()
    latent_labels: Mapping[str, Label] = record_field(default_factory=dict)
