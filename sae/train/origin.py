"""What a dictionary remembers of where its activations come from: model, text, places by name.

Made anew where a run goes on, as a source may have learnt more by then.
"""

from __future__ import annotations

from sae.coder.sites import Sites
from sae.config import SiteName
from sae.stream.reader import OTHER
from sae.stream.source import ActivationSource


def origin(source: ActivationSource, sites: Sites, site: SiteName) -> dict[str, object]:
    """Return the metadata of a coder at `site` that is trained on `source`."""
    return {**source.metadata(), **place_names(source, sites, site)}


def place_names(source: ActivationSource, sites: Sites, site: SiteName) -> dict[str, object]:
    """Return what a dictionary of other places than one remembers of them, if they have names."""
    names = getattr(source, "names", None)
    if site == "sae" or names is None:
        return {}
    n_read = len(sites.reads)
    read = [name for name in names[:n_read] if not name.startswith(OTHER)]
    written = {"hook_name_out": ",".join(names[n_read:])} if sites.writes else {}
    return {"hook_name": ",".join(read), **written}
