"""The outcome of an evaluation: a record, two files, a table.

`results.schema.json` beside this file says the same as a JSON schema.

`results.json`:
    schema       "sae.evals/1"
    metrics      {name: number or null}, flat; `name/low` and `name/high` bound a 95% interval
    undefined    {name: why it is null}
    evals        {eval: {n_tokens, n_documents, seconds, metrics: [name, …]}}; n_tokens are those
                 that count in it, so those of `downstream` are positions with a target
    provenance   coder's metadata, d_in, d_sae, measured l0, model, hookpoint, seed, versions, …
    explanations {eval: [[latent, words, who gave them], …]}, of evals that have any
    nulls        {null: {metrics, undefined, l0, d_sae, how, keeps, destroys, model, left_out,
                 seconds}}: the same metrics of the nulls beside it, on the same tokens;
                 left_out {eval: why}; seconds null in files written before they were counted
    arrays       name of the file beside it with what is no single number, or null
`results.safetensors`: every eval's arrays as `eval/name`, such as `sparsity/firing_counts`; and of
each metric with an interval over documents `draws/name`, its resamples, and `drawn_from/name`, the
blocks of documents they are from, with which `pairing` compares dictionaries.
NaN and infinity are in neither.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from sae.config import EvalName
from sae.evals.bootstrap import Estimate
from sae.evals.interface import Explanation, Label, Undefined, Unit, Value
from sae.evals.registry import EVALS
from sae.evals.scale import scale_of
from sae.files import read_json, write_json, write_tensors

SCHEMA = "sae.evals/1"
NO_VALUE = "–"
OF_METRICS = ("draws", "drawn_from")
"""Groups of arrays that are named after metrics."""


@dataclass(frozen=True)
class EvalRecord:
    """How one eval was run, and which of the flat metrics are its own."""

    n_tokens: int
    n_documents: int
    seconds: float
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class NullResult:
    """What was found of a null: flat metrics as those of the dictionary, and what the null is.

    how, keeps, destroys: as its row in `null_rows` says. model: the model it was read from.
    left_out: evals that were not run on it, and why. seconds: that it took in all; None: unknown.
    """

    metrics: Mapping[str, float | None]
    undefined: Mapping[str, str]
    l0: float
    d_sae: int
    how: str
    keeps: str
    destroys: str
    model: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class EvalResults:
    """What an evaluation found; fields as in the module's description of `results.json`."""

    metrics: Mapping[str, float | None]
    undefined: Mapping[str, str]
    evals: Mapping[EvalName, EvalRecord]
    provenance: Mapping[str, Any]
    arrays: Mapping[str, Tensor]
    explanations: Mapping[EvalName, list[Explanation]] = field(default_factory=dict)
    nulls: Mapping[str, NullResult] = field(default_factory=dict)


def collect(
    records: Mapping[EvalName, EvalRecord],
    metrics: Mapping[EvalName, Mapping[str, Value]],
    arrays: Mapping[EvalName, Mapping[str, Tensor]],
    provenance: Mapping[str, Any],
    explanations: Mapping[EvalName, list[Explanation]] | None = None,
) -> EvalResults:
    """Join the evals' answers into one flat record.

    Errors: RuntimeError where two evals use one name for a metric.
    """
    flat: dict[str, float | None] = {}
    undefined: dict[str, str] = {}
    draws: dict[str, Tensor] = {}
    for eval_name, values in metrics.items():
        for name, value in values.items():
            if name in flat:
                raise RuntimeError(f"metric names must be unique; {eval_name} repeats {name!r}.")
            number, reason = _number_or_reason(value)
            flat[name] = number
            if reason is not None:
                undefined[name] = reason
            elif isinstance(value, Estimate):
                draws |= {f"draws/{name}": value.draws, f"drawn_from/{name}": value.is_present}
    named = draws | {
        f"{e}/{name}": array for e, group in arrays.items() for name, array in group.items()
    }
    words = dict(explanations or {})
    return EvalResults(flat, undefined, records, provenance, named, words)


def joined_results(before: EvalResults, after: EvalResults) -> EvalResults:
    """Return the evals of both, in the registry's order; the provenance is that of `after`.

    Errors: RuntimeError where both have a metric of one name.
    """
    if twice := before.metrics.keys() & after.metrics.keys():
        raise RuntimeError(f"metric names must be unique; two evals have {sorted(twice)[0]!r}.")
    records = dict(before.evals) | dict(after.evals)
    place = {name: i for i, name in enumerate(EVALS)}
    order = sorted(records, key=lambda name: place.get(name, len(place)))
    metrics = {**before.metrics, **after.metrics}
    return EvalResults(
        {name: metrics[name] for eval_name in order for name in records[eval_name].metrics},
        {**before.undefined, **after.undefined},
        {name: records[name] for name in order},
        after.provenance,
        {**before.arrays, **after.arrays},
        {**before.explanations, **after.explanations},
        {**before.nulls, **after.nulls},
    )


def without_evals(results: EvalResults, names: Iterable[EvalName]) -> EvalResults:
    """Return the results less those of some evals."""
    gone: set[EvalName] = {name for name in names if name in results.evals}
    metrics = {metric for name in gone for metric in results.evals[name].metrics}

    def is_kept(array: str) -> bool:
        group, name = array.split("/", 1)
        return (name not in metrics) if group in OF_METRICS else group not in gone

    return EvalResults(
        {name: value for name, value in results.metrics.items() if name not in metrics},
        {name: why for name, why in results.undefined.items() if name not in metrics},
        {name: record for name, record in results.evals.items() if name not in gone},
        results.provenance,
        {name: array for name, array in results.arrays.items() if is_kept(name)},
        {name: said for name, said in results.explanations.items() if name not in gone},
        {} if gone else results.nulls,
    )


def _number_or_reason(value: Value) -> tuple[float | None, str | None]:
    if isinstance(value, Undefined):
        return None, value.reason
    if not math.isfinite(value):
        return None, f"the eval gave {value}"
    return float(value), None


def write_results(results: EvalResults, path: str | Path) -> None:
    """Write `path` (.json) and, where there are arrays, the .safetensors beside it, atomically.

    The arrays come first, so that a results file never names arrays that are not there.
    """
    path = Path(path)
    beside = path.with_suffix(".safetensors")
    if results.arrays:
        write_tensors(beside, dict(results.arrays))
    write_json(
        path,
        {
            "schema": SCHEMA,
            "metrics": dict(results.metrics),
            "undefined": dict(results.undefined),
            "evals": {name: asdict(record) for name, record in results.evals.items()},
            "provenance": dict(results.provenance),
            "explanations": {name: list(found) for name, found in results.explanations.items()},
            "nulls": {name: asdict(null) for name, null in results.nulls.items()},
            "arrays": beside.name if results.arrays else None,
        },
    )


def read_results(path: str | Path) -> EvalResults:
    """Read what `write_results` wrote.

    Errors: ValueError where the file is no results file.
    """
    path = Path(path)
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        raise ValueError(
            f"`{path}` must be results in the schema {SCHEMA!r}; it says "
            f"{content.get('schema')!r}. Run `sae eval` again."
        )
    records = {
        name: EvalRecord(**{**record, "metrics": tuple(record["metrics"])})
        for name, record in content["evals"].items()
    }
    arrays = load_file(path.with_name(content["arrays"])) if content["arrays"] else {}
    words = {
        name: [Explanation(*row) for row in rows]
        for name, rows in content.get("explanations", {}).items()
    }
    nulls = {name: NullResult(**null) for name, null in content.get("nulls", {}).items()}
    return EvalResults(
        *(content["metrics"], content["undefined"], records, content["provenance"], arrays),
        explanations=words,
        nulls=nulls,
    )


class TableRow(NamedTuple):
    """A line of the printed table, ready to show.

    `interval` is empty where there is none; where there is no value it says why. `share`: how far
    the score is from its shuffled codes' to the truth's or the best (`scale`); empty where that
    says nothing. `nulls`: the scores of `EvalResults.nulls`, in their order.
    """

    group: str
    label: str
    value: str
    interval: str
    metric: str
    share: str = ""
    nulls: tuple[str, ...] = ()


def table_rows(results: EvalResults) -> list[TableRow]:
    """Return the table's lines by eval, each in its eval's order and in units for people."""
    return [
        _row(results, name, metric, label)
        for name, record in results.evals.items()
        for metric, label in _labels(name, record).items()
        if metric in results.metrics
    ]


def _labels(name: EvalName, record: EvalRecord) -> dict[str, Label]:
    """Return labels of an eval's metrics; one that has none is shown under its own name."""
    known = dict(EVALS[name].labels) if name in EVALS else {}
    others = (metric for metric in record.metrics if "/" not in metric)
    return known | {metric: Label(metric) for metric in others if metric not in known}


def _row(results: EvalResults, group: str, metric: str, label: Label) -> TableRow:
    value = results.metrics[metric]
    nulls = tuple(
        shown(null.metrics.get(metric), label.unit, digits=3).removesuffix(" nats")
        for null in results.nulls.values()
    )
    if value is None:
        why = results.undefined.get(metric, "")
        return TableRow(group, label.text, NO_VALUE, why, metric, "", nulls)
    low, high = (results.metrics.get(f"{metric}/{end}") for end in ("low", "high"))
    interval = ""
    if low is not None and high is not None:
        interval = f"{shown(low, label.unit)} … {shown(high, label.unit)}".replace(" nats", "")
    scale = scale_of(metric, label, results)
    share = "" if scale is None else f"{scale.share(value):.2f}".replace("-0.00", "0.00")
    return TableRow(group, label.text, shown(value, label.unit), interval, metric, share, nulls)


def shown(value: float | None, unit: Unit, digits: int = 4) -> str:
    """Return a number with its unit, for people."""
    if value is None:
        return NO_VALUE
    if unit == "share":
        return f"{100 * value:.3g}%"
    if unit == "nats":
        return f"{value:.{digits}f} nats"
    if unit == "latents":
        return f"{value:,.0f}"
    is_plain = value == 0 or 1e-3 <= abs(value) < 1e5
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if is_plain else f"{value:.3g}"


def plain_json(value: object) -> Any:
    """Return a copy of `value` that JSON can hold; what it can't is written as text."""
    text = json.dumps(value, default=_as_text)
    return json.loads(text, parse_constant=str)


def _as_text(value: object) -> object:
    return value.tolist() if isinstance(value, torch.Tensor) else str(value)
