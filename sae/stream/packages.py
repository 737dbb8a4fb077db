"""Models and text that live inside installed Python packages, named `package:NAME`.

The package is found but never imported: only its files are read. NAME is the name that pip knows
or the import name; `-` and `_` are alike. What is done with the files is said in `language_model`
and `documents`.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

PREFIX = "package:"


def is_package_source(name: str) -> bool:
    """Whether a model's or text's name has the form `package:NAME`."""
    return name.startswith(PREFIX)


def package_folder(source: str) -> Path:
    """Return the folder of the installed package that `package:NAME` names.

    Raises ValueError for a malformed NAME and RuntimeError where the package is not installed.
    """
    name = source.removeprefix(PREFIX)
    module_name = name.replace("-", "_")
    if not module_name.isidentifier():
        raise ValueError(
            f"A packaged source must read `package:NAME`; got {source!r}. "
            "Give the package's name as pip knows it, without dots or version."
        )
    spec = find_spec(module_name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            f"{source!r} needs the Python package {name!r}, which is not installed here. "
            f"Run `pip install --no-deps {name}`."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def package_files(source: str, globs: str | None, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the package's files whose name matches one of the comma-separated globs, sorted.

    Only names that end in one of `suffixes` count; `globs` None matches them all. Raises
    ValueError, listing what is there, where a glob matches nothing.
    """
    folder = package_folder(source)
    files = sorted(path for path in folder.rglob("*") if path.name.lower().endswith(suffixes))
    if globs is None:
        return files
    patterns = [part.strip() for part in globs.split(",") if part.strip()]
    for pattern in patterns:
        if not any(fnmatchcase(path.name, pattern) for path in files):
            raise ValueError(_no_match(source, pattern, files))
    return [path for path in files if any(fnmatchcase(path.name, glob) for glob in patterns)]


def _no_match(source: str, pattern: str, files: list[Path], shown: int = 12) -> str:
    names = ", ".join(path.name for path in files[:shown]) or "none"
    more = f" and {len(files) - shown} more" if len(files) > shown else ""
    return (
        f"`data.subset` must match files of {source!r}; got {pattern!r}, which matches none. "
        f"Its text files: {names}{more}."
    )
