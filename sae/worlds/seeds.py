"""Seeds of everything that is drawn from a world, so that no two uses ever share one.

A CPU generator of torch reads the low 32 bits of its seed only. These are cut into three ranges:
blocks of training rows, the calibration sample, evaluation. Within training, a block's seed is a
one-to-one function of (lane, block), so that a run never draws a block twice.
"""

from __future__ import annotations

import hashlib

import torch

TRAINING_BITS = 31
CALIBRATION_OFFSET = 1 << TRAINING_BITS
EVALUATION_OFFSET = CALIBRATION_OFFSET + (1 << (TRAINING_BITS - 1))
# Odd, so that multiplying by it permutes the numbers below a power of two.
SCATTER = 0x9E3779B1


def training_generator(
    seed: int, lane: int, block: int, n_lanes: int, device: torch.device
) -> torch.Generator:
    """Return the generator of one block of training rows."""
    index = _start(seed) + block * n_lanes + lane
    low = (index * SCATTER) % (1 << TRAINING_BITS)
    return _generator(low, device)


def calibration_generator(seed: int, device: torch.device) -> torch.Generator:
    """Return the generator of the rows that a run is calibrated on."""
    return _generator(CALIBRATION_OFFSET + _start(seed) // 2, device)


def evaluation_generator(seed: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator for `World.sample` whose rows no training ever draws, for any seed."""
    return _generator(EVALUATION_OFFSET + _start(seed) // 2, torch.device(device))


def _start(seed: int) -> int:
    """Return where among the seeds of its range a run begins."""
    digest = hashlib.sha256(f"world {seed}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)
