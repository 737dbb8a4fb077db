"""Foreign formats, in and out: a row of the table each."""

from sae.interop.formats import FORMATS, load

__all__ = ["FORMATS", "load"]
