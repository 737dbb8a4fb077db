"""A run folder with its model: dictionary, language model, hookpoint, and what the report knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sae.analysis.atlas import Atlas
from sae.coder import SparseCoder
from sae.config import Config
from sae.configuration import read_run_config
from sae.interop import load
from sae.stream.hookpoints import Hookpoint, find_hookpoint
from sae.stream.language_model import LanguageModel, load_language_model
from sae.stream.opening import model_device, pick_device


@dataclass(frozen=True)
class OpenedRun:
    """What analysis needs of a run; `atlas` holds what its report shows."""

    coder: SparseCoder
    lm: LanguageModel
    hookpoint: Hookpoint
    atlas: Atlas
    target: Hookpoint | None = None  # what a transcoder writes

    @torch.no_grad()
    def generate(self, prompt: str, n_tokens: int = 20) -> str:
        """Return the model's most likely continuation of `prompt`."""
        inputs = self.lm.tokenizer(prompt, return_tensors="pt").to(self.lm.device)
        model: Any = self.lm.module
        ids = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)
        return str(self.lm.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))


def open_run(run: str | Path) -> OpenedRun:
    """Open a run folder that has its report (`sae report RUN` writes the atlas).

    Errors: ValueError, before weights load, for a coder that reads several places.
    """
    run = Path(run)
    cfg = read_run_config(run)
    _require_one_place(cfg, run)
    atlas = Atlas.load(run)
    lm = load_language_model(cfg.model, model_device(cfg, pick_device(cfg.run.device)))
    hookpoint = find_hookpoint(lm.module, cfg.model.hookpoint)
    target = find_hookpoint(lm.module, cfg.model.target) if cfg.model.target else None
    return OpenedRun(load(run).to(lm.device), lm, hookpoint, atlas, target)


def _require_one_place(cfg: Config, run: Path) -> None:
    if cfg.coder.site in ("crosscoder", "cross_layer"):
        raise ValueError(
            "`open_run` opens runs that read one place, whose model can be spliced and steered in "
            f"any forward; {run} is a {cfg.coder.site} of {cfg.model.hookpoint}. `sae.load` opens "
            "its coder, `sae eval` runs the model on all that it writes, and "
            "`sae.analysis.places_of_latents` says where a crosscoder's latents are."
        )
