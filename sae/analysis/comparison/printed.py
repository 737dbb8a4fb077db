"""The comparison in a terminal: a block a figure, a line a dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae.analysis.comparison.page import heading, table_figures, where

if TYPE_CHECKING:
    from sae.analysis.comparison import Comparison

LONGEST_NAME = 24  # in characters; longer ones are folded where the terminal is narrow


def print_comparison(found: Comparison) -> None:
    """Print the headline of every dictionary."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    first, names = found.entries[0].name, [entry.name for entry in found.entries]
    table = Table(box=box.SIMPLE, title=where(found), title_justify="left")
    # Names give way last: a line without one says nothing.
    table.add_column("", overflow="fold", min_width=min(max(map(len, names)), LONGEST_NAME))
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95% interval", no_wrap=True)
    if found.is_paired:
        table.add_column(f"less that of {first}")
    table.add_row("[bold]L0[/bold]")
    for entry in found.entries:
        table.add_row(entry.name, f"{entry.results.provenance['l0']:.4g}")
    for figure, cells in table_figures(found):
        table.add_section()
        table.add_row(f"[bold]{heading(figure.text, figure.unit)}[/bold]")
        for name, cell in zip(names, cells, strict=True):
            difference = f"[bold]{cell.difference}[/bold]" if cell.is_clear else cell.difference
            texts = (name, cell.value, cell.interval, difference)
            table.add_row(*texts[: len(table.columns)])
    Console().print(table)
