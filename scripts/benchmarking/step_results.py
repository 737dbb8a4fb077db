"""A step benchmark's results as JSON and as a page with a table a shape."""

from pathlib import Path
from typing import Any

from sae.files import write_json, write_text

from .results import facts, notes_of, number, shape_heading, time_or_reason

HEADER = (
    "step",
    "ms",
    "quartiles",
    "× matmul",
    "floor ms",
    "floor, % of time",
    "÷ ours",
    "goal",
    "extra MB",
    "loss off by",
)


def save_steps(path: Path, document: dict[str, Any]) -> None:
    """Write the JSON and its page."""
    write_json(path, document)
    write_text(path.with_suffix(".md"), steps_page(document))


def steps_page(document: dict[str, Any]) -> str:
    """Return the document as a page: how it was made, the ceilings, a table a shape, sources."""
    lines = [
        f"# Training steps on {document['machine']['device']}, {document['date']}",
        "",
        *head_of(document),
    ]
    for shape in document["shapes"]:
        rows = [row for row in document["rows"] if row["shape"] == shape["name"]]
        if rows:
            lines += ["", shape_heading(shape), "", *_load(document, shape), *step_table(rows)]
    lines += ["", "What ran in each row:", ""]
    sources = {row["contender"]: _source(row) for row in document["rows"]}
    lines += [f"- {name}: {source}" for name, source in sources.items()]
    return "\n".join(lines) + "\n"


def step_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as the lines of a Markdown table."""
    rule = ["---", *["---:"] * (len(HEADER) - 1)]
    cells = [HEADER, rule, *(_cells(row) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells]


def head_of(document: dict[str, Any]) -> list[str]:
    """Return the notes, the command and the machine as lines."""
    command = ["```", document["command"], "```"]
    notes = notes_of(document)
    return [*notes, *([""] if notes else []), *command, "", *facts(document)]


def _load(document: dict[str, Any], shape: dict[str, Any]) -> list[str]:
    loads = document["loads"].get(shape["name"])
    if not loads:
        return []
    before, after = (", ".join(map(str, loads[when])) for when in ("before", "after"))
    return [f"Load averages before: {before}; after: {after}.", ""]


def _source(row: dict[str, Any]) -> str:
    return (
        f"{row['source']}; {row['n_dead']} latents called dead" if row["n_dead"] else row["source"]
    )


def _cells(row: dict[str, Any]) -> list[str]:
    goal = row.get("goal")
    share, extra = row.get("floor_share"), row.get("extra_memory_bytes")
    off = row.get("loss_deviation")
    return [
        row["contender"],
        time_or_reason(row),
        "–".join(f"{one:.4g}" for one in row.get("ms_quartiles", ())),
        number(row.get("over_unit"), "{:.2f}"),
        number(row.get("floor_ms"), "{:.3g}"),
        number(share and 100 * share, "{:.0f}"),
        number(row.get("over_fused"), "{:.2f}"),
        f"{goal} {'met' if row['goal_met'] else 'missed'}" if goal else "",
        number(extra and extra / 1e6, "{:.4g}"),
        number(off, "{:.0e}"),
    ]
