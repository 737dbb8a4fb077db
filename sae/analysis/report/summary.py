"""What the report says beside its latents, read from a run folder: facts, curves, eval results.

Reads `config.yaml`, `env.json`, `metrics.jsonl` and `results.json`; each may be missing, and then
its part of the page is. A few figures stand on top; everything measured is in the tables.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sae.analysis.report.latent_scores import LatentScores, latent_scores
from sae.analysis.report.scales import Scales, scales_of
from sae.evals.registry import EVALS
from sae.evals.results import EvalResults, TableRow, read_results, table_rows

MAX_CURVE_POINTS = 400
X_AXES = ("tokens", "step")
# Curves with a place of their own: key, label, how numbers are written.
CURVES = (
    ("fvu", "FVU", "number"),
    ("l0", "L0", "number"),
    ("dead_share", "Dead latents", "share"),
    ("lr", "Learning rate", "number"),
)


LOG_SCALE = ("fvu", "loss")
# Measurements on top of the page: metric, label, unit, and a note where an interval says less.
HEADLINE = (
    ("fvu", "FVU", "number", ""),
    ("l0", "L0", "number", "latents per token"),
    ("dead", "Silent latents", "share", "on the evaluated tokens"),
    ("delta_ce", "ΔCE, nats", "nats", ""),
    ("loss_recovered_zero", "Loss recovered", "share", "against zero ablation"),
    ("loss_recovered_mean", "Loss recovered", "share", "against mean ablation"),
)
LOSSES = (
    ("ce_clean", "Model as it is"),
    ("ce_spliced", "Dictionary spliced in"),
    ("ce_ablated_mean", "Mean ablation"),
    ("ce_ablated_zero", "Zero ablation"),
)


@dataclass(frozen=True)
class Summary:
    """The run folder's part of the page; `curves` goes to the page's scripts as it is."""

    title: str
    hookpoint: str
    facts: list[str]
    headline: list[dict[str, str]]
    losses: list[dict[str, Any]]
    tables: list[dict[str, Any]]
    curves: dict[str, Any]
    details: list[tuple[str, str]]
    scores: LatentScores
    scales: Scales


def read_summary(run_folder: Path, d_sae: int) -> Summary:
    """Read what the run folder holds."""
    config = _read_config(run_folder / "config.yaml")
    rows = _read_rows(run_folder / "metrics.jsonl")
    results = _read_results(run_folder / "results.json")
    model = config.get("model", {})
    return Summary(
        title=str(model.get("name") or run_folder.name).removeprefix("package:"),
        hookpoint=str(model.get("hookpoint") or ""),
        facts=_facts(config, rows, d_sae),
        headline=_headline(results, rows),
        losses=_losses(results),
        tables=_tables(results),
        curves=_curves(rows),
        details=[(name, _text(run_folder / name)) for name in ("config.yaml", "env.json")],
        scores=latent_scores(results, d_sae),
        scales=scales_of(results),
    )


def _read_config(path: Path) -> dict[str, Any]:
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; a last line that a kill cut off is left out."""
    rows = []
    for line in _text(path).splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _read_results(path: Path) -> EvalResults | None:
    return read_results(path) if path.exists() else None


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def _facts(config: Mapping[str, Any], rows: Sequence[Mapping], d_sae: int) -> list[str]:
    coder, data = config.get("coder", {}), config.get("data", {})
    activation = str(coder.get("activation") or "")
    facts = [f"{d_sae:,} latents"]
    if activation:
        facts.append(f"{activation}, k {coder.get('k')}" if "topk" in activation else activation)
    tokens = rows[-1].get("tokens") if rows else config.get("train", {}).get("tokens")
    if tokens:
        facts.append(f"{tokens:,} training tokens")
    if source := data.get("source"):
        facts.append(f"text from {str(source).removeprefix('package:')}")
    return facts


def _headline(results: EvalResults | None, rows: Sequence[Mapping]) -> list[dict[str, str]]:
    """Return the figures that stand on top: measured ones, or else the last training row's."""
    if results is None:
        last = rows[-1] if rows else {}
        shown = [row for row in CURVES if row[0] != "lr" and _is_number(last.get(row[0]))]
        return [_tile(label, last[key], unit, "end of training") for key, label, unit in shown]
    metrics = results.metrics
    given = [(label, metrics.get(key), unit, key, note) for key, label, unit, note in HEADLINE]
    return [
        _tile(label, value, unit, note or _interval(metrics, key, unit))
        for label, value, unit, key, note in given
        if value is not None
    ]


def _tile(label: str, value: float, unit: str, note: str) -> dict[str, str]:
    return {"label": label, "value": format_value(value, unit), "note": note}


def _interval(metrics: Mapping[str, float | None], key: str, unit: str) -> str:
    low, high = metrics.get(f"{key}/low"), metrics.get(f"{key}/high")
    if low is None or high is None:
        return ""
    return f"95%: {format_value(low, unit)} to {format_value(high, unit)}"


def _losses(results: EvalResults | None) -> list[dict[str, Any]]:
    """Return the language model's losses as bars, widths in percent of the largest."""
    found = [(label, results.metrics.get(key)) for key, label in LOSSES] if results else []
    present = [(label, value) for label, value in found if value is not None]
    largest = max((value for _, value in present), default=1.0)
    return [
        {"label": label, "value": f"{value:.3f}", "width": round(100 * value / largest, 2)}
        for label, value in present
    ]


def _tables(results: EvalResults | None) -> list[dict[str, Any]]:
    """Return a table an eval: all its metrics, what they were made from, what they miss."""
    groups: dict[str, list[TableRow]] = {}
    for row in table_rows(results) if results else []:
        groups.setdefault(row.group, []).append(row)
    return [
        {
            "name": name,
            "rows": rows,
            "made_from": _made_from(results, name),
            "misses": _misses(name),
            "asks": _asks(name),
        }
        for name, rows in groups.items()
    ]


def _made_from(results: EvalResults | None, name: str) -> str:
    """Return on how much an eval was run, and its time."""
    records = {} if results is None else {str(key): one for key, one in results.evals.items()}
    if name not in records:
        return ""
    record = records[name]
    amount = f"{record.n_tokens:,} tokens of {record.n_documents:,} documents, "
    return (amount if record.n_tokens else "") + f"{record.seconds:.1f} s"


def _misses(name: str) -> str:
    """Return the defects that an eval cannot see, in words."""
    rows = {str(key): row for key, row in EVALS.items()}
    return ", ".join(rows[name].cannot_see) if name in rows else ""


def _asks(name: str) -> str:
    """Return the first line of what an eval's module says of itself."""
    rows = {str(key): row for key, row in EVALS.items()}
    module = inspect.getmodule(rows[name].make) if name in rows else None
    return (module.__doc__ or "").partition("\n")[0] if module else ""


def format_value(value: float, kind: str = "number") -> str:
    """Write a number for a person: four significant digits, shares as percent."""
    if kind == "share":
        return f"{100 * value:.1f} %" if abs(value) >= 0.0005 or value == 0 else "< 0.1 %"
    if kind == "nats":
        return f"{value:+.3f}"
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return {axis, x, series}; series without a place of their own come last."""
    axis = next((name for name in X_AXES if rows and name in rows[0]), None)
    if axis is None:
        return {"axis": "", "x": [], "series": []}
    stride = math.ceil(len(rows) / MAX_CURVE_POINTS)
    kept = [*rows[:-1:stride], rows[-1]]
    known = [key for key, _, _ in CURVES]
    others = [key for key in rows[-1] if key not in (*known, *X_AXES)]
    placed = [*CURVES, *((key, key.replace("_", " ").capitalize(), "number") for key in others)]
    series = []
    for key, label, kind in placed:
        y = [row[key] if _is_number(row.get(key)) else None for row in kept]
        if any(value is not None for value in y):
            one = {"label": label, "kind": kind, "y": y, "is_main": key in known}
            series.append({**one, "is_log": key in LOG_SCALE})
    return {"axis": axis, "x": [row[axis] for row in kept], "series": series}
