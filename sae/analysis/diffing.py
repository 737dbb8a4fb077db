"""Which places a latent is of: what layers share, and what one of two models has for itself.

By the norms of what latent j writes at the places p (`SparseCoder.site_norms`, in training's units,
so that a place of larger activations is not preferred):
    shares_pj = ‖W_dec_j at p‖ / Σ_q ‖W_dec_j at q‖
    latent j is of place p where ‖W_dec_j at p‖ ≥ least · max_q ‖W_dec_j at q‖
A latent of one place alone is exclusive, one of all places is shared.
Source: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing"
(relative decoder norms; the bound is ours, between the modes that planted features show).

Cannot see: whether a latent ever fires (a dead one keeps its random directions, which are of all
places: give `among`); that one feature became two exclusive latents, which L1 does more often than
BatchTopK (Minder et al. 2025, arXiv 2504.02922); latents of a cross_layer coder write to later
layers only, and are told apart by the layer that they read as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae.coder import SparseCoder
from sae.stream.reader import OTHER

LEAST = 0.2
SHARED, SEVERAL = "shared by all", "of several"


@dataclass(frozen=True)
class PlacesOfLatents:
    """The places that each latent is of.

    names: of the places, in a row's order. shares: (places, d_sae), columns add to 1. is_of:
    (places, d_sae), whether a latent is of a place.
    """

    names: tuple[str, ...]
    shares: Tensor
    is_of: Tensor

    @property
    def is_shared(self) -> Tensor:
        """Whether a latent is of all places, (d_sae)."""
        return self.is_of.all(0)

    @property
    def is_exclusive(self) -> Tensor:
        """Whether a latent is of one place alone, (d_sae)."""
        return self.is_of.sum(0) == 1

    def exclusive_to(self, place: int) -> Tensor:
        """Return the latents of this place alone, int64, those of the largest share first."""
        found = (self.is_exclusive & self.is_of[place]).nonzero()[:, 0]
        return found[self.shares[place, found].argsort(descending=True, stable=True)]

    def counts(self, among: Tensor | None = None) -> dict[str, int]:
        """Return how many latents are shared by all, of several, and of each place alone.

        among: (d_sae), which latents to count, such as those that fire; None: all.
        """
        counted = torch.ones_like(self.is_shared) if among is None else among.bool()
        is_between = ~(self.is_shared | self.is_exclusive)
        found = {SHARED: self.is_shared, SEVERAL: is_between}
        found |= {
            f"{name} alone": self.is_exclusive & of
            for name, of in zip(self.names, self.is_of, strict=True)
        }
        return {kind: int((are & counted).sum()) for kind, are in found.items()}


@torch.no_grad()
def places_of_latents(coder: SparseCoder, least: float = LEAST) -> PlacesOfLatents:
    """Return which places the latents of a coder that writes several are of.

    least: norm at a place, as a share of the latent's largest, from which it is of the place; in
    (0, 1].

    Errors: ValueError for a coder that writes one place, and for another `least`.
    """
    n_places = len(coder.sites.written_widths)
    if n_places < 2:
        raise ValueError(
            "latents must be written at several places to be told apart by them; this coder's "
            f"site is {coder.cfg.site}, which writes one. Train a crosscoder: several hookpoints, "
            "or `model.other`."
        )
    if not 0 < least <= 1:
        raise ValueError(f"`least` must be in (0, 1]; got {least}. Use {LEAST}.")
    norms = coder.site_norms()
    largest = norms.max(0).values.clamp_min(1e-30)
    shares = norms / norms.sum(0).clamp_min(1e-30)
    return PlacesOfLatents(_names(coder, n_places), shares, norms >= least * largest)


def _names(coder: SparseCoder, n_places: int) -> tuple[str, ...]:
    """Return the written places' names, as the dictionary remembers them, or their numbers."""
    known = coder.metadata.get("hook_name_out" if coder.sites.writes else "hook_name")
    names = str(known).split(",") if known else []
    if coder.metadata.get("model_other") is not None:
        names += [f"{OTHER}{name}" for name in names]
    return tuple(names) if len(names) == n_places else tuple(f"place {i}" for i in range(n_places))
