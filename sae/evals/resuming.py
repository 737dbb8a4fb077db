"""Which evals of a results file need not be run again.

An eval that finished is kept where the dictionary, the seed, the settings that it depends on and
the version are the same, and where nobody that it asked was out of reach; results of another
dictionary are refused, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import sae
from sae.config import Config, EvalName
from sae.configuration import flatten
from sae.evals.fingerprint import dictionary_digest
from sae.evals.registry import EVALS
from sae.evals.results import EvalResults, plain_json, read_results, without_evals

UNREACHED: dict[EvalName, str] = {"autointerp": "judge_unreached"}
"""Evals that ask somebody, and their metric of what was out of reach: above 0, not finished."""
NOTHING = EvalResults({}, {}, {}, {}, {})
"""Results without evals."""
SECTIONS = ("model.", "data.", "world.", "eval.")
# What changes no number: where it runs, and how a judge is reached.
NO_MATTER = (
    *(
        "model.device",
        "eval.evals",
        "eval.nulls",
        "eval.judge_key",
        "eval.judge_cache",
        "eval.judge_tries",
    ),
    *("eval.judge_pause_seconds", "eval.judge_timeout_seconds", "eval.judge_requests_per_minute"),
)


def settings_of(cfg: Config) -> dict[str, Any]:
    """Return the settings on which an evaluation's numbers depend, by dotted key."""
    settings = plain_json(flatten(cfg))
    return {
        key: value
        for key, value in settings.items()
        if key.startswith(SECTIONS) and key not in NO_MATTER
    }


def finished_before(
    path: Path, coder: Any, cfg: Config, say: Callable[[str], None] = lambda _: None
) -> EvalResults:
    """Return what the results file `path` holds that an evaluation as `cfg` says would find again.

    Nothing where the file is not there. `say` is told what is kept, and why what is not.

    Errors: ValueError where the results are of another dictionary.
    """
    if not path.exists():
        return NOTHING
    results = read_results(path)
    known = results.provenance.get("dictionary")
    if known is not None and known != dictionary_digest(coder):
        raise ValueError(
            f"`{path}` must hold results of this dictionary; it holds those of another one "
            f"({_described(results.provenance)}). Give another `--out`, or replace it with "
            "`--again true`."
        )
    changed, out_of_reach = _changed(results.provenance, cfg), _out_of_reach(results)
    gone: list[EvalName] = [
        name
        for name in results.evals
        if name in out_of_reach or any(_matters(key, name) for key in changed)
    ]
    left = without_evals(results, gone)
    if gone:
        why = [*changed.values(), *(f"{name} lacks answers" for name in out_of_reach)]
        say(f"Run again: {', '.join(gone)}; {'; '.join(why)}.")
    if left.evals:
        say(f"Kept from {path}: {', '.join(left.evals)}. (`--again true` runs them again.)")
    return left if left.evals else NOTHING


def with_nulls(
    before: EvalResults | None, names: Iterable[EvalName], nulls: Iterable[str]
) -> EvalResults | None:
    """Return the results to go on from where `nulls` are measured beside the evals `names`.

    Nulls pass with all evals at once: what finished without them begins anew.
    """
    wanted = set(nulls)
    if before is None or not wanted:
        return before
    has_all = wanted <= before.nulls.keys() and set(names) <= before.evals.keys()
    return before if has_all else None


def _out_of_reach(results: EvalResults) -> list[EvalName]:
    return [name for name, metric in UNREACHED.items() if (results.metrics.get(metric) or 0) > 0]


def _changed(provenance: Mapping[str, Any], cfg: Config) -> dict[str, str]:
    """Return by dotted key what differs from how results were made, in words."""
    before, now = provenance.get("settings"), settings_of(cfg)
    if before is None or provenance.get("dictionary") is None:
        return {"version": "they do not say how they were made"}
    changed = {
        key: f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
    if provenance.get("sae") != sae.__version__:
        changed["version"] = f"sae was {provenance.get('sae')}, now {sae.__version__}"
    return changed


def _matters(key: str, name: EvalName) -> bool:
    """Say whether a setting enters an eval's numbers; one that is not known here enters all."""
    if key.startswith("eval.judge"):
        return name == "autointerp"
    if key == "eval.downstream_tokens":
        return name in EVALS and EVALS[name].reads == "model"
    return True


def _described(provenance: Mapping[str, Any]) -> str:
    coder = provenance.get("coder", {})
    place = coder.get("hook_name") or provenance.get("hookpoint") or "no hookpoint"
    return f"{place}, {provenance.get('d_sae')} latents, L0 {provenance.get('l0', 0):.3g}"
