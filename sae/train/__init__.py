"""Training: the trainer's page, its state, and the two ways to start it, `run` and `fit`."""

from sae.train.fit import fit
from sae.train.run import run

__all__ = ["fit", "run"]
