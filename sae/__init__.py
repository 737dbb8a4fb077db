"""Train, measure and use sparse dictionaries of neural-network activations.

    coder = sae.fit(activations, d_sae=4096, k=32)
    coder = sae.load("runs/quickstart")
    latents = coder.encode_sparse(x)

Names load on first use, so that importing `sae` is instant and touches no device.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae.coder import Latents, SparseCoder
    from sae.config import Config
    from sae.interop import load
    from sae.train import fit

__version__ = "0.1.0"
__all__ = ["Config", "Latents", "SparseCoder", "fit", "load"]

_HOMES = {
    "Config": "sae.config",
    "Latents": "sae.coder",
    "SparseCoder": "sae.coder",
    "fit": "sae.train",
    "load": "sae.interop",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module `sae` has no attribute {name!r}; it offers {__all__}")
