"""With what results were made: versions and the time."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import sae

PACKAGES = ("torch", "transformers", "numpy")


def versions() -> dict[str, object]:
    """Return the project's version, those of `PACKAGES`, Python's, and the time (UTC, ISO 8601)."""
    return {
        "sae": sae.__version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
