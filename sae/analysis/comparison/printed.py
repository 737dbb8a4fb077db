"""The comparison in a terminal: a block a figure, a line a dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae.analysis.comparison.page import table_figures, where

if TYPE_CHECKING:
    from sae.analysis.comparison import Comparison


def print_comparison(found: Comparison) -> None:
    """Print the headline of every dictionary."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    first, names = found.entries[0].name, [entry.name for entry in found.entries]
    table = Table(box=box.SIMPLE, title=where(found), title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95% interval", no_wrap=True)
    if found.is_paired:
        table.add_column(f"less that of {first}", no_wrap=True)
    table.add_row("[bold]L0[/bold]")
    for entry in found.entries:
        table.add_row(entry.name, f"{entry.results.provenance['l0']:.4g}")
    for figure, cells in table_figures(found):
        table.add_section()
        table.add_row(f"[bold]{figure.text}[/bold]")
        for name, cell in zip(names, cells, strict=True):
            difference = f"[bold]{cell.difference}[/bold]" if cell.is_clear else cell.difference
            texts = (name, cell.value, cell.interval, difference)
            table.add_row(*texts[: len(table.columns)])
    Console().print(table)
