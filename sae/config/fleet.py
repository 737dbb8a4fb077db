"""The section `fleet`: several dictionaries on one stream of activations."""

from __future__ import annotations

from dataclasses import dataclass

from .names import ActivationName


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """Several dictionaries on one stream of activations: one for every combination of values.

    Each list replaces the setting that it is named after; an empty one leaves it as it is.
    """

    k: tuple[int, ...] = ()
    """Values of `coder.k`: active latents a token."""

    d_sae: tuple[int, ...] = ()
    """Values of `coder.d_sae`: numbers of latents."""

    seed: tuple[int, ...] = ()
    """Values of `run.seed` for starting weights and whatever is random in a coder; the order of
    data is that of `run.seed` itself, for all."""

    lr: tuple[float, ...] = ()
    """Values of `train.lr`: peak learning rates."""

    target_l0: tuple[float, ...] = ()
    """Values of `coder.target_l0`: active latents a token that training aims at."""

    activation: tuple[ActivationName, ...] = ()
    """Values of `coder.activation`."""

    hookpoint: tuple[str, ...] = ()
    """Values of `model.hookpoint`: modules that are read in one forward, one dictionary each."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is swept: one dictionary is trained."""
        return not any(getattr(self, setting) for setting in FLEET_SETTINGS)


# What each list of a fleet replaces; members are named and counted in this order.
FLEET_SETTINGS = {
    "hookpoint": "model.hookpoint",
    "activation": "coder.activation",
    "d_sae": "coder.d_sae",
    "k": "coder.k",
    "target_l0": "coder.target_l0",
    "lr": "train.lr",
    "seed": "run.seed",
}
