"""Activations whose true features are known: sparse sums of directions, made by a seed."""

from sae.worlds.building import make_world
from sae.worlds.presets import resolve_world
from sae.worlds.seeds import evaluation_generator
from sae.worlds.source import WorldSource
from sae.worlds.toy_model import ToyModel, feature_dimensionality, train_toy_model
from sae.worlds.world import Sample, World

__all__ = [
    "Sample",
    "ToyModel",
    "World",
    "WorldSource",
    "evaluation_generator",
    "feature_dimensionality",
    "make_world",
    "resolve_world",
    "train_toy_model",
]
