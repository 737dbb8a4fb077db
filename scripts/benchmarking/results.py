"""Results as dated JSON and a Markdown table beside it, each written whole or not at all."""

from pathlib import Path
from typing import Any

from sae.files import write_json, write_text

HEADER = (
    "op",
    "part",
    "firing",
    "contender",
    "ms",
    "GB/s or TFLOP/s",
    "floor ms",
    "÷ floor",
    "goal ms",
    "÷ auto",
    "extra MB",
)


def free_path(folder: Path, stem: str) -> Path:
    """Return the JSON path of this stem, numbered where results of the same day are there."""
    path, number = folder / f"{stem}.json", 1
    while path.exists() or path.with_suffix(".md").exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def save(path: Path, document: dict[str, Any]) -> None:
    """Write the JSON and its table."""
    write_json(path, document)
    write_text(path.with_suffix(".md"), as_markdown(document))


def compare_with_ours(rows: list[dict[str, Any]]) -> None:
    """Give every timed row its time over that of our `auto` in the same row."""
    keys = ("shape", "op", "part", "firing")
    ours = {
        tuple(row[key] for key in keys): row["ms"]
        for row in rows
        if row["contender"] == "auto" and "ms" in row
    }
    for row in rows:
        base = ours.get(tuple(row[key] for key in keys))
        if base and "ms" in row:
            row["over_auto"] = row["ms"] / base


def as_markdown(document: dict[str, Any]) -> str:
    """Return the document as a page: how it was made, the ceilings, a table a shape."""
    lines = [
        f"# Kernels on {document['machine']['device']}, {document['date']}",
        "",
        *notes_of(document),
        "",
        "```",
        document["command"],
        "```",
        "",
        *facts(document),
    ]
    for shape in document["shapes"]:
        rows = [row for row in document["rows"] if row["shape"] == shape["name"]]
        if rows:
            lines += ["", shape_heading(shape), "", *table(rows)]
    lines += ["", "Sources of the contenders that are not ours:", ""]
    lines += [f"- {name}: {source}" for name, source in _peers(document["rows"])]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as the lines of a Markdown table."""
    rule = ["---"] * 4 + ["---:"] * (len(HEADER) - 4)
    cells = [HEADER, rule, *([*_cells(row)] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells]


def one_line(row: dict[str, Any]) -> str:
    """Return a row for a terminal."""
    keys = ("shape", "op", "part", "firing", "contender")
    where = " ".join(str(row[key]) for key in keys if row[key])
    return f"{where}: {time_or_reason(row)}" + (
        f"  floor {row['floor_ms']:.3g}  ×{row['over_floor']:.2f}" if "ms" in row else ""
    )


def notes_of(document: dict[str, Any]) -> list[str]:
    notes = list(document["notes"])
    if not document["complete"]:
        notes.insert(0, "The run did not end: what follows is what it had measured.")
    return [f"**{note}**" for note in notes]


def facts(document: dict[str, Any]) -> list[str]:
    machine, ceilings = document["machine"], document["ceilings"]
    packages = ", ".join(f"{name} {found}" for name, found in machine["packages"].items())
    dirty = ", with uncommitted changes" if machine["uncommitted_changes"] else ""
    facts = {
        "commit": f"{machine['commit']}{dirty}",
        "versions": f"python {machine['python']}, {packages}, CUDA {machine['cuda']}",
        "CPU threads": machine["cpu_threads"],
        "GPU before": _gpu(machine["gpu"]),
        "GPU after": _gpu(document["gpu_after"]),
        "measured copy": f"{ceilings['copy_bytes_per_s'] / 1e9:.4g} GB/s, read and written",
        "measured copy in L2": f"{ceilings['l2_bytes_per_s'] / 1e9:.4g} GB/s"
        if ceilings["l2_bytes"]
        else None,
        "measured matmul": f"{ceilings['matmul_flop_per_s'] / 1e12:.4g} TFLOP/s",
        "inputs": document["inputs"],
        "seconds": document["seconds"],
    }
    return [f"- {name}: {fact}" for name, fact in facts.items() if fact is not None]


def _gpu(state: dict[str, str] | None) -> str | None:
    return ", ".join(f"{name} {value}" for name, value in state.items()) if state else None


def shape_heading(shape: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {shape[name]}" for name in ("n", "d", "d_sae", "k"))
    return f"## {shape['name']}: {sizes}"


def _cells(row: dict[str, Any]) -> list[str]:
    rate = number(row.get("gb_per_s"), "{:.4g} GB/s") or number(
        row.get("tflop_per_s"), "{:.4g} TFLOP/s"
    )
    goal = number(row.get("goal_ms"), "{:.3g}")
    memory = row.get("extra_memory_bytes")
    return [
        row["op"],
        row["part"],
        row["firing"] or "",
        row["contender"],
        time_or_reason(row),
        rate,
        number(row.get("floor_ms"), "{:.3g}"),
        number(row.get("over_floor"), "{:.2f}"),
        goal and f"{goal} {'met' if row['goal_met'] else 'missed'}",
        number(row.get("over_auto"), "{:.2f}"),
        number(memory and memory / 1e6, "{:.4g}"),
    ]


def time_or_reason(row: dict[str, Any]) -> str:
    """Return a row's time, or why it has none."""
    if "ms" in row:
        return f"{row['ms']:.4g}"
    reason = row.get("reason")
    return f"{row['status']}: {reason}".replace("|", "/") if reason else row["status"]


def number(value: float | None, form: str) -> str:
    """Return a number in a format; nothing where there is none."""
    return "" if value is None else form.format(value)


def _peers(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    found = {row["contender"]: row["source"] for row in rows}
    return [(name, source) for name, source in found.items() if not source.startswith("ours")]
