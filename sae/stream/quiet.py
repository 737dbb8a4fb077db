"""Keeping `transformers` silent while something loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers(*, show_progress: bool = False) -> Iterator[None]:
    """Hide the notices and progress bars of `transformers`; its settings are restored after.

    `show_progress` keeps the bars, for downloads that may be long.
    """
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not show_progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
