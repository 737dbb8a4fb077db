"""The section `world`: activations made of known features, in place of a model's."""

from __future__ import annotations

from dataclasses import dataclass

from .names import DirectionsName, WorldName
from .rules import require, require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Activations whose true features are known, made in place of reading a model.

    None takes the value of the world that `name` names (`sae.worlds.presets`).
    """

    name: WorldName = ""
    """The world to train on, whose other settings are where its own are None; empty: none, a model
    is read."""

    seed: int | None = None
    """Seed of the world itself: directions, bias, correlations, magnitudes; not of its samples."""

    n_features: int | None = None
    """Number of true features, each with its direction."""

    d_in: int | None = None
    """Width of the activations, in dimensions."""

    directions: DirectionsName | None = None
    """How features lie: random unit vectors, those made nearly orthogonal by gradient steps, or
    orthonormal ones, of which there are at most d_in."""

    orthogonal_steps: int | None = None
    """Adam steps on the squared cosines of near_orthogonal directions."""

    orthogonal_lr: float | None = None
    """Learning rate of those steps."""

    bias_norm: float | None = None
    """Norm of the constant vector added to every activation, in the units of the activations."""

    norm_spread: float | None = None
    """Features get norms 1 + norm_spread · N(0, 1), at least 0.01, which count into their codes."""

    probabilities: tuple[float, ...] | None = None
    """Firing probabilities, one a feature or one for all, in [0, 1]; None: Zipf's law."""

    zipf_exponent: float | None = None
    """Feature of rank r fires in proportion to r^(−zipf_exponent), before rescaling."""

    rarest: float | None = None
    """Firing probability of the last feature, to which Zipf's law is rescaled."""

    commonest: float | None = None
    """Firing probability of the first feature, to which Zipf's law is rescaled."""

    correlation_rank: int | None = None
    """Rank of the factor that correlates the features' firing; 0: none are correlated."""

    correlation_scale: float | None = None
    """Standard deviation of that factor's entries, whose rows' inner products correlate two
    features' latent Gaussians."""

    trees: int | None = None
    """Trees of features, in which a child fires only where its parent does; 0: no hierarchy."""

    branching: int | None = None
    """Children of each parent."""

    depth: int | None = None
    """Levels of children below a tree's root."""

    exclusive_share: float | None = None
    """Share of the parents of whose children at most one fires at a time, in [0, 1]."""

    compensated: bool | None = None
    """Raise children's probabilities by what parents and exclusion take, so that features fire
    about as often as `probabilities`, or Zipf's law, says; else these are given the parent's."""

    scaled_by_parent: bool | None = None
    """Multiply children by their parent's magnitude over its mean."""

    first_magnitude: float | None = None
    """Mean magnitude of the first feature; means are linear over rank."""

    last_magnitude: float | None = None
    """Mean magnitude of the last feature."""

    magnitude_sd: float | None = None
    """Features' standard deviations of magnitude are |N(magnitude_sd, magnitude_sd_spread)|."""

    magnitude_sd_spread: float | None = None
    """How much these differ between features."""

    sparsity: float | None = None
    """Share of samples in which a feature of toy_model is 0, in [0, 1); else it is uniform on
    [0, 1]."""

    importance: float | None = None
    """Weight of feature i in toy_model's loss is importance^i, importance in (0, 1]."""

    toy_steps: int | None = None
    """Training steps of toy_model."""

    def __post_init__(self) -> None:
        positive = (
            *("n_features", "d_in", "orthogonal_steps", "orthogonal_lr", "zipf_exponent"),
            *("rarest", "commonest", "branching", "depth", "first_magnitude", "last_magnitude"),
            *("importance", "toy_steps"),
        )
        require_positive("world", self, *positive)
        not_negative = (
            *("seed", "bias_norm", "norm_spread", "correlation_rank", "correlation_scale", "trees"),
            *("magnitude_sd", "magnitude_sd_spread", "sparsity", "exclusive_share"),
        )
        require_not_negative("world", self, "Give 0 or more, or leave it out.", *not_negative)
        for name in ("rarest", "commonest", "exclusive_share", "importance"):
            value = getattr(self, name)
            require(
                value is None or value <= 1,
                f"world.{name}",
                "must be at most 1",
                value,
                "Lower it.",
            )
        require(
            self.sparsity is None or self.sparsity < 1,
            "world.sparsity",
            "must be in [0, 1)",
            self.sparsity,
            "Lower it.",
        )
        require(
            self.probabilities is None or all(0 <= p <= 1 for p in self.probabilities),
            "world.probabilities",
            "must lie in [0, 1]",
            self.probabilities,
            "Give one for all features, or one a feature.",
        )
