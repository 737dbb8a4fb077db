"""Everything known about every latent, as one object that is saved beside the report.

`features.safetensors` holds the tensors, `features.json` the token texts and the few numbers; both
lie in the run folder. Collecting is in `features`, `logit_effects` and `neighbours`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from safetensors.torch import load_file
from torch import Tensor

from sae.analysis.features import Encodes, Features, collect_features
from sae.analysis.logit_effects import LogitEffects, logit_effects
from sae.analysis.neighbours import Neighbours, nearest_latents
from sae.analysis.strongest import NO_TOKEN
from sae.evals.readout import find_readout
from sae.files import read_json, write_json, write_tensors
from sae.stream.contexts import CapturedContexts
from sae.stream.language_model import LanguageModel
from sae.stream.vocabulary import join_texts, token_texts, visible

TENSORS_FILE = "features.safetensors"
TEXTS_FILE = "features.json"


class Coder(Encodes, Protocol):
    """What `build_atlas` needs of a dictionary: `encode_sparse`, `d_sae` and the decoder rows.

    Of a dictionary that writes to several places the last is shown (`last_written`).
    """

    @property
    def W_dec(self) -> Tensor: ...


class ShownContext(NamedTuple):
    """One context of a latent: token texts, the latent's activation at each, the peak's place."""

    tokens: list[str]
    activations: list[float]
    peak: int

    @property
    def text(self) -> str:
        """The context on one line, its strongest token in «»."""
        parts = [join_texts(self.tokens[: self.peak]), self.tokens[self.peak]]
        after = join_texts(self.tokens[self.peak + 1 :])
        return visible(f"{parts[0]}«{parts[1]}»{after}")


@dataclass(frozen=True)
class Atlas:
    """Features, logit effects (None where the model has no read-out; `notes` says why), neighbours.

    `texts` has the text of every token id that occurs in them.
    """

    features: Features
    effects: LogitEffects | None
    neighbours: Neighbours
    texts: dict[int, str]
    notes: tuple[str, ...] = ()

    def contexts(self, latent: int) -> list[ShownContext]:
        """Return the latent's strongest contexts, strongest first."""
        features, shown = self.features, []
        for row in range(features.peaks.shape[1]):
            ids = features.tokens[latent, row]
            is_token = ids != NO_TOKEN
            if is_token[features.left]:
                texts = [self.texts[i] for i in ids[is_token].tolist()]
                activations = features.activations[latent, row][is_token].tolist()
                peak = int(is_token[: features.left].sum())
                shown.append(ShownContext(texts, activations, peak))
        return shown

    def promoted(self, latent: int) -> list[tuple[str, float]]:
        """Return the tokens that the latent promotes most, with z (see `logit_effects`)."""
        if self.effects is None:
            return []
        ids = self.effects.promoted_tokens[latent].tolist()
        values = self.effects.promoted[latent].tolist()
        return [(self.texts[i], z) for i, z in zip(ids, values, strict=True)]

    def save(self, folder: str | Path) -> None:
        """Write the two files into `folder`."""
        folder = Path(folder)
        groups = {"features": self.features, "effects": self.effects, "neighbours": self.neighbours}
        tensors = {
            f"{group}.{field.name}": getattr(record, field.name)
            for group, record in groups.items()
            if record is not None
            for field in fields(record)
            if isinstance(getattr(record, field.name), Tensor)
        }
        write_tensors(folder / TENSORS_FILE, tensors)
        numbers = {name: getattr(self.features, name) for name in _NUMBERS}
        texts = {str(i): text for i, text in self.texts.items()}
        write_json(
            folder / TEXTS_FILE, {"features": numbers, "notes": list(self.notes), "texts": texts}
        )

    @classmethod
    def load(cls, folder: str | Path) -> Atlas:
        """Read what `save` wrote. Errors: ValueError naming what is missing."""
        folder = Path(folder)
        if not (folder / TENSORS_FILE).exists() or not (folder / TEXTS_FILE).exists():
            raise ValueError(
                f"`folder` must hold {TENSORS_FILE} and {TEXTS_FILE}; got {folder}. "
                "Write them with `sae report RUN`."
            )
        tensors, said = load_file(folder / TENSORS_FILE), read_json(folder / TEXTS_FILE)
        groups: dict[str, dict[str, Any]] = {"features": {}, "effects": {}, "neighbours": {}}
        for name, tensor in tensors.items():
            group, field = name.split(".")
            groups[group][field] = tensor
        return cls(
            Features(**said["features"], **groups["features"]),
            LogitEffects(**groups["effects"]) if groups["effects"] else None,
            Neighbours(**groups["neighbours"]),
            {int(i): text for i, text in said["texts"].items()},
            tuple(said["notes"]),
        )


_NUMBERS = ("n_tokens", "n_sequences", "left")


def build_atlas(
    coder: Coder,
    lm: LanguageModel,
    contexts: Iterable[CapturedContexts],
    *,
    contexts_per_latent: int = 8,
    max_tokens: int | None = None,
) -> Atlas:
    """Collect everything the report shows of `coder`, reading `contexts` once."""
    features = collect_features(
        coder, contexts, contexts_per_latent=contexts_per_latent, max_tokens=max_tokens
    )
    written = last_written(coder)
    readout, note = find_readout(lm.module, written.shape[1])
    effects = None
    if readout is not None:
        effects = logit_effects(readout, written, vocabulary=len(lm.tokenizer))
    ids = _used_ids(features, effects)
    return Atlas(
        features,
        effects,
        nearest_latents(coder.W_dec),
        dict(zip(ids, token_texts(lm.tokenizer, ids), strict=True)),
        (f"No logit effects: {note}",) if note else (),
    )


def last_written(coder: Coder) -> Tensor:
    """Return what latents write to the last of their places, (d_sae, d)."""
    sites = getattr(coder, "sites", None)
    return coder.W_dec if sites is None else coder.W_dec[:, -sites.written_widths[-1] :]


def _used_ids(features: Features, effects: LogitEffects | None) -> list[int]:
    used = [features.tokens.flatten()]
    if effects is not None:
        used += [effects.promoted_tokens.flatten(), effects.suppressed_tokens.flatten()]
    unique = {i for part in used for i in part.unique().tolist()}
    return sorted(unique - {NO_TOKEN})
