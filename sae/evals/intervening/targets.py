"""What a latent is tried against: the tokens that follow where it fires most, in half 0.

With F_k the tokens that follow the latent's `N_TOP` strongest tokens, w_k(v) the share of v in F_k
and w_0(v) the share of v among all next tokens,
    target contrast   y_k(logits) = Σ_v (w_k(v) − w_0(v)) · logits_v
in nats: how much likelier, in log-probability, the latent's followers are than next tokens are
anyway. It is linear in the logits and does not see a constant added to them.

Directions that the same followers define, without the dictionary:
    difference in means   Σ_v w_k(v) μ_v − μ, with μ_v the mean activation before token v
    PCA                   that of the N_COMPONENTS largest components nearest to it, with its sign
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae.evals.intervening.sample import Tokens

N_TOP = 32
MIN_FIRES = 4
N_COMPONENTS = 8


@dataclass(frozen=True)
class Targets:
    """The latents that are intervened on, and their targets.

    Shapes: latents (l) int64; followers (l, vocabulary), base (vocabulary): shares; differences
    (l, d_out), components (N_COMPONENTS, d_out) float32. scale: root mean square distance of an
    activation from the mean, by which doses are counted. share_testable: of all latents.
    """

    latents: Tensor
    followers: Tensor
    base: Tensor
    differences: Tensor
    components: Tensor
    scale: float
    share_testable: float

    @property
    def contrasts(self) -> Tensor:
        """y's weights, (l, vocabulary)."""
        return self.followers - self.base


def find_targets(
    tokens: Tokens, written: Tensor, d_sae: int, vocabulary: int, n: int, reach: int, seed: int
) -> Targets | None:
    """Return the targets of up to `n` latents, drawn from those that fire often enough to be tried:
    on MIN_FIRES tokens with a next one in each half, in half 1 before position `reach`.

    Args:
        written: (n, d_out), what the tokens hold at the place that is written.

    None where no latent does.
    """
    has_next = tokens.following >= 0
    defines = has_next & (tokens.halves == 0)
    tries = has_next & (tokens.halves == 1) & (tokens.positions < reach)
    enough = [_counts(tokens, rows, d_sae) >= MIN_FIRES for rows in (defines, tries)]
    testable = (enough[0] & enough[1]).nonzero()[:, 0]
    if not len(testable):
        return None
    order = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))
    latents = order[torch.isin(order, testable)][:n].sort().values
    following = tokens.following[defines]
    counts = torch.bincount(following, minlength=vocabulary).double()
    followers = torch.stack([_followers(tokens, defines, k, vocabulary) for k in latents.tolist()])
    x = written[defines].double()
    mean = x.mean(0)
    weights = (followers / counts.clamp_min(1))[:, following]
    centred = x - mean
    spectrum = torch.linalg.eigh(centred.T @ centred)
    return Targets(
        latents,
        followers.float(),
        (counts / counts.sum()).float(),
        (weights @ x - mean).float(),
        spectrum.eigenvectors.T.flip(0)[:N_COMPONENTS].float(),
        float(centred.pow(2).sum(1).mean().sqrt()),
        len(testable) / d_sae,
    )


def activations_of(tokens: Tokens, latent: int) -> Tensor:
    """Return a latent's activation on every token, (n)."""
    values, indices = tokens.code
    return values.where(indices == latent, 0.0).sum(1)


def _counts(tokens: Tokens, rows: Tensor, d_sae: int) -> Tensor:
    values, indices = (part[rows] for part in tokens.code)
    return torch.bincount(indices[values != 0], minlength=d_sae)


def _followers(tokens: Tokens, rows: Tensor, latent: int, vocabulary: int) -> Tensor:
    """Return the shares of the tokens that follow the latent's strongest, (vocabulary) float64."""
    strength = activations_of(tokens, latent).abs()[rows]
    best = strength.topk(min(N_TOP, int((strength > 0).sum()))).indices
    shares = torch.bincount(tokens.following[rows][best], minlength=vocabulary).double()
    return shares / shares.sum()
