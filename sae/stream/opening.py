"""From a configuration to an open model and its text, for training, evaluation and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from sae.config import Config
from sae.stream.contexts import Contexts
from sae.stream.documents import Documents, Part, open_documents
from sae.stream.hookpoints import Hookpoint, find_hookpoints_of
from sae.stream.language_model import LanguageModel, load_language_model, load_tokenizer
from sae.stream.live import LiveRows
from sae.stream.outline import about_other, others, require_places
from sae.stream.reader import Reader
from sae.stream.tokens import ContextStream


@dataclass(frozen=True)
class OpenedModel:
    """A language model, or two that are compared, the hookpoints that `cfg` names, and its text.

    targets: the hookpoints that are written, where these are others than `hookpoints`.
    """

    cfg: Config
    lm: LanguageModel
    hookpoints: tuple[Hookpoint, ...]
    documents: Documents
    other: LanguageModel | None = None
    targets: tuple[Hookpoint, ...] = ()

    @property
    def hookpoint(self) -> Hookpoint:
        """The only hookpoint.

        Errors: ValueError where `cfg` names several places.
        """
        require_single((*self.hookpoints, *self.targets), self.other is not None)
        return self.hookpoints[0]

    def reader(self) -> Reader:
        """Return what reads all places, those that are written last."""
        return Reader(self.lm, (*self.hookpoints, *self.targets), self.other)

    def rows(self, reader: Reader, *, lane: int = 0, n_lanes: int = 1) -> LiveRows:
        """Return the training documents' activations, one lane of them, at their beginning."""
        origin = {
            "model_name": self.cfg.model.name,
            "context_size": self.cfg.data.context_size,
            "dataset_path": self.cfg.data.source,
            "held_out_fraction": self.cfg.data.held_out_fraction,
        }
        if self.cfg.model.reinitialised is not None:
            origin["model_reinitialised"] = self.cfg.model.reinitialised
        if self.other is not None:
            origin["model_other"] = self.other.name
        return LiveRows(
            reader,
            lambda: self.contexts("train", rank=lane, world_size=n_lanes),
            self.cfg.stream,
            origin,
        )

    def contexts(
        self, part: Part, *, rank: int = 0, world_size: int = 1, seed: int | None = None
    ) -> ContextStream:
        """Return a stream over one part of the documents, at its beginning; in the run's order, or
        in that of another `seed`."""
        return ContextStream(
            self.documents,
            self.lm.tokenizer,
            self.cfg.data,
            part=part,
            seed=self.cfg.run.seed if seed is None else seed,
            rank=rank,
            world_size=world_size,
            vocabulary_size=self.lm.vocabulary_size,
        )

    def held_out(self) -> Iterator[Contexts]:
        """Yield the documents that training never sees, once."""
        return self.contexts("held_out").batches(self.cfg.stream.sequences_per_forward)


def open_model(
    cfg: Config, device: torch.device, *, require: Callable[[Documents], None] = lambda _: None
) -> OpenedModel:
    """Open text and model of `cfg`; the text first, as opening it is quick and can be refused.

    `require` may refuse the text before the model loads.
    """
    require_complete(cfg)
    documents = open_documents(cfg.data)
    require(documents)
    _require_same_tokenizer(cfg)
    require_places(cfg)
    device = model_device(cfg, device)
    lm = load_language_model(cfg.model, device)
    _require_fitting_contexts(cfg, lm)
    hookpoints = tuple(find_hookpoints_of(lm.module, cfg.model.hookpoint))
    targets = tuple(find_hookpoints_of(lm.module, cfg.model.target)) if cfg.model.target else ()
    other = None
    if cfg.model.other is not None:
        with about_other():
            other = load_language_model(others(cfg.model), device)
    return OpenedModel(cfg, lm, hookpoints, documents, other, targets)


def model_device(cfg: Config, device: torch.device) -> torch.device:
    """Return the device that `cfg` gives its models; auto is `device`, the coder's."""
    if cfg.model.device == "auto":
        return device
    return pick_device(cfg.model.device, "model.device")


def require_single(hookpoints: Sequence[Hookpoint | str], is_pair: bool = False) -> None:
    """Refuse several hookpoints where one dictionary is trained or measured.

    Errors: ValueError.
    """
    if len(hookpoints) == 1 and not is_pair:
        return
    if is_pair:
        raise ValueError(
            "`model.other` must be left out here, where one module of one model is read, as "
            "`coder.site: sae` does. Leave it out, or set `coder.site: crosscoder`."
        )
    names = ", ".join(map(str, hookpoints[:8])) + (", …" if len(hookpoints) > 8 else "")
    raise ValueError(
        f"`model.hookpoint` must match exactly one module here; it matches {len(hookpoints)}: "
        f"{names}. Give one of them; or train one dictionary for each (`fleet.hookpoint`), or one "
        "that reads them all (`coder.site: crosscoder`)."
    )


def _require_same_tokenizer(cfg: Config) -> None:
    """Refuse two models that read text as different tokens, before any weights load."""
    if cfg.model.other is None:
        return
    mine = load_tokenizer(cfg.model)
    with about_other():
        theirs = load_tokenizer(others(cfg.model))
    if mine.get_vocab() != theirs.get_vocab():
        raise ValueError(
            f"`model.other` must have the tokenizer of `model.name`; {cfg.model.other!r} has "
            f"{len(theirs.get_vocab())} tokens, {cfg.model.name!r} {len(mine.get_vocab())}, and "
            "they differ. Choose a model of the same family."
        )


def require_complete(cfg: Config) -> None:
    """Refuse a configuration that lacks what only the user can know, or that is of a world."""
    if cfg.world.name:
        raise ValueError(
            "`world.name` must be empty where a model reads text, as here; got "
            f"{cfg.world.name!r}, which has neither. Leave it out, or train on the world."
        )
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
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.startswith("cuda"):
        device = torch.device(name)
        if (device.index or 0) >= n_gpus:
            seen = f"{n_gpus} are visible" if n_gpus else "none is visible"
            raise RuntimeError(f"`{field}` {name} needs a GPU; {seen}. Use auto or cpu.")
        return device
    return torch.device("cuda" if name == "auto" and n_gpus else "cpu")
