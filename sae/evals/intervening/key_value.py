"""Key → value: does what a latent writes promote the tokens that follow where it fires?

With e_k = W_U (γ ⊙ C d_k) the latent's direct effect on the logits (`readout`), f drawn from its
followers' shares and b from those of all next tokens (`targets`),
    key_value_auroc_k = P(e_k(f) > e_k(b)) + ½ P(e_k(f) = e_k(b))
0.5 where what it writes has nothing to do with what follows.
Source: Geva et al. 2021, "Transformer feed-forward layers are key-value memories" (values promote
the token that follows their keys' contexts); deviations: AUROC, all next tokens as the other side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.evals.intervening.targets import Targets
from sae.evals.readout import Readout


@torch.no_grad()
def key_value_auroc(readout: Readout, directions: Tensor, targets: Targets) -> Tensor:
    """Return each latent's AUROC, (l) float64, from what the latents write, (l, d_out)."""
    effects = readout.logits(directions.to(readout.unembedding.device).float()).float().cpu()
    n = effects.shape[1]
    order = effects.argsort(1)
    base = targets.base[:n].double()[order]
    above = base.cumsum(1) - base / 2
    followers = targets.followers[:, :n].double().gather(1, order)
    return (followers * above).sum(1) / base.sum(1) / followers.sum(1)
