"""What a configuration says of a model's places, found out before the model's weights load.

An outline is the model without memory (torch's meta device), made from its configuration alone:
its modules have their names, its forward, on fake tensors, gives shapes and runs modules in their
order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sae.coder.coder import resolve
from sae.coder.sites import Sites
from sae.config import Config, ModelConfig
from sae.stream.hookpoints import Hookpoint, capture, find_hookpoints_of
from sae.stream.language_model import load_outline


def others(cfg: ModelConfig) -> ModelConfig:
    """Return the configuration of the second model alone."""
    assert cfg.other is not None
    return replace(cfg, name=cfg.other, revision=None, other=None, reinitialised=None)


@contextmanager
def about_other() -> Iterator[None]:
    """Let errors in loading the second model name its setting, and not the first's."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise type(error)(str(error).replace("`model.name`", "`model.other`")) from error


def require_places(cfg: Config) -> None:
    """Refuse places that a coder cannot be trained on, by the models' outlines.

    Errors: ValueError for a path that matches nothing; where a coder has several places, another
    number of them than the site needs, widths and numbers of latents that do not fit, and a place
    that is written before it is read.
    """
    if cfg.coder.site == "sae":
        outlined_hookpoints(cfg)
    elif (sites := outlined_sites(cfg)) is not None:
        resolve(cfg.coder, sites)


def outlined_hookpoints(cfg: Config) -> list[Hookpoint]:
    """Return the modules that `model.hookpoint` names, by the model's outline.

    Errors: ValueError for a path that matches nothing.
    """
    return find_hookpoints_of(load_outline(cfg.model), cfg.model.hookpoint)


def outlined_sites(cfg: Config) -> Sites | None:
    """Return the places of a coder of several, by the models' outlines; None where these do not
    run without values: then the reader finds out, with the weights.

    Errors: as `require_places`, but for the coder's own numbers.
    """
    model = load_outline(cfg.model)
    hookpoints = find_hookpoints_of(model, cfg.model.hookpoint)
    target = cfg.model.target
    targets = find_hookpoints_of(model, target, "model.target") if target else []
    if target and len(targets) != len(hookpoints):
        raise ValueError(
            "`model.target` must match as many modules as `model.hookpoint`; it matches "
            f"{len(targets)}, that {len(hookpoints)}. Name one target for each."
        )
    found = _widths(model, [*hookpoints, *targets])
    if found is None:
        return None
    for before, after in zip(hookpoints, targets, strict=False):
        _require_order(before, after, list(found))
    widths = [found[place] for place in (*hookpoints, *targets)]
    if cfg.model.other is not None:
        with about_other():
            outline = load_outline(others(cfg.model))
        of_other = _widths(outline, hookpoints)
        widths += [] if of_other is None else [of_other[place] for place in hookpoints]
    return Sites.of(cfg.coder, tuple(widths))


def _widths(model: nn.Module, places: list[Hookpoint]) -> dict[Hookpoint, int] | None:
    """Return the places' widths in the order in which a forward comes by them; None where the
    model does not run without values."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
            found = capture(model, places, tokens)
    except (NotImplementedError, RuntimeError):
        return None
    return {place: activations.shape[-1] for place, activations in found.items()}


def _require_order(before: Hookpoint, after: Hookpoint, in_order: list[Hookpoint]) -> None:
    if in_order.index(before) >= in_order.index(after):
        raise ValueError(
            "`model.target` must come behind what is read in the model's forward; got "
            f"`{after}` for `{before}`. Exchange them, or name a later module."
        )
