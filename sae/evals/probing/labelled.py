"""Labelled texts of the installed package sae-probes: its 113 balanced binary data sets.

The package is found, never imported: its list of data sets says which are binary, and each is a
compressed CSV file with `prompt` and `target`. The class that sorts last counts as the concept.
Of each class `eval.probe_examples` / 2 texts are drawn by number, half to train and half to test.

Source: Kantamneni et al. 2025, "Are sparse autoencoders useful?" (arXiv 2502.16681).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch

from sae.config import EvalConfig
from sae.evals.numbers import HALVES, numbers_of
from sae.stream.packages import package_folder
from sae.stream.text_files import read_csv_rows

PACKAGE = "package:sae-probes"
LIST = "probing_datasets_MASTER.csv.zst"
BINARY = "Binary Classification"
ROWS_BITS = 24


class LabelledText(NamedTuple):
    """A text of a task: whether it holds the concept, its number, and its part (0 trains)."""

    text: str
    is_on: bool
    number: int
    half: int


class LabelledTexts:
    """The data sets whose names match the globs, in the package's order.

    Errors: RuntimeError, with the command that installs it, where the package is missing;
    ValueError for a glob that matches none.
    """

    def __init__(self, settings: EvalConfig, seed: int) -> None:
        self.n_examples, self.seed = settings.probe_examples, seed
        self.files = _chosen(_binary_sets(data_folder()), settings.probe_texts)

    @property
    def names(self) -> tuple[str, ...]:
        """The data sets' names, such as 5_hist_fig_ismale."""
        return tuple(self.files)

    def texts(self, name: str) -> Iterator[LabelledText]:
        """Yield a data set's texts, drawn uniformly from each class.

        Errors: ValueError where it does not have two classes.
        """
        rows = [row for row in read_csv_rows(self.files[name]) if row["prompt"].strip()]
        classes = sorted({row["target"] for row in rows})
        if len(classes) != 2:
            raise ValueError(
                f"a labelled data set must have two classes; {name!r} of sae-probes has "
                f"{len(classes)}. Install the package again."
            )
        first = zlib.crc32(name.encode()) << ROWS_BITS
        numbers = numbers_of(first + torch.arange(len(rows)), self.seed).tolist()
        for label, kind in enumerate(classes):
            drawn = sorted(
                (n, r["prompt"]) for n, r in zip(numbers, rows, strict=True) if r["target"] == kind
            )
            for place, (number, text) in enumerate(drawn[: self.n_examples // 2]):
                yield LabelledText(text, bool(label), number, place % HALVES)


def data_folder() -> Path:
    """Return the folder of the package's data.

    Errors: RuntimeError where it is not installed.
    """
    try:
        return package_folder(PACKAGE) / "data"
    except RuntimeError as error:
        raise RuntimeError(
            "probing_texts needs the data sets of the Python package 'sae-probes', which is not "
            "installed here. Run `pip install --no-deps sae-probes zstandard`, or "
            "`python scripts/install.py demo`."
        ) from error


def _binary_sets(folder: Path) -> dict[str, Path]:
    rows = read_csv_rows(folder / LIST)
    saved = [row["Dataset save name"] for row in rows if row["Data type"] == BINARY]
    return {Path(name).stem: folder / f"{name}.zst" for name in saved}


def _chosen(files: dict[str, Path], globs: str) -> dict[str, Path]:
    patterns = [part.strip() for part in globs.split(",") if part.strip()]
    for glob in patterns:
        if not any(fnmatchcase(name, glob) for name in files):
            raise ValueError(
                f"`eval.probe_texts` must match data sets of sae-probes; got {glob!r}, which "
                f"matches none. Among them: {', '.join([*files][:6])}, … ({len(files)} in all)."
            )
    return {
        name: path
        for name, path in files.items()
        if any(fnmatchcase(name, glob) for glob in patterns)
    }
