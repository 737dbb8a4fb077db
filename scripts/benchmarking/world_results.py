"""A comparison on a world as JSON that can be continued, and as a page with a table."""

import statistics
from pathlib import Path
from typing import Any

from sae.files import read_json, write_json, write_text

from . import metric_order

COLUMNS = {
    "f1": "F1",
    "mcc": "MCC",
    "uniqueness": "uniqueness",
    "explained_variance": "EV",
    "ev_minus_oracle": "EV − oracle",
    "l0": "L0",
    "dead": "dead",
    "seconds": "training s",
    "data_seconds": "data s",
    "samples_per_second": "samples/s",
}
PRECISION = {"l0": 2, "seconds": 1, "data_seconds": 1, "samples_per_second": 0}
IDENTITY = ("world", "samples", "base")


def open_document(path: Path, blank: dict[str, Any]) -> dict[str, Any]:
    """Return what `path` holds, to go on with; `blank` where there is no such file.

    Errors: ValueError where it is of another world, length or base.
    """
    if not path.exists():
        return blank
    held = read_json(path)
    for key in IDENTITY:
        if held.get(key) != blank[key]:
            raise ValueError(
                f"`{path}` must be of the same {key} to go on with it; it has {held.get(key)!r}, "
                f"asked for is {blank[key]!r}. Give another --out."
            )
    return held


def merged(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first document with the rows of all.

    Errors: ValueError where they are not of one world, length and base.
    """
    first = documents[0]
    for other in documents[1:]:
        for key in IDENTITY:
            if other[key] != first[key]:
                raise ValueError(
                    f"results to merge must be of the same {key}; got {first[key]!r} and "
                    f"{other[key]!r}. Merge those of one command."
                )
    rows = {(row["recipe"], row["seed"]): row for d in documents for row in d["rows"]}
    return {**first, "rows": list(rows.values())}


def is_done(document: dict[str, Any], recipe: str, seed: int) -> bool:
    """Say whether the run is in the document, with its numbers."""
    return any(
        (row["recipe"], row["seed"]) == (recipe, seed) and "metrics" in row
        for row in document["rows"]
    )


def add(document: dict[str, Any], row: dict[str, Any]) -> None:
    """Put a run's row in, in place of one of the same recipe and seed."""
    same = (row["recipe"], row["seed"])
    others = [r for r in document["rows"] if (r["recipe"], r["seed"]) != same]
    document["rows"] = [*others, row]


def save(path: Path, document: dict[str, Any]) -> None:
    """Write the JSON and its page."""
    write_json(path, document)
    write_text(path.with_suffix(".md"), page(document))


def one_line(row: dict[str, Any]) -> str:
    """Return a run for a terminal."""
    head = f"{row['recipe']}, seed {row['seed']}: "
    if "metrics" not in row:
        return head + row["reason"]
    values = (f"{name} {_number(key, _value(row, key))}" for key, name in COLUMNS.items())
    return head + "  ".join(values)


def page(document: dict[str, Any]) -> str:
    """Return how it was made, and a table with a line for each recipe."""
    machine, world = document["machine"], document["world"]
    base = ", ".join(f"{key} {value}" for key, value in document["base"].items())
    packages = ", ".join(f"{name} {found}" for name, found in machine["packages"].items())
    recipes = list(dict.fromkeys(row["recipe"] for row in document["rows"]))
    by_recipe = {
        name: [row for row in document["rows"] if row["recipe"] == name] for name in recipes
    }
    lines = [
        f"# Features found on {world['name']}, {machine['device']}, {document['date']}",
        "",
        f"```\n{document['command']}\n```",
        "",
        f"- {document['samples']:,} samples a run; {base}",
        f"- evaluated on {document['rows_evaluated']:,} fresh samples, after saving and loading",
        f"- commit {machine['commit']}; python {machine['python']}, {packages}; "
        f"{machine['cpu_threads']} CPU threads",
        f"- mean ± standard deviation over seeds; time is that of training, {_making(machine)} the "
        "making of samples",
        "",
        *_table(by_recipe),
        *metric_order.section({name: _measured(rows) for name, rows in by_recipe.items()}),
    ]
    missing = {n: rows[-1]["reason"] for n, rows in by_recipe.items() if not _measured(rows)}
    if missing:
        lines += ["", "Not run:", "", *(f"- {name}: {why}" for name, why in missing.items())]
    return "\n".join(lines) + "\n"


def _making(machine: dict[str, Any]) -> str:
    """Return whether the time is with the making of samples: on a GPU it overlaps with steps."""
    return "without" if machine["device_type"] == "cpu" else "with"


def _table(by_recipe: dict[str, list[dict[str, Any]]]) -> list[str]:
    rule = ["---", *["---:"] * (len(COLUMNS) + 1)]
    cells = [["recipe", "seeds", *COLUMNS.values()], rule]
    for name, rows in by_recipe.items():
        if done := _measured(rows):
            values = [_spread(key, [_value(row, key) for row in done]) for key in COLUMNS]
            cells.append([name, str(len(done)), *values])
    return [f"| {' | '.join(line)} |" for line in cells]


def _measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "metrics" in row]


def _value(row: dict[str, Any], key: str) -> float | None:
    return row[key] if key in row else row["metrics"].get(key)


def _spread(key: str, values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = _number(key, statistics.fmean(known))
    return mean if len(known) < 2 else f"{mean} ± {_number(key, statistics.stdev(known))}"


def _number(key: str, value: float | None) -> str:
    return "–" if value is None else f"{value:,.{PRECISION.get(key, 3)}f}"
