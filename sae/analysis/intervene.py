"""Running the model with a dictionary in its place: splice, ablate, steer; and reading a prompt.

With z the code of the activation x at a hookpoint and `edit` a change of the code,

    splice:             x ← D(edit(z))
    splice, keep_error: x ← x + D(edit(z)) − D(z)     exactly x where the edit changes nothing
    steer:              x ← x + strength · d_k

D and d_k are in the units of x (a coder with a layer norm has them by token). A transcoder encodes
the x of its hookpoint, and what is replaced, or pushed, is its `target`'s.

All are context managers around forwards, `generate` among them. The first position of a sequence is
left as it is by splices: coders are trained without it (`data.mask`), and its activation is often a
hundred times larger than others. A forward over several positions is taken for the start of its
sequences, a forward over one position for their continuation, as `generate` does; pad on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.stream import hookpoints
from sae.stream.hookpoints import Hookpoint
from sae.stream.language_model import LanguageModel
from sae.stream.vocabulary import token_texts

CodeEdit = Callable[[Latents], Latents]


class Coder(Protocol):
    """A dictionary that encodes sparsely and decodes in the units of the tokens given."""

    @property
    def W_dec(self) -> Tensor: ...

    def encode_sparse(self, x: Tensor, /) -> Latents: ...

    def decode_for(self, latents: Latents, x: Tensor, /) -> Tensor: ...

    def direction_for(self, latent: int, x: Tensor, /) -> Tensor: ...


Place = Hookpoint | str


class TokenLatents(NamedTuple):
    """A token of a prompt and its strongest latents, as (latent, activation), strongest first."""

    token: str
    latents: list[tuple[int, float]]


@contextmanager
def splice(
    lm: LanguageModel,
    hookpoint: Place,
    coder: Coder,
    *,
    target: Place | None = None,
    keep_error: bool = False,
    edit: CodeEdit | None = None,
) -> Iterator[None]:
    """Replace the activation by its reconstruction in every forward of the block.

    Args:
        target: what a transcoder writes; None: the hookpoint.
        keep_error: add the reconstruction error back, so that only the edit acts.
        edit: changes the code (n, k) before it is decoded; it may not write into its argument.

    Errors: ValueError for a coder of several places, and for a target that a coder does not need
    or lacks.
    """
    _check_places(coder, target)
    seen: list[Tensor] = []

    def see(activation: Tensor) -> Tensor:
        seen[:] = [activation.to(coder.W_dec.dtype).flatten(0, -2)]
        return activation

    def replace(activation: Tensor) -> Tensor:
        (x,) = seen
        code = coder.encode_sparse(x)
        x_hat = coder.decode_for(edit(code) if edit else code, x)
        if keep_error:
            now = activation.to(x_hat.dtype).flatten(0, -2)
            x_hat = now + (x_hat - coder.decode_for(code, x))
        return _keep_first(activation, x_hat.to(activation.dtype).reshape(activation.shape))

    read, written = _find(lm, hookpoint), _find(lm, target or hookpoint)
    with hookpoints.edit(lm.module, read, see), hookpoints.edit(lm.module, written, replace):
        yield


@contextmanager
def ablate(
    lm: LanguageModel,
    hookpoint: Place,
    coder: Coder,
    latents: Sequence[int],
    *,
    target: Place | None = None,
) -> Iterator[None]:
    """Set `latents` to 0 in every forward of the block; the error term stays."""
    _check_latents(coder, latents)
    silenced = torch.tensor(list(latents), dtype=torch.int64, device=coder.W_dec.device)

    def silence(code: Latents) -> Latents:
        is_silenced = torch.isin(code.indices, silenced)
        return code._replace(values=code.values.masked_fill(is_silenced, 0))

    with splice(lm, hookpoint, coder, target=target, keep_error=True, edit=silence):
        yield


@contextmanager
def steer(
    lm: LanguageModel,
    hookpoint: Place,
    coder: Coder,
    latent: int,
    strength: float,
    *,
    target: Place | None = None,
) -> Iterator[None]:
    """Add `strength` · d_latent at every position; strength is in units of its activation."""
    _check_latents(coder, [latent])
    _check_places(coder, target)

    def push(activation: Tensor) -> Tensor:
        direction = coder.direction_for(latent, activation).detach()
        return (activation + strength * direction.to(activation.device)).to(activation.dtype)

    with hookpoints.edit(lm.module, _find(lm, target or hookpoint), push):
        yield


@torch.no_grad()
def strongest_latents(
    coder: Coder, lm: LanguageModel, hookpoint: Place, text: str, n: int = 5
) -> list[TokenLatents]:
    """Return every token of `text` with its up to `n` strongest latents; the first token has none.

    Tokens are the tokenizer's own for `text`, special ones included.
    """
    ids = lm.tokenizer(text, return_tensors="pt")["input_ids"].to(lm.device)
    if ids.numel() == 0:
        raise ValueError(f"`text` must hold at least one token; got {text!r}. Give some text.")
    where = _find(lm, hookpoint)
    x = hookpoints.capture(lm.module, [where], ids)[where][0]
    code = coder.encode_sparse(x.to(coder.W_dec.dtype))
    best = code.values.topk(min(n, code.values.shape[1]), dim=1)
    chosen = code.indices.gather(1, best.indices).tolist()
    texts = token_texts(lm.tokenizer, ids[0].tolist())
    rows = [
        [(latent, value) for latent, value in zip(*row, strict=True) if value > 0]
        for row in zip(chosen, best.values.tolist(), strict=True)
    ]
    return [TokenLatents(*pair) for pair in zip(texts, [[], *rows[1:]], strict=True)]


def _keep_first(activation: Tensor, replaced: Tensor) -> Tensor:
    if activation.dim() < 3 or activation.shape[1] < 2:
        return replaced
    return torch.cat([activation[:, :1], replaced[:, 1:]], 1)


def _check_places(coder: Coder, target: Place | None) -> None:
    """Refuse what does not read one place and write one."""
    sites = getattr(coder, "sites", None)
    if sites is None:
        return
    if len(sites.reads) > 1:
        raise ValueError(
            "interventions need a coder that reads one place; got one of "
            f"{len(sites.reads)} places. Measure it with `sae eval`, which replaces all of them."
        )
    if (target is None) != (sites.writes is None):
        raise ValueError(
            "`target` must be given for a transcoder, and left out for an sae; got "
            f"{target!r}. It is the run's `model.target`."
        )


def _find(lm: LanguageModel, hookpoint: Place) -> Hookpoint:
    if isinstance(hookpoint, Hookpoint):
        return hookpoint
    return hookpoints.find_hookpoint(lm.module, hookpoint)


def _check_latents(coder: Coder, latents: Sequence[int]) -> None:
    d_sae = len(coder.W_dec)
    wrong = [latent for latent in latents if not 0 <= latent < d_sae]
    if wrong:
        raise ValueError(
            f"`latents` must be in [0, d_sae={d_sae}); got {wrong[:5]}. Give numbers below {d_sae}."
        )
