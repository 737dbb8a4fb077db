"""The report: one self-contained HTML file about a run and every latent of its dictionary.

The page is a template, a style sheet and a few scripts beside this file, inlined together with the
data, so that it opens from disk and asks the network for nothing (its own policy forbids it).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from sae.analysis.atlas import Atlas
from sae.analysis.diffing import PlacesOfLatents
from sae.analysis.report.latent_scores import place_note, with_shares
from sae.analysis.report.payload import pack_report
from sae.analysis.report.summary import read_summary
from sae.files import write_text

REPORT_FILE = "report.html"
# In order: later scripts use names of earlier ones.
SCRIPTS = (
    "data.js",
    "text.js",
    "charts.js",
    "search.js",
    "list.js",
    "card.js",
    "evals.js",
    "page.js",
)


def write_report(
    run_folder: str | Path, atlas: Atlas, places: PlacesOfLatents | None = None
) -> Path:
    """Write `report.html` into `run_folder` from what lies there and `atlas`; return its path.

    With `places`, of a dictionary that writes several, latents show their share of each.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    run_folder = Path(run_folder)
    summary = read_summary(run_folder, atlas.features.d_sae)
    scores, notes = summary.scores, atlas.notes
    if places is not None:
        scores = with_shares(scores, places)
        notes = (*notes, place_note(places, atlas.features.firing_counts > 0))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.from_string(_source("page.html.j2")).render(
        summary=summary,
        notes=notes,
        n_tokens=atlas.features.n_tokens,
        has_effects=atlas.effects is not None,
        style=Markup(_source("style.css")),
        script=Markup("\n".join(map(_source, SCRIPTS))),
        sorts=scores.sorts,
        data=Markup(
            pack_report(
                atlas,
                {"curves": summary.curves, **scores.head},
                scores.arrays,
            )
        ),
    )
    path = run_folder / REPORT_FILE
    write_text(path, page)
    return path


def _source(name: str) -> str:
    return (files("sae.analysis.report") / name).read_text(encoding="utf-8")
