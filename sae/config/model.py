"""The section `model`: what is read, and where."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .names import DtypeName
from .rules import require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model whose activations are read, and where in it."""

    name: str = ""
    """A hub id, a local folder, a .gguf file, or `package:NAME` for a model inside an installed
    Python package."""

    revision: str | None = None
    """Hub revision (branch, tag or commit) of the model; None is the hub's default."""

    hookpoint: str = ""
    """Module path whose activations are read, such as `model.layers.8`; `*` globs; `:in` or `:out`
    names the side (default out); commas separate several. An sae and a transcoder read exactly one
    module, a crosscoder and a cross_layer transcoder several."""

    target: str | None = None
    """Module path, like `hookpoint`, whose activations a transcoder writes; for cross_layer as many
    as there are hookpoints, in their order. None for an sae and a crosscoder, which write what they
    read."""

    other: str | None = None
    """A second model that reads the same tokens, at the same hookpoints, for comparing the two; it
    must have the same tokenizer."""

    reinitialised: int | None = None
    """Seed of weights drawn anew, as before the model's own training: a null model, whose
    dictionary a trained one must beat. None keeps the weights."""

    dtype: DtypeName = "auto"
    """Precision of the model's weights; auto: bfloat16 where the device multiplies it natively,
    else float32."""

    device: str = "auto"
    """Device of the models: cpu, cuda or cuda:1; auto: beside the coder."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            "model.device",
            "must be auto, cpu, cuda or cuda:N",
            self.device,
            "Use auto.",
        )
