"""Using a trained dictionary: read prompts and latents, splice, ablate, steer, write the report.

`open_run` opens a run folder with its model, so that fifteen lines do (scripts/explore.py).
"""

from sae.analysis.atlas import Atlas, build_atlas
from sae.analysis.diffing import PlacesOfLatents, places_of_latents
from sae.analysis.heads import head_contributions, head_shares
from sae.analysis.intervene import ablate, splice, steer, strongest_latents
from sae.analysis.opened_run import OpenedRun, open_run
from sae.analysis.report import write_report
from sae.analysis.run_report import report_run

__all__ = [
    "Atlas",
    "OpenedRun",
    "PlacesOfLatents",
    "ablate",
    "build_atlas",
    "head_contributions",
    "head_shares",
    "open_run",
    "places_of_latents",
    "report_run",
    "splice",
    "steer",
    "strongest_latents",
    "write_report",
]
