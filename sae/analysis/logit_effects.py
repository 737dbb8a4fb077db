"""Which output tokens a latent promotes and suppresses when it writes to the residual stream.

With W_U (vocabulary, d) the unembedding, γ the final norm's weight, C its centring (the identity
for RMSNorm) and d_k the decoder row, latent k moves the logits along

    e_k = W_U (γ ⊙ C d_k),   z_k = (e_k − mean e_k) / sd e_k   (over the vocabulary)

up to the positive factor 1 / rms(residual) of the token at hand. The softmax does not see the mean,
and the factor differs from token to token, so effects are given as z_k. A latent's *logit effect*,
one number to sort by, is max z_k: how far its best token stands out from the vocabulary. Effects
through later layers are not in it.

The one idea for "any model": the final norm is a module that is asked, not parsed. γ and C are read
off its outputs for a few probes, so (1 + weight) conventions and norms without a weight need no
special case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

PROBE_SIZE = 64.0


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


@dataclass(frozen=True)
class Readout:
    """From the residual stream to logits, up to a positive factor: W_U (γ ⊙ C d).

    Shapes: unembedding (vocabulary, d), weight (d) float32.
    """

    unembedding: Tensor
    weight: Tensor
    is_centred: bool

    def logits(self, directions: Tensor) -> Tensor:
        """Return e (n, vocabulary) of `directions` (n, d)."""
        if self.is_centred:
            directions = directions - directions.mean(1, keepdim=True)
        return (directions * self.weight).to(self.unembedding.dtype) @ self.unembedding.T


def find_readout(model: nn.Module, d: int) -> tuple[Readout | None, str]:
    """Return the model's read-out for width `d`, or None and the reason why there is none."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        return None, "The model has no output embedding."
    if head.weight.shape[1] != d:
        return None, (
            f"The latents write {d} numbers, but the output embedding reads {head.weight.shape[1]}."
        )
    norm = find_final_norm(model)
    if norm is None:
        return None, "The model's final norm could not be found."
    weight, is_centred = probe_norm(norm, d, head.weight)
    return Readout(head.weight, weight, is_centred), ""


def find_final_norm(model: nn.Module) -> nn.Module | None:
    """Return the last norm of the model that is not inside a numbered block."""
    norms = [
        module
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and not any(True for _ in module.children())
        and not any(part.isdigit() for part in path.split("."))
    ]
    return norms[-1] if norms else None


@torch.no_grad()
def probe_norm(norm: nn.Module, d: int, like: Tensor) -> tuple[Tensor, bool]:
    """Return the weight γ (d) float32 of a norm module and whether it subtracts the mean.

    A probe ±v of mean 0 gives ±γ ⊙ v / rms(v) + bias from RMSNorm and LayerNorm alike; adding a
    constant to v changes the output of the first only.
    """
    probe = torch.ones(d)
    probe[1::2] = -1
    if d % 2:
        probe[-1] = 2  # with -1 in its neighbour's place: the last three are 1, -3, 2
        probe[-2] = -3
    probe = probe * PROBE_SIZE

    def ask(x: Tensor) -> Tensor:
        return norm(x.to(like)[None, None])[0, 0].float().cpu()

    up, down = ask(probe), ask(-probe)
    weight = (up - down) / 2 * probe.square().mean().sqrt() / probe
    change = (ask(probe + PROBE_SIZE) - up).abs().mean()
    return weight.to(like.device), bool(change < 0.05 * (up - down).abs().mean() / 2)


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
