"""From the residual stream to logits, in any model: W_U (γ ⊙ C d), up to a positive factor.

W_U (vocabulary, d) is the unembedding, γ the final norm's weight, C its centring (the identity for
RMSNorm). The factor, 1 / rms of the residual at hand, differs from token to token and is left out.

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
