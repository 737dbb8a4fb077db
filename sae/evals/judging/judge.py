"""What a judge is: it explains a latent from examples, and says where an explanation applies.

The one idea: a judge sees texts and nothing else. What it is shown to explain and what it is asked
about come from different documents (`examples`), so that a good score cannot come from memory.
Judges: `rules`, `similarity`, `endpoint`, `local_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

Confidence: TypeAlias = float | None
"""How surely an explanation applies to an example, on any scale; None: no answer."""


class Unreachable(RuntimeError):
    """The judge could not be asked, after all retries; the message says why."""


@dataclass(frozen=True)
class Example:
    """A stretch of text, token by token.

    Attributes:
        tokens: their texts.
        activations: the latent's, 0 where it is silent; shown to who explains.
        marked: places of the tokens that a question is about; empty: it is about the whole text.
    """

    tokens: tuple[str, ...]
    activations: tuple[float, ...] = ()
    marked: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.tokens)

    @property
    def firing(self) -> tuple[int, ...]:
        """Places at which the latent fires."""
        return tuple(place for place, value in enumerate(self.activations) if value)

    def with_marks(self, marked: Sequence[int], before: str = "«", after: str = "»") -> str:
        """Return the text with the tokens at `marked` in marks; neighbours share one pair."""
        parts, is_open = [], False
        for place, token in enumerate(self.tokens):
            if (place in marked) != is_open:
                parts.append(after if is_open else before)
                is_open = not is_open
            parts.append(token)
        return "".join(parts) + (after if is_open else "")


@dataclass(frozen=True)
class Evidence:
    """What an explanation is made from: texts with the latent firing, strongest first; without."""

    firing: tuple[Example, ...]
    silent: tuple[Example, ...]


@runtime_checkable
class Judge(Protocol):
    """Explains a latent and applies explanations.

    `name` is who gave an explanation, as the report shows it. `n_at_once` latents may be asked
    about in parallel threads.
    """

    name: str
    n_at_once: int

    def announce(self, n_latents: int, /) -> None:
        """Say, before the first request, what asking about `n_latents` will cost."""
        ...

    def explain(self, evidence: Evidence, /) -> str:
        """Return what the latent stands for, in words; "" where nothing was found.

        Errors: Unreachable.
        """
        ...

    def score(self, explanation: str, examples: Sequence[Example], /) -> list[Confidence]:
        """Return for each example how surely the explanation applies to it, or to its marks.

        Errors: Unreachable.
        """
        ...
