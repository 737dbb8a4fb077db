"""A comparison of coders on a language model as a page with a table."""

import statistics
from typing import Any

COLUMNS = {
    "l0": ("L0", 2),
    "fvu": ("FVU", 4),
    "delta_ce": ("ΔCE", 3),
    "kl": ("KL", 3),
    "loss_recovered_zero": ("recovered, zero", 3),
    "loss_recovered_mean": ("recovered, mean", 3),
    "dead": ("silent", 4),
    "seconds": ("training s", 0),
}


def page(document: dict[str, Any]) -> str:
    """Return how it was made, and a line a coder: mean ± standard deviation over seeds."""
    found = document["machine"]
    lines = [
        f"# Coders on SmolLM2-135M, {found['device']}, {document['date']}",
        "",
        f"```\n{document['command']}\n```",
        "",
        f"- commit {found['commit']}; python {found['python']}, "
        f"torch {found['packages']['torch']}; {found['cpu_threads']} CPU threads",
        "- each configuration in configs/smollm2 (topk: configs/quickstart.yaml), from the same "
        "shards; measured after saving and loading, on documents that training never saw",
        "- mean ± standard deviation over seeds; silent: latents that fire on no held-out token",
        "",
        *table(document["rows"]),
    ]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as the lines of a Markdown table, the best reconstruction first."""
    by_coder: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_coder.setdefault(row["coder"], []).append(row)
    ordered = sorted(by_coder.items(), key=lambda item: _mean(item[1], "fvu"))
    head = ["coder", "seeds", *(name for name, _ in COLUMNS.values())]
    cells = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, found in ordered:
        values = [_spread(found, key, digits) for key, (_, digits) in COLUMNS.items()]
        cells.append([name, str(len(found)), *values])
    return [f"| {' | '.join(line)} |" for line in cells]


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    """Return what is defined: some metrics are not where there is nothing to recover."""
    found = [row[key] if key in row else row["metrics"][key] for row in rows]
    return [value for value in found if value is not None]


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(_values(rows, key))


def _spread(rows: list[dict[str, Any]], key: str, digits: int) -> str:
    values = _values(rows, key)
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
