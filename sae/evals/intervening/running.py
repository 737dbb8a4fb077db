"""Forwards in which the activation at one place is changed, several variants side by side.

The change is added to what the model has there, so that whatever the dictionary does not explain
(its error) stays; a change of 0 leaves the model as it is.

Variants of one text begin at the place: what the model computes before it is kept from the clean
forward (`sae.stream.prefix`). The output embedding, a fifth of the work in a small model, reads
only the tokens that are counted. Both ask more of a model than hooks do, so `can_share` tries them
on a few tokens first; a model that then gives something else is run whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sae.evals.replacing import Places, changed, logits_of
from sae.stream.language_model import LanguageModel
from sae.stream.prefix import Kept, give_again, keep_before

LOG = logging.getLogger("sae.evals")
TOKENS_AT_ONCE = 2048
TRIED_ON = 4
"""Tokens of each context of the trial."""


class Forwards:
    """A clean forward over tokens (b, t), and variants of it.

    Shapes: counted (c) places in b · t; clean (c, vocabulary) log-probabilities there, float32 on
    the CPU, float64 of a float64 model.
    """

    @torch.no_grad()
    def __init__(
        self, lm: LanguageModel, places: Places, tokens: Tensor, counted: Tensor, *, shares: bool
    ) -> None:
        self.lm, self.places, self.tokens, self.counted = lm, places, tokens, counted
        self.shares = shares
        self._kept: Kept = {}
        with keep_before(lm.module, places.written[0]) as kept:
            self.clean = self._log_probs(1)[0]
        self._kept = kept if shares else {}

    @torch.no_grad()
    def under(self, changes: Tensor) -> Tensor:
        """Return log-probabilities (v, c, vocabulary) with each of changes (v, b · t, width)."""
        parts = []
        for group in changes.split(max(TOKENS_AT_ONCE // self.tokens.numel(), 1)):
            with (
                changed(self.lm, self.places, [group.flatten(0, 1)]),
                give_again(self._kept, len(group)),
            ):
                parts.append(self._log_probs(len(group)))
        return torch.cat(parts)

    def _log_probs(self, n: int) -> Tensor:
        """Return those of `n` copies of the text, (n, c, vocabulary)."""
        tokens = self.tokens.repeat(n, 1)
        rows = torch.arange(n)[:, None] * self.tokens.numel() + self.counted
        head = _head(self.lm.module) if self.shares else None
        with nullcontext() if head is None else _reading_only(head, tokens.shape, rows.flatten()):
            logits = logits_of(self.lm, tokens)
        logits = logits.flatten(0, 1)
        if head is None:
            logits = logits[rows.flatten().to(logits.device)]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.log_softmax(-1).cpu().reshape(*rows.shape, -1)


def can_share(lm: LanguageModel, places: Places, tokens: Tensor, width: int) -> bool:
    """Say whether forwards that share what lies before the place are those of the whole model.

    Args:
        tokens: (b, t), some contexts of a few tokens. width: of what is written.
    """
    generator = torch.Generator().manual_seed(0)
    counted = torch.arange(1, tokens.numel(), 2)
    changes = torch.randn(2, tokens.numel(), width, generator=generator)
    try:
        found = Forwards(lm, places, tokens, counted, shares=True)
        short = torch.cat([found.clean[None], found.under(changes)])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # Whatever a model wants of layers beside their outputs shows in its own way.
        return _not_shared(str(error) or type(error).__name__)
    whole = Forwards(lm, places, tokens, counted, shares=False)
    expected = torch.cat([whole.clean[None], whole.under(changes)])
    if short.shape != expected.shape:
        return _not_shared(f"logits {tuple(short.shape)}, not {tuple(expected.shape)}")
    error = float((short - expected).norm() / expected.norm())
    return error <= torch.finfo(lm.dtype).eps ** 0.5 or _not_shared(f"logits are {error:.1e} off")


def divergence(clean: Tensor, other: Tensor) -> Tensor:
    """Return KL(clean ‖ other) by token, (…) from log-probabilities (…, vocabulary)."""
    return (clean.exp() * (clean - other)).sum(-1).clamp_min(0)


def _not_shared(reason: str) -> bool:
    LOG.info("The model is run whole for every intervention: begun at the place, %s.", reason)
    return False


def _head(module: nn.Module) -> nn.Module | None:
    """Return the model's output embedding, where it names one."""
    get: Callable[[], Any] | None = getattr(module, "get_output_embeddings", None)
    head = get() if get else None
    return head if isinstance(head, nn.Module) else None


@contextmanager
def _reading_only(head: nn.Module, shape: torch.Size, rows: Tensor) -> Iterator[None]:
    """Let the output embedding read the tokens `rows` (r) of b · t alone.

    Logits are then (1, r, vocabulary).

    Errors: RuntimeError where it does not read one vector a token.
    """

    def choose(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        if hidden.shape[:2] != shape:
            raise RuntimeError(f"the output embedding read {tuple(hidden.shape)}")
        return (hidden.flatten(0, 1)[rows.to(hidden.device)][None], *args[1:])

    hook = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()
