"""Layer norm of one token's activation, without parameters, and the way back.

normed = (x − m) / (s + 1e-5),   x_hat = normed_hat · s + m,
m and s the mean and the standard deviation (unbiased) of the token's own d_in numbers. SAELens
says it so, and dictionaries are exchanged with it: the way back leaves the 1e-5 out.
Source: SAELens 6, `normalize_activations: layer_norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-5


def token_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every token of x (…, d_in), (…, 1) each.

    In float32 at least: a 16-bit mean is off by more than what a token's numbers may differ by.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)


def layer_norm(x: Tensor) -> Tensor:
    """Return x (…, d_in) normalised by token, in float32 at least; zeros where a token is flat."""
    mean, deviation = token_moments(x)
    return (x - mean) / (deviation + EPS)


def undo_layer_norm(x_hat: Tensor, x: Tensor) -> Tensor:
    """Return x_hat (…, d_in), which reconstructs `layer_norm(x)`, in the units of x; its dtype."""
    mean, deviation = token_moments(x)
    return (x_hat * deviation + mean).to(x_hat.dtype)
