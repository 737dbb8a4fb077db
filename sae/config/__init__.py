"""Every setting of a run, as one tree of frozen dataclasses.

The schema is the code: a field's type is what it accepts, its docstring what it means and in which
unit, its default what is used. Precedence: defaults < YAML < command line. `__post_init__` checks
and never assigns; `None` means "derive it", and `sae.train.run` saves the derived value with the
run. Config is input, never state.

A file a section, `names` for the words that settings accept, `coder_rules` and `whole` for what
goes together. Nothing here imports torch, so that `sae train --help` is instant. Reading YAML and
the command line lives in `sae.configuration`.
"""

from .coder import CoderConfig
from .coder_rules import HAVE_K, IDLE_BUT_FOR, ONLY_FOR, SITES_FOR, SPARSITY_LOSSES, require_fits
from .data import DataConfig
from .evaluation import EvalConfig, ReportConfig
from .fleet import FLEET_SETTINGS, FleetConfig
from .model import ModelConfig
from .names import (
    ActivationName,
    BosName,
    ContentName,
    ContextsName,
    DecayName,
    DirectionsName,
    DtypeName,
    EmbedderName,
    EvalName,
    EvalSetName,
    JudgeName,
    MaskName,
    ModelLossName,
    MomentFormat,
    NormalisationName,
    OptimizerName,
    SiteName,
    SparsityLossName,
    TrackerName,
    WorldName,
)
from .run import RunConfig
from .stream import HarvestConfig, StreamConfig
from .train import TrainConfig
from .whole import Config
from .world import WorldConfig

__all__ = [
    "ActivationName",
    "BosName",
    "CoderConfig",
    "Config",
    "ContentName",
    "ContextsName",
    "DataConfig",
    "DecayName",
    "DirectionsName",
    "DtypeName",
    "EmbedderName",
    "EvalConfig",
    "EvalName",
    "EvalSetName",
    "FLEET_SETTINGS",
    "FleetConfig",
    "HAVE_K",
    "HarvestConfig",
    "IDLE_BUT_FOR",
    "JudgeName",
    "MaskName",
    "ModelConfig",
    "ModelLossName",
    "MomentFormat",
    "NormalisationName",
    "ONLY_FOR",
    "OptimizerName",
    "ReportConfig",
    "RunConfig",
    "SITES_FOR",
    "SPARSITY_LOSSES",
    "SiteName",
    "SparsityLossName",
    "StreamConfig",
    "TrackerName",
    "TrainConfig",
    "WorldConfig",
    "WorldName",
    "require_fits",
]
