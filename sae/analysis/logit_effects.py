"""Which output tokens a latent promotes and suppresses when it writes to the residual stream.

With W_U (vocabulary, d) the unembedding, γ the final norm's weight, C its centring (the identity
for RMSNorm) and d_k the decoder row, latent k moves the logits along

    e_k = W_U (γ ⊙ C d_k),   z_k = (e_k − mean e_k) / sd e_k   (over the vocabulary)

up to the positive factor 1 / rms(residual) of the token at hand. The softmax does not see the mean,
and the factor differs from token to token, so effects are given as z_k. A latent's *logit effect*,
one number to sort by, is max z_k: how far its best token stands out from the vocabulary. Effects
through later layers are not in it.

How γ, C and W_U are found in any model is in `sae.evals.readout`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae.evals.readout import Readout


@dataclass(frozen=True)
class LogitEffects:
    """Extreme output tokens of every latent, effects in standard deviations over the vocabulary.

    Shapes: scores (d_sae); promoted_tokens, promoted (d_sae, n) descending; suppressed_tokens,
    suppressed (d_sae, n) ascending.
    """

    scores: Tensor
    promoted_tokens: Tensor
    promoted: Tensor
    suppressed_tokens: Tensor
    suppressed: Tensor


@torch.no_grad()
def logit_effects(
    readout: Readout,
    W_dec: Tensor,
    *,
    n_tokens: int = 10,
    vocabulary: int | None = None,
    chunk: int = 256,
) -> LogitEffects:
    """Return the `n_tokens` most promoted and suppressed tokens of every decoder row.

    Only the first `vocabulary` rows of W_U count, where the embedding is padded beyond the
    tokenizer. Memory: chunk · vocabulary floats.
    """
    parts: list[tuple[Tensor, ...]] = []
    for rows in W_dec.detach().to(readout.unembedding.device).float().split(chunk):
        effect = readout.logits(rows)[:, :vocabulary].float()
        spread = effect.std(1, keepdim=True, correction=0).clamp_min(1e-30)
        z = (effect - effect.mean(1, keepdim=True)) / spread
        n = min(n_tokens, z.shape[1])
        high, low = z.topk(n, dim=1), z.topk(n, dim=1, largest=False)
        parts.append((high.values[:, 0], high.indices, high.values, low.indices, low.values))
    return LogitEffects(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))
