"""Activations without features: what a dictionary finds in them, it would find in any.

Each dimension is permuted by itself over the tokens, so that its values stay and nothing that two
dimensions have in common does. Directions other than the axes then carry nothing of their own.
Permutations are of one step's tokens, so that memory stays constant; those of a run's micro-batches
and processes are alike, of other tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.config import TrainConfig
from sae.train.resampling import hash_of

CALIBRATION = -1


def as_trained_on(x: Tensor, cfg: TrainConfig, seed: int, step: int) -> Tensor:
    """Return rows x (n, width), or, where `cfg` asks for it, the same with dimensions shuffled.

    The same permutations come at the same step of a resumed run; `step` is CALIBRATION for the
    sample before the first.
    """
    if not cfg.shuffle_dimensions:
        return x
    generator = torch.Generator(device=x.device).manual_seed(hash_of(seed, step))
    order = torch.rand(x.shape, generator=generator, device=x.device).argsort(0)
    return x.gather(0, order)
