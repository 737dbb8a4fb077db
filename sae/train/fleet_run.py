"""A whole fleet from its configuration: check all members, load once, train, save each.

    runs/my/                    the fleet: config.yaml, env.json, checkpoints/, summary.html
    runs/my/k16_seed0/          a member, a run like any other: config.yaml, metrics.jsonl, final/

What can be refused is refused before the model's weights load, as in `run`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from sae.coder import save_dictionary
from sae.coder.coder import resolve as resolve_coder
from sae.coder.sites import Sites
from sae.config import Config
from sae.stream.opening import pick_device, require_complete
from sae.stream.outline import outlined_sites
from sae.train.distributed import make_accelerator, n_launched
from sae.train.fleet_members import Member, members_of, resolved_members
from sae.train.fleet_stream import FleetStream
from sae.train.fleet_summary import write_summary
from sae.train.fleet_trainer import train_fleet
from sae.train.folder import require_free, write_run_files
from sae.train.run import open_source, prepare_folder, resolve, with_dtypes, with_lanes, with_world
from sae.train.steps import resolve_step


def run_fleet(cfg: Config) -> Path:
    """Train all members of `cfg.fleet` on one stream and return the fleet's folder.

    Errors: ValueError naming the member that cannot work; RuntimeError for several processes.
    """
    cfg, members = checked(cfg)
    accelerator = make_accelerator(cfg.run, cfg.train)
    folder = Path(cfg.run.folder or "runs/run")
    require_free(folder, cfg)
    cfg = with_lanes(cfg, folder, 1)
    source = open_source(of_stream(cfg, members), accelerator)
    try:
        cfg = with_dtypes(cfg, source)
        stream = FleetStream(source, is_whole=cfg.coder.site != "sae")
        members = resolved(cfg, members, stream, accelerator)
        resume_from = prepare_folder(
            replace(cfg, run=replace(cfg.run, folder=str(folder))), folder, accelerator
        )
        for member in members:
            write_run_files(folder / member.name, member.cfg, accelerator.device, 1)
        states = train_fleet(members, stream, accelerator, folder, resume_from)
    finally:
        source.close()
    for name, state in states.items():
        save_dictionary(state.raw_coder(), folder / name / "final")
    write_summary(folder)
    return folder


def checked(cfg: Config) -> tuple[Config, tuple[Member, ...]]:
    """Return `cfg` with its world's settings filled in, and its members, all of them possible.

    Errors: as `run_fleet`.
    """
    if n_launched() > 1:
        raise RuntimeError(
            f"a fleet must be trained by one process; {n_launched()} were launched. Launch one a "
            "GPU, each with a part of the fleet's values and a `run.folder` of its own."
        )
    require_for_many(cfg)
    cfg = with_world(cfg)
    members = resolved_members(members_of(cfg), lambda member: possible(member.cfg))
    if not cfg.world.name:
        require_complete(of_stream(cfg, members))
        require_fitting(cfg, members)
    pick_device(cfg.stream.device, "stream.device")
    return cfg, members


def require_for_many(cfg: Config) -> None:
    """Refuse what is not for several dictionaries at once.

    Errors: ValueError.
    """
    if cfg.coder.site == "sae" and cfg.model.other is not None:
        raise ValueError(
            "`model.other` must be left out where `fleet` lists values and `coder.site` is sae, as "
            f"each member reads one hookpoint of one model; got {cfg.model.other!r}. Leave it out, "
            "or set `coder.site: crosscoder`."
        )
    if cfg.coder.site != "sae" and cfg.fleet.hookpoint:
        raise ValueError(
            f"`fleet.hookpoint` must be left out for `coder.site: {cfg.coder.site}`, whose members "
            f"all have the places of `model`; got {list(cfg.fleet.hookpoint)}. Train those of "
            "other places as a fleet of their own."
        )
    if cfg.train.model_loss != "none":
        raise ValueError(
            "`train.model_loss` must be none where `fleet` lists values; got "
            f"{cfg.train.model_loss}. Train one such dictionary at a time."
        )


def require_fitting(cfg: Config, members: tuple[Member, ...]) -> None:
    """Refuse members that do not fit the places of their model, before its weights load.

    Errors: ValueError naming the member.
    """
    if cfg.coder.site == "sae" or cfg.stream.shards is not None:
        return
    if (sites := outlined_sites(cfg)) is None:
        return

    def fitting(member: Member) -> Config:
        resolve_coder(member.cfg.coder, sites)
        return member.cfg

    resolved_members(members, fitting)


def possible(cfg: Config) -> Config:
    """Return a member's `cfg` if a world and a training step can do what it asks for."""
    if cfg.train.step == "fused":
        resolve_step(cfg)
    return with_world(cfg)


def of_stream(cfg: Config, members: tuple[Member, ...]) -> Config:
    """Return `cfg` with the hookpoints of all members."""
    hookpoints = dict.fromkeys(member.cfg.model.hookpoint for member in members)
    return replace(cfg, model=replace(cfg.model, hookpoint=",".join(hookpoints)))


def resolved(
    cfg: Config, members: tuple[Member, ...], stream: FleetStream, accelerator: Accelerator
) -> tuple[Member, ...]:
    """Return the members with every derived value filled in: what is saved with each run."""

    def of(member: Member) -> Config:
        model = replace(cfg.model, hookpoint=member.cfg.model.hookpoint)
        own = replace(member.cfg, model=model, stream=cfg.stream)  # with this machine's dtypes
        sites = Sites.of(own.coder, stream.share(stream.place_of(member)).widths)
        return resolve(own, sites, Path(own.run.folder or ""), accelerator.device)

    return resolved_members(members, of)
