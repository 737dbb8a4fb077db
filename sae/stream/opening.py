"""From a configuration to an open model and its text, for training, evaluation and reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sae.config import Config
from sae.stream.contexts import Contexts
from sae.stream.documents import Documents, Part, open_documents
from sae.stream.hookpoints import Hookpoint, find_hookpoint
from sae.stream.language_model import LanguageModel, load_language_model
from sae.stream.tokens import ContextStream


@dataclass(frozen=True)
class OpenedModel:
    """A language model, the hookpoint that `cfg` names, and the text of `cfg`."""

    cfg: Config
    lm: LanguageModel
    hookpoint: Hookpoint
    documents: Documents

    def contexts(self, part: Part, *, rank: int = 0, world_size: int = 1) -> ContextStream:
        """Return a stream over one part of the documents, at its beginning."""
        return ContextStream(
            self.documents,
            self.lm.tokenizer,
            self.cfg.data,
            part=part,
            seed=self.cfg.run.seed,
            rank=rank,
            world_size=world_size,
            vocabulary_size=self.lm.vocabulary_size,
        )

    def held_out(self) -> Iterator[Contexts]:
        """Yield the documents that training never sees, once."""
        return self.contexts("held_out").batches(self.cfg.stream.sequences_per_forward)


def open_model(cfg: Config, device: torch.device) -> OpenedModel:
    """Open text and model of `cfg`; the text first, as opening it is quick and can be refused."""
    require_complete(cfg)
    documents = open_documents(cfg.data)
    lm = load_language_model(cfg.model, device)
    _require_fitting_contexts(cfg, lm)
    return OpenedModel(cfg, lm, find_hookpoint(lm.module, cfg.model.hookpoint), documents)


def require_complete(cfg: Config) -> None:
    """Refuse a configuration that lacks what only the user can know."""
    needed = {
        "model.name": (cfg.model.name, "the model, a hub id or a folder"),
        "model.hookpoint": (cfg.model.hookpoint, "the module to read, such as model.layers.8"),
        "data.source": (cfg.data.source, "the text, a hub id or a file"),
    }
    for key, (value, meaning) in needed.items():
        if not value:
            raise ValueError(
                f"`{key}` must name {meaning}; it is empty. Set it in the YAML file or "
                f"with --{key}."
            )


def _require_fitting_contexts(cfg: Config, lm: LanguageModel) -> None:
    longest = lm.max_context_size
    if longest is not None and cfg.data.context_size > longest:
        raise ValueError(
            f"`data.context_size` must be at most what {lm.name} reads, {longest} tokens; got "
            f"{cfg.data.context_size}. Lower it."
        )


def pick_device(name: str, field: str = "run.device") -> torch.device:
    """Return the device that a setting means; auto is a GPU where there is one.

    Errors: RuntimeError where a GPU is asked for and none is visible.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"`{field}` cuda needs a GPU; none is visible. Use auto or cpu.")
    is_gpu = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if is_gpu else "cpu")
