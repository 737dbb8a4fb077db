"""One face for whatever is evaluated: our coders, foreign ones, null models, plain objects.

An object needs `encode` and `decode`; `encode_sparse` and `decode_for` are used where they exist,
and `d_in`, `d_sae` and `metadata` are read where they exist and found out where they do not. Tokens
pass in chunks, so that a dense code never grows with the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sae.coder.latents import Latents, from_dense
from sae.coder.sites import Sites

DENSE_ELEMENTS = 2**25


class Evaluable:
    """A coder as evals see it.

    Args:
        coder: has decode, and encode or encode_sparse.
        width: d, the width of the activations that it will be given.
        place: what those activations are, for the message.

    A coder of other sites than one (`coder.sites`) is given rows of all its places.

    Errors: TypeError where the object lacks encode or decode; ValueError where its width is not
    that of the activations.
    """

    def __init__(self, coder: Any, width: int, place: str = "the given batches") -> None:
        _require_coder(coder)
        self.coder = coder
        sites = getattr(coder, "sites", None)
        self.sites = (
            sites if isinstance(sites, Sites) else Sites((int(getattr(coder, "d_in", width)),))
        )
        self.d_in, self.d_out = self.sites.d_in, self.sites.d_out
        if self.sites.width != width:
            trained_at = self.metadata.get("hook_name", "unknown")
            raise ValueError(
                f"the dictionary's {'d_in' if sites is None else 'places'} must have the width of "
                f"{place}; got d_in={self.sites.width}, width "
                f"{width}. It was trained at hookpoint {trained_at}: evaluate it there."
            )
        self.d_sae = int(getattr(coder, "d_sae", None) or self._find_d_sae())

    @property
    def metadata(self) -> dict[str, Any]:
        """What the dictionary says of its origin; empty where it says nothing."""
        return dict(getattr(self.coder, "metadata", None) or {})

    @torch.no_grad()
    def encode_decode(self, x: Tensor) -> tuple[Latents, Tensor]:
        """Return the code and what is written, (n, d_out), for rows x (n, Σ widths), on x's device.

        Errors: ValueError where the reconstruction holds NaN or infinity.
        """
        latents = self.code_of(self.sites.read(x))
        return latents, self.write(latents, self.sites.read(x))

    @torch.no_grad()
    def code_of(self, x: Tensor) -> Latents:
        """Return the code of x (n, d_in), which is what is read of a row, on x's device."""
        given = self._as_input(x)
        if hasattr(self.coder, "encode_sparse"):
            latents = self.coder.encode_sparse(given)
        else:
            latents = from_dense(self.coder.encode(given))
        return Latents(*(part.to(x.device) for part in latents))

    @torch.no_grad()
    def write(self, latents: Latents, x: Tensor) -> Tensor:
        """Return what a code (n, k), of whichever tokens, writes at x (n, d_in): (n, d_out).

        Errors: ValueError where it holds NaN or infinity.
        """
        given = self._as_input(x)
        code = Latents(*(part.to(given.device) for part in latents))
        is_sparse = hasattr(self.coder, "encode_sparse")
        x_hat = self._decode(code if is_sparse else code.to_dense(self.d_sae), given)
        if not torch.isfinite(x_hat).all():
            raise ValueError(
                "reconstructions must be finite; the dictionary gives NaN or infinity on finite "
                "activations. Its training diverged, or its file is damaged."
            )
        return x_hat.to(x.device)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return x_hat (n, d_out) of rows x (n, Σ widths), in the coder's dtype, on x's device."""
        if len(x) == 0:
            return self.written(x)
        return torch.cat([self.encode_decode(x[rows])[1] for rows in self.chunks(len(x))])

    def change(self, x: Tensor, code: Latents, edited: Latents) -> Tensor:
        """Return what x_hat changes by, (n, d_out), where the code of rows x becomes `edited`."""
        given = self._as_input(self.sites.read(x))
        is_sparse = hasattr(self.coder, "encode_sparse")
        parts = []
        for one in (code, edited):
            here = Latents(one.values.to(given), one.indices.to(given.device))
            parts.append(self._decode(here if is_sparse else here.to_dense(self.d_sae), given))
        return (parts[1] - parts[0]).to(x.device)

    def written(self, x: Tensor) -> Tensor:
        """Return what rows x (n, Σ widths) hold at the places that are written, (n, d_out)."""
        return self.sites.written(x)

    def by_place(self, x_hat: Tensor) -> list[Tensor]:
        """Return what is written at every place, (n, width) each, from x_hat (n, d_out)."""
        return list(x_hat.split(list(self.sites.written_widths), -1))

    def columns(self) -> list[slice]:
        """Return each place's columns of a row."""
        return self.sites.columns()

    @torch.no_grad()
    def directions(self) -> Tensor:
        """Return what one unit of each latent writes into x_hat, (d_sae, d_out).

        Of a coder that norms its tokens: in the units of normed ones.
        """
        rows = getattr(self.coder, "W_dec", None)
        if isinstance(rows, Tensor) and rows.shape == (self.d_sae, self.d_out):
            return rows.detach()
        one = self._as_input(torch.ones(self.d_sae, 1))
        numbers = torch.arange(self.d_sae, device=one.device)[:, None]
        lit = [Latents(one * scale, numbers) for scale in (1, 0)]
        if not hasattr(self.coder, "encode_sparse"):
            lit = [code.to_dense(self.d_sae) for code in lit]
        with_one, with_none = (self.coder.decode(code) for code in lit)
        return with_one - with_none

    def encoder_rows(self) -> Tensor | None:
        """Return what each latent reads, (d_sae, d_in) on the CPU; None where it has no rows."""
        rows = getattr(self.coder, "W_enc", None)
        is_whole = isinstance(rows, Tensor) and rows.shape == (self.d_sae, self.d_in)
        return rows.detach().float().cpu() if isinstance(rows, Tensor) and is_whole else None

    def chunks(self, n: int) -> Iterator[slice]:
        """Yield slices of n tokens, each small enough for its dense code."""
        size = max(DENSE_ELEMENTS // self.d_sae, 16)
        yield from (slice(start, min(start + size, n)) for start in range(0, n, size))

    def _decode(self, code: Latents | Tensor, x: Tensor) -> Tensor:
        """Return x_hat in the units of x: a code alone cannot say them where tokens are normed."""
        decode_for = getattr(self.coder, "decode_for", None)
        return self.coder.decode(code) if decode_for is None else decode_for(code, x)

    def _find_d_sae(self) -> int:
        if not hasattr(self.coder, "encode"):
            raise TypeError(
                "a coder with encode_sparse alone must say its `d_sae`; it has none. Add it."
            )
        with torch.no_grad():
            return self.coder.encode(self._as_input(torch.zeros(1, self.d_in))).shape[-1]

    def _as_input(self, x: Tensor) -> Tensor:
        """Return x in the coder's floating dtype and on its device; float32 where it says none."""
        weight = next(self.coder.parameters(), None) if isinstance(self.coder, nn.Module) else None
        weight = getattr(self.coder, "W_dec", None) if weight is None else weight
        if isinstance(weight, Tensor):
            return x.to(weight.device, weight.dtype)
        return x if x.dtype == torch.float64 else x.float()


def _require_coder(coder: Any) -> None:
    has_code = hasattr(coder, "encode") or hasattr(coder, "encode_sparse")
    if not (has_code and hasattr(coder, "decode")):
        raise TypeError(
            "what is evaluated must have encode (or encode_sparse) and decode; got "
            f"{type(coder).__name__}. Load it with `sae.load`."
        )
