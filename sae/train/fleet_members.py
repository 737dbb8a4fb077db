"""Which dictionaries a fleet trains: every combination of the values that `fleet` lists.

A member is the configuration with these values in place of its own, and a name made of them, such
as `k16_seed0`, which is its folder in the fleet's. All is checked here, from the configuration
alone: nothing has been opened yet.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae.config import FLEET_SETTINGS, Config, FleetConfig
from sae.configuration import from_flat
from sae.train.folder import EARLY_FILES

# Where a value alone says what it is, its setting is not part of the name.
SPEAK_FOR_THEMSELVES = ("hookpoint", "activation")
# What lies in a fleet's folder beside its members'.
SUMMARY_PAGE, SUMMARY_DATA = "summary.html", "summary.json"
TAKEN = EARLY_FILES | {SUMMARY_PAGE, SUMMARY_DATA, "final"}


@dataclass(frozen=True)
class Member:
    """One dictionary of a fleet: its folder's name, and its configuration, which has no fleet."""

    name: str
    cfg: Config


def members_of(cfg: Config) -> tuple[Member, ...]:
    """Return the members of `cfg.fleet`, the last of FLEET_SETTINGS varying fastest.

    Errors: ValueError, naming the member, for values that cannot work, that are given twice, or
    whose folders would be the same.
    """
    swept = {s: getattr(cfg.fleet, s) for s in FLEET_SETTINGS if getattr(cfg.fleet, s)}
    for setting, values in swept.items():
        _require_different(setting, values)
    chosen = [dict(zip(swept, v, strict=True)) for v in itertools.product(*swept.values())]
    members = tuple(_member(cfg, values) for values in chosen)
    _require_own_folders([member.name for member in members])
    return members


def resolved_members(
    members: tuple[Member, ...], resolve: Callable[[Member], Config]
) -> tuple[Member, ...]:
    """Return the members with what `resolve` makes of their configurations.

    Errors: ValueError, naming the member, for what only a model's width shows to be impossible.
    """
    return tuple(replace(m, cfg=_naming(m.name, lambda m=m: resolve(m))) for m in members)


def _member(cfg: Config, values: Mapping[str, Any]) -> Member:
    name = "_".join(_word(setting, value) for setting, value in values.items())
    base = cfg.run.folder or "runs/run"
    settings = {FLEET_SETTINGS[setting]: value for setting, value in values.items()}
    alone = replace(cfg, fleet=FleetConfig())
    given = {**settings, "run.folder": str(Path(base) / name)}
    return Member(name, _naming(name, lambda: from_flat(given, alone)))


def _naming(name: str, make: Callable[[], Config]) -> Config:
    """Return what `make` makes; where that is refused, say of which member."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"every member of the fleet must be a run of its own; `{name}` is not: {error} Or "
            "leave one of its values out of `fleet`."
        ) from error


def _word(setting: str, value: object) -> str:
    """Return a value as part of a folder's name."""
    text = re.sub(r"[^\w.+-]", "-", str(value), flags=re.ASCII).lstrip(".")
    return text if setting in SPEAK_FOR_THEMSELVES else f"{setting}{text}"


def _require_different(setting: str, values: tuple[Any, ...]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(
            f"`fleet.{setting}` must hold different values; got {twice[0]!r} twice. Give it once."
        )


def _require_own_folders(names: list[str]) -> None:
    """Refuse names that are one folder where case does not count, or one of the fleet's own."""
    counts = Counter(name.lower() for name in names)
    clashing = [n for n in names if not n or counts[n.lower()] > 1 or n.lower() in TAKEN]
    if clashing:
        raise ValueError(
            "every member of a fleet must have a folder of its own; `fleet.hookpoint` and the "
            f"other lists give {clashing[0]!r}, which is another member's or the fleet's own. "
            "Write the hookpoints out, or train them as fleets of their own."
        )
