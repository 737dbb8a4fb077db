"""The report's data as one compact text: gzip + base64 of a JSON head and typed arrays.

Layout before compression: uint32 length of the head, the head (UTF-8 JSON, padded with spaces so
that arrays start at a multiple of 8), the arrays, each padded to 8 bytes. `head.arrays[name]` is
[type, offset, length]; types are JavaScript's typed arrays. Token ids are renumbered by falling
frequency and index `head.texts`; activations are shares of their latent's maximum, in 65,535ths.
"""

from __future__ import annotations

import base64
import gzip
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from sae.analysis.atlas import Atlas
from sae.analysis.features import Features, histogram_edges
from sae.analysis.strongest import NO_TOKEN

# Windows of more tokens than this make the page slow to open; fewer contexts are shown instead.
MAX_WINDOW_TOKENS = 4_000_000
ALIGNMENT = 8
_JS_TYPES = {
    "uint8": "Uint8Array",
    "uint16": "Uint16Array",
    "uint32": "Uint32Array",
    "int16": "Int16Array",
    "float32": "Float32Array",
}


def pack_report(
    atlas: Atlas, page: Mapping[str, Any], more: Mapping[str, np.ndarray] | None = None
) -> str:
    """Return the text of the data script: the atlas' arrays and `more`, and `page` in the head."""
    features = atlas.features
    m = shown_contexts(features)
    order, renumber = _by_frequency(atlas, m)
    arrays = _feature_arrays(features, renumber, m) | _link_arrays(atlas, renumber)
    arrays |= more or {}
    first, last = _used_bins(features)
    head = {
        **page,
        "d_sae": features.d_sae,
        "n_tokens": features.n_tokens,
        "contexts": m,
        "window": features.tokens.shape[2],
        "left": features.left,
        "edges": histogram_edges()[first : last + 1].tolist(),
        "texts": [atlas.texts[int(i)] for i in order],
        "notes": list(atlas.notes),
    }
    arrays["histogram"] = _smallest(features.histogram[:, first:last].numpy())
    return base64.b64encode(gzip.compress(_layout(head, arrays), 6, mtime=0)).decode("ascii")


def shown_contexts(features: Features) -> int:
    """Return how many contexts of each latent the page shows."""
    d_sae, m, window = features.tokens.shape
    return max(1, min(m, MAX_WINDOW_TOKENS // (d_sae * window)))


def _feature_arrays(features: Features, renumber: np.ndarray, m: int) -> dict[str, np.ndarray]:
    top = features.max_activations.numpy().astype("float32")
    share = features.activations[:, :m].numpy() / np.maximum(top, 1e-30)[:, None, None]
    peaks = features.peaks[:, :m].numpy()
    return {
        "counts": features.firing_counts.numpy().astype("uint32"),
        "maxima": top,
        "peaks": np.where(np.isfinite(peaks), peaks, 0).astype("float32"),
        "tokens": renumber[features.tokens[:, :m].numpy()],
        "activations": np.rint(share.clip(0, 1) * 65535).astype("uint16"),
    }


def _link_arrays(atlas: Atlas, renumber: np.ndarray) -> dict[str, np.ndarray]:
    near = atlas.neighbours
    arrays = {
        "near": _smallest(near.latents.numpy()),
        "cosines": np.rint(near.cosines.numpy() * 32767).astype("int16"),
    }
    if (effects := atlas.effects) is not None:
        arrays["scores"] = effects.scores.numpy().astype("float32")
        for name in ("promoted", "suppressed"):
            arrays[name] = renumber[getattr(effects, f"{name}_tokens").numpy()]
            arrays[f"{name}_z"] = np.rint(getattr(effects, name).numpy() * 256).astype("int16")
    return arrays


def _by_frequency(atlas: Atlas, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids by falling frequency, and a table from id to place in that order.

    The table's last entry, which NO_TOKEN = −1 indexes, is the type's largest value.
    """
    used: list[Tensor] = [atlas.features.tokens[:, :m]]
    if atlas.effects is not None:
        used += [atlas.effects.promoted_tokens, atlas.effects.suppressed_tokens]
    flat = np.concatenate([part.numpy().ravel() for part in used])
    ids, counts = np.unique(flat[flat != NO_TOKEN], return_counts=True)
    order = ids[np.argsort(-counts, kind="stable")]
    kind = np.uint16 if len(order) < np.iinfo(np.uint16).max else np.uint32
    table = np.full(int(ids.max(initial=0)) + 2, np.iinfo(kind).max, dtype=kind)
    table[order] = np.arange(len(order), dtype=kind)
    return order, table


def _used_bins(features: Features) -> tuple[int, int]:
    """Return the range of histogram bins that any latent uses, at least one bin."""
    used = features.histogram.sum(0).nonzero().flatten()
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)


def _smallest(array: np.ndarray) -> np.ndarray:
    """Return a non-negative array in the smallest unsigned type that holds it."""
    largest = int(array.max(initial=0))
    kinds = (np.uint8, np.uint16, np.uint32)
    return array.astype(next(kind for kind in kinds if largest <= np.iinfo(kind).max))


def _layout(head: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    offset, table, chunks = 0, {}, []
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        table[name] = [_JS_TYPES[array.dtype.name], offset, array.size]
        chunks.append(raw + bytes(-len(raw) % ALIGNMENT))
        offset += len(chunks[-1])
    text = json.dumps({**head, "arrays": table}, ensure_ascii=False, allow_nan=False).encode()
    text += b" " * (-(4 + len(text)) % ALIGNMENT)
    return struct.pack("<I", len(text)) + text + b"".join(chunks)
