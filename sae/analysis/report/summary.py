"""What the report says beside its latents, read from a run folder: facts, curves, eval results.

Reads `config.yaml`, `env.json`, `metrics.jsonl` and `results.json`; each may be missing, and then
its part of the page is. Known metrics get a label and a place; others are shown under their names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sae.files import read_json

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


def _read_results(path: Path) -> dict[str, float | list[float]]:
    """Return results.json flat: dotted names to numbers, or to pairs (intervals)."""
    return dict(_flat(read_json(path), ())) if path.exists() else {}


def _flat(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, float | list[float]]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, (*path, str(key)))
    elif _is_number(value) or (
        isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
    ):
        yield ".".join(path), value


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def _find(results: Mapping[str, Any], *names: str) -> float | None:
    """Return the first result whose last name, after dots and slashes, is one of `names`."""
    for name in names:
        for key, value in results.items():
            if key.replace("/", ".").split(".")[-1] == name and _is_number(value):
                return value
    return None


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


def _headline(results: Mapping[str, Any], rows: Sequence[Mapping]) -> list[dict[str, str]]:
    last = rows[-1] if rows else {}
    evaluated = bool(results)
    clean, spliced = _find(results, "ce_clean"), _find(results, "ce_spliced")
    delta = _find(results, "delta_ce", "ce_delta", "ce_increase")
    if delta is None and clean is not None and spliced is not None:
        delta = spliced - clean
    where = "held-out tokens" if evaluated else "last training row"
    candidates = [
        ("FVU", _find(results, "fvu") if evaluated else last.get("fvu"), "number", where),
        ("L0", _find(results, "l0", "l0_mean") if evaluated else last.get("l0"), "number", where),
        ("Dead latents", _find(results, *DEAD), "share", where),
        ("ΔCE", delta, "nats", "nats per token, spliced"),
        ("Loss recovered", _find(results, *ZERO), "share", "of zero ablation"),
        ("Loss recovered", _find(results, *MEAN), "share", "of mean ablation"),
    ]
    if _find(results, *DEAD) is None:
        candidates[2] = ("Dead latents", last.get("dead_share"), "share", "end of training")
    return [
        {"label": label, "value": format_value(value, kind), "note": note}
        for label, value, kind, note in candidates
        if value is not None
    ]


DEAD = ("dead_share", "dead_fraction", "dead")
ZERO = ("loss_recovered_zero", "loss_recovered")
MEAN = ("loss_recovered_mean",)
LOSSES = (
    ("Model as it is", ("ce_clean",)),
    ("Dictionary spliced in", ("ce_spliced",)),
    ("Mean ablation", ("ce_ablated_mean", "ce_mean_ablated", "ce_mean")),
    ("Zero ablation", ("ce_ablated_zero", "ce_zero_ablated", "ce_zero", "ce_ablated")),
)


def _losses(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the language model's losses as bars, widths in percent of the largest."""
    found = [(label, _find(results, *names)) for label, names in LOSSES]
    present = [(label, value) for label, value in found if value is not None]
    largest = max((value for _, value in present), default=1.0)
    return [
        {"label": label, "value": f"{value:.3f}", "width": round(100 * value / largest, 2)}
        for label, value in present
    ]


def _tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all results, grouped by all but the last of their names."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in results.items():
        *path, name = key.replace("/", ".").split(".")
        shown = (
            f"{format_value(value[0])} – {format_value(value[1])}"
            if isinstance(value, list)
            else format_value(value)
        )
        groups.setdefault(" · ".join(path), []).append((name, shown))
    return [{"name": name.replace("_", " "), "rows": rows} for name, rows in groups.items()]


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
    placed = [*CURVES, *((key, key.replace("_", " "), "number") for key in others)]
    series = []
    for key, label, kind in placed:
        y = [row[key] if _is_number(row.get(key)) else None for row in kept]
        if any(value is not None for value in y):
            one = {"label": label, "kind": kind, "y": y, "is_main": key in known}
            series.append({**one, "is_log": key in LOG_SCALE})
    return {"axis": axis, "x": [row[axis] for row in kept], "series": series}
