"""From a run folder to its report: open model and text, collect every latent, write the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sae.analysis.atlas import build_atlas
from sae.analysis.diffing import places_of_latents
from sae.analysis.report import write_report
from sae.config import Config
from sae.interop import load
from sae.stream.live import captured_contexts
from sae.stream.opening import open_model, pick_device
from sae.stream.reader import Reader


def report_run(run: Path, cfg: Config, tell: Callable[[str], None] = lambda _: None) -> Path:
    """Write `report.html` and the features that it shows into the run's folder; return its path.

    Contexts come from held-out documents, `cfg.report.tokens` of them.
    """
    coder = load(run)
    opened = open_model(cfg, pick_device(cfg.run.device))
    tell(f"collecting contexts of {coder.d_sae:,} latents from {cfg.report.tokens:,} tokens")
    max_norm = coder.metadata.get("max_norm")
    atlas = build_atlas(
        coder.to(opened.lm.device),
        opened.lm,
        captured_contexts(
            Reader(opened.lm, opened.hookpoints, opened.other),
            opened.held_out(),
            max_norm=max_norm if isinstance(max_norm, float) else None,
        ),
        contexts_per_latent=cfg.report.contexts_per_latent,
        max_tokens=cfg.report.tokens,
    )
    atlas.save(run)
    is_of_several = len(coder.sites.written_widths) > 1
    return write_report(run, atlas, places_of_latents(coder) if is_of_several else None)
