"""How a step's cost grows with d_sae, k and n, each varied alone around a base shape."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sae.files import write_json, write_text

from .floors import Ceilings, floor_ms
from .shapes import Shape
from .step_clocks import StepClock, load
from .step_floors import Precision, step_work
from .step_ours import ours
from .step_peers import bare_matmul
from .step_results import head_of
from .step_shapes import AXES, grown
from .step_task import draw_task

LABELS = {"d_sae": "d_sae, latents", "k": "k, active latents a token", "n": "n, tokens a step"}


@dataclass
class Growth:
    """What the measurement needs, and the points it has found."""

    clock: StepClock
    device: torch.device
    ceilings: Ceilings
    deadline: float  # of time.monotonic()
    report: Callable[[str], None]
    points: list[dict[str, Any]]


def run_growth(growth: Growth, base: Shape) -> None:
    """Measure our fused step and the bare matmul along each axis; the base once for each."""
    for axis in AXES:
        for shape in grown(base, axis):
            if time.monotonic() > growth.deadline:
                growth.report("out of time: give --minutes more")
                return
            point = {"axis": axis, "size": getattr(shape, axis), **shape._asdict()}
            point |= _measure(growth, shape)
            growth.clock.settle()
            growth.points.append(point)
            growth.report(f"{axis} {point['size']}: {point.get('ours_ms', point.get('reason'))}")


def _measure(growth: Growth, shape: Shape) -> dict[str, Any]:
    precision: Precision = "bf16" if growth.clock.device_type == "cuda" else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        task = draw_task(shape, growth.device, growth.clock.device_type, "uniform")
        trainees = [ours(task, "fused", precision), bare_matmul(task, dtype)]
        for trainee in trainees:
            trainee.step(task.xs[0])
        step, matmul = growth.clock.time(trainees, task.xs)
    except torch.OutOfMemoryError:
        return {"reason": "does not fit"}
    return {
        "ours_ms": median(step),
        "matmul_ms": median(matmul),
        "floor_ms": floor_ms(step_work(shape, precision), growth.ceilings),
        "n_samples": len(step),
        "load": load(),
    }


def save_growth(path: Path, document: dict[str, Any]) -> None:
    """Write the JSON, its page, and the plot where matplotlib is installed."""
    write_json(path, document)
    plot = path.with_suffix(".png")
    if not draw(document, plot):
        document["notes"].append("No plot: matplotlib is not installed (pip install 'sae[bench]').")
        write_json(path, document)
    write_text(path.with_suffix(".md"), growth_page(document, plot))


def growth_page(document: dict[str, Any], plot: Path) -> str:
    """Return the document as a page: how it was made, the plot, the points."""
    where = f"{document['machine']['device']}, {document['date']}"
    lines = [
        f"# How a training step's cost grows on {where}",
        "",
        *head_of(document),
        "",
    ]
    if plot.exists():
        lines += [f"![Step time against d_sae, k and n]({plot.name})", ""]
    header = ("varied", "n", "d", "d_sae", "k", "ours ms", "matmul ms", "floor ms", "× matmul")
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *map(_cells, document["points"])]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _cells(point: dict[str, Any]) -> list[str]:
    sizes = [point["axis"], *(str(point[name]) for name in ("n", "d", "d_sae", "k"))]
    if "ours_ms" not in point:
        return [*sizes, point["reason"], "", "", ""]
    times = [f"{point[name]:.4g}" for name in ("ours_ms", "matmul_ms", "floor_ms")]
    return [*sizes, *times, f"{point['ours_ms'] / point['matmul_ms']:.2f}"]


def draw(document: dict[str, Any], path: Path) -> bool:
    """Draw three panels, axes logarithmic; return False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore
        from matplotlib.figure import Figure  # pyright: ignore
    except ImportError:
        return False
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, axis in zip(panels, AXES, strict=True):
        _draw_panel(panel, axis, [p for p in document["points"] if p["axis"] == axis])
    panels[0].set_ylabel("milliseconds a step")
    panels[0].legend(frameon=False)
    base = document["base"]
    sizes = ", ".join(f"{name} {base[name]}" for name in ("n", "d", "d_sae", "k"))
    figure.suptitle(f"{document['machine']['device']}; around {sizes}", fontsize=10)
    figure.savefig(path, dpi=130)
    return True


def _draw_panel(panel: Any, axis: str, points: list[dict[str, Any]]) -> None:
    points = [point for point in points if "ours_ms" in point]
    sizes = [point["size"] for point in points]
    styles = (
        ("ours_ms", "our fused step", "o-", "#0b5394"),
        ("matmul_ms", "bare encoder matmul", "s--", "#7f7f7f"),
        ("floor_ms", "floor of the step", ":", "#b45f06"),
    )
    for name, label, style, colour in styles:
        times = [point[name] for point in points]
        panel.plot(sizes, times, style, label=label, color=colour, markersize=4)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(sizes, [f"{size:,}".replace(",", " ") for size in sizes], fontsize=8)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.set_xlabel(LABELS[axis])
    panel.grid(alpha=0.3)
