"""What is compared: a dictionary's results, where they lie, and what it is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.config import Config
from sae.configuration import CONFIG_FILE, read_run_config
from sae.evals.results import EvalResults, read_results

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Entry:
    """One of the dictionaries.

    Attributes:
        place: its folder, or that of its results. cfg: of its run, where it is in a run's folder.
    """

    name: str
    place: Path
    results: EvalResults
    cfg: Config | None

    @property
    def settings(self) -> dict[str, Any]:
        """What a table says of the coder: activation and number of latents, as far as known."""
        activation = None if self.cfg is None else self.cfg.coder.activation
        return {"activation": activation, "d_sae": self.results.provenance.get("d_sae")}


def open_entries(paths: Sequence[Path]) -> list[Entry]:
    """Return the results of run folders, dictionary folders or results files, in their order.

    Errors: ValueError for fewer than two, for one that is given twice, and for a path that has no
    results.
    """
    if len(paths) < 2:
        raise ValueError(
            f"at least two dictionaries must be given; got {len(paths)}. Name run folders, "
            "dictionary folders or results files."
        )
    found = [results_path(path) for path in paths]
    for file in found:
        if found.count(file) > 1:
            raise ValueError(
                f"every dictionary must be given once; got {file} twice. Leave it out."
            )
    names = _names(found)
    return [_entry(name, file) for name, file in zip(names, found, strict=True)]


def results_path(path: Path) -> Path:
    """Return the results file that a path means.

    Errors: ValueError where there is none.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"`{path}` must hold results; there is no {file}. Run `sae eval {path}` first."
        )
    return file.resolve()


def _entry(name: str, file: Path) -> Entry:
    folder = file.parent
    has_run = (folder / CONFIG_FILE).exists()
    cfg = read_run_config(folder) if has_run else None
    return Entry(name, folder, read_results(file), cfg)


def _names(files: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell the files apart, at least the folder's name."""
    parts = [
        file.parent.parts if file.name == RESULTS_FILE else (*file.parent.parts, file.stem)
        for file in files
    ]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(file) for file in files]
