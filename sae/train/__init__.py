"""Training: the trainer's page, its state, and the ways to start it (`run` a configuration, `fit`)."""

from sae.train.fit import fit
from sae.train.run import run

__all__ = ["fit", "run"]
