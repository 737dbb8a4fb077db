"""Running a model with what a coder writes in place of its own activations.

What is written comes from the activations of a clean forward over the same tokens, so that each
place gets what the coder makes of the model as it is; where an sae or a transcoder writes to one
place, the clean and the replaced forward agree up to there. A cross_layer coder whose latents do
not compete over layers runs live: each layer is read as the layers before it, replaced, have made
it (the replacement model of Ameisen et al. 2025, "Circuit Tracing", without error terms).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sae.evals.evaluable import Evaluable
from sae.stream.hookpoints import Hookpoint, capture, edit
from sae.stream.language_model import LanguageModel
from sae.stream.reader import Reader

COMPETE_OVER_LAYERS = ("topk",)


@dataclass(frozen=True)
class Places:
    """Where a coder reads and writes.

    reads: hookpoints that are read. writes: those that are written; empty: the same. other: a
    second model, read at `reads` too, whose activations stand behind the first's in a row.
    """

    reads: tuple[Hookpoint, ...]
    writes: tuple[Hookpoint, ...] = ()
    other: LanguageModel | None = None

    @property
    def hookpoints(self) -> tuple[Hookpoint, ...]:
        """All places of the first model, in a row's order."""
        return (*self.reads, *self.writes)

    @property
    def written(self) -> tuple[Hookpoint, ...]:
        """The first model's places that are replaced."""
        return self.writes or self.reads

    def reader(self, lm: LanguageModel) -> Reader:
        """Return what reads a row's activations."""
        return Reader(lm, self.hookpoints, self.other)

    def __str__(self) -> str:
        read = ",".join(map(str, self.reads))
        return f"{read} → {','.join(map(str, self.writes))}" if self.writes else read


Writes = Callable[[int], Tensor]
"""From the number of a written place to what is written there, (n, width), at the n tokens."""


@torch.no_grad()
def clean_pass(lm: LanguageModel, places: Places, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the model's logits (b, t, vocabulary) and its rows (b·t, Σ widths)."""
    seen: dict[Hookpoint, Tensor] = {}

    def keep(place: Hookpoint) -> Callable[[Tensor], Tensor]:
        def see(activation: Tensor) -> Tensor:
            seen.setdefault(place, activation.reshape(tokens.numel(), -1))
            return activation

        return see

    with ExitStack() as hooks:
        for place in dict.fromkeys(places.hookpoints):
            hooks.enter_context(edit(lm.module, place, keep(place)))
        logits = logits_of(lm, tokens)
    if missing := [place for place in places.hookpoints if place not in seen]:
        raise RuntimeError(
            f"the hooked module must run in the model's forward; `{missing[0]}` did not. "
            "Hook a module that the forward calls, such as a whole layer."
        )
    parts = [seen[place] for place in places.hookpoints]
    if places.other is not None:
        found = capture(places.other.module, places.reads, tokens)
        parts += [found[place].flatten(0, 1).to(logits.device) for place in places.reads]
    return logits, torch.cat(parts, 1)


@contextmanager
def replaced(
    lm: LanguageModel, places: Places, may_replace: Tensor, write: Writes
) -> Iterator[None]:
    """Let every forward of the block write `write(place)` at the tokens `may_replace` (b·t)."""

    def writer(number: int) -> Callable[[Tensor], Tensor]:
        def put(activation: Tensor) -> Tensor:
            flat = activation.reshape(len(may_replace), -1).clone()
            flat[may_replace] = write(number).to(flat.device, flat.dtype)
            return flat.reshape(activation.shape)

        return put

    with ExitStack() as hooks:
        for number, place in enumerate(places.written):
            hooks.enter_context(edit(lm.module, place, writer(number)))
        yield


@contextmanager
def changed(lm: LanguageModel, places: Places, changes: Sequence[Tensor]) -> Iterator[None]:
    """Let every forward of the block add to what it has at the places that are written.

    What the coder does not explain stays: only an edit of its code (`Evaluable.change`) acts.

    Args:
        changes: (b·t, width) for each written place; where 0, the model is as it is.
    """

    def adder(change: Tensor) -> Callable[[Tensor], Tensor]:
        def add(activation: Tensor) -> Tensor:
            added = change.to(activation.device).reshape(activation.shape)
            return (activation + added).to(activation.dtype)

        return add

    with ExitStack() as hooks:
        for place, change in zip(places.written, changes, strict=True):
            hooks.enter_context(edit(lm.module, place, adder(change)))
        yield


@contextmanager
def spliced(
    lm: LanguageModel, places: Places, coder: Evaluable, rows: Tensor, may_replace: Tensor
) -> Iterator[None]:
    """Let every forward of the block run on what `coder` makes of `rows` (b·t, Σ widths)."""
    if is_live(coder):
        with _live(lm, places, coder, rows, may_replace):
            yield
        return
    parts = coder.by_place(coder.reconstruct(rows[may_replace]))
    with replaced(lm, places, may_replace, parts.__getitem__):
        yield


def is_live(coder: Evaluable) -> bool:
    """Say whether a coder of several layers can encode one before the next has run."""
    cfg = getattr(coder.coder, "cfg", None)
    is_of_layers = getattr(cfg, "site", "sae") == "cross_layer"
    return is_of_layers and getattr(cfg, "activation", "topk") not in COMPETE_OVER_LAYERS


@contextmanager
def _live(
    lm: LanguageModel, places: Places, coder: Evaluable, rows: Tensor, may_replace: Tensor
) -> Iterator[None]:
    """Read every layer as it is in the replaced forward; layers still to come count as 0, which
    no latent that has been written yet depends on."""
    now, columns = torch.zeros_like(rows), coder.columns()

    def reader(number: int) -> Callable[[Tensor], Tensor]:
        def see(activation: Tensor) -> Tensor:
            now[:, columns[number]] = activation.reshape(len(now), -1).to(now.dtype)
            return activation

        return see

    def write(number: int) -> Tensor:
        return coder.by_place(coder.reconstruct(now[may_replace]))[number]

    with ExitStack() as hooks:
        for number, place in enumerate(places.reads):
            hooks.enter_context(edit(lm.module, place, reader(number)))
        hooks.enter_context(replaced(lm, places, may_replace, write))
        yield


def logits_of(lm: LanguageModel, tokens: Tensor) -> Tensor:
    """Return the logits (b, t, vocabulary) of tokens (b, t); gradients pass.

    Errors: ValueError for a model that gives none.
    """
    takes_cache = "use_cache" in inspect.signature(lm.module.forward).parameters
    output = lm.module(tokens.to(lm.device), **({"use_cache": False} if takes_cache else {}))
    if not hasattr(output, "logits"):
        raise ValueError(
            f"downstream needs a language model that gives logits; {lm.name} gives "
            f"{type(output).__name__}. Load a causal language model or leave `downstream` out."
        )
    return output.logits
