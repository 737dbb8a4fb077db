"""A whole run from its configuration: check, load, resolve, train, save.

Everything that can be refused is refused here, before the first step and, where possible, before
the model's weights load.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from sae.coder import save_dictionary
from sae.coder.coder import resolve as resolve_coder
from sae.coder.sites import Sites
from sae.config import Config
from sae.configuration import flatten, from_flat
from sae.stream.buffered import BufferedSource, buffer_tokens
from sae.stream.opening import (
    OpenedModel,
    open_model,
    pick_device,
    require_complete,
    require_single,
)
from sae.stream.outline import outlined_hookpoints
from sae.stream.rows import RowStream
from sae.stream.shards import open_shards
from sae.stream.source import ActivationSource
from sae.train import schedule
from sae.train.checkpoint import checkpoints, verify
from sae.train.distributed import (
    make_accelerator,
    mean_over_ranks,
    require_divisible,
    require_divisible_lanes,
)
from sae.train.folder import require_free, require_same, saved_lanes, write_run_files
from sae.train.model_loss import ModelLoss
from sae.train.steps import resolve_step
from sae.train.trainer import train_coder
from sae.worlds import WorldSource, make_world, resolve_world


def run(cfg: Config) -> Path:
    """Train as `cfg` says and return the run's folder; its `final/` holds the dictionary.

    A fleet's folder holds a run's folder for each of its members (`fleet_run`).
    """
    if not cfg.fleet.is_empty:
        from sae.train.fleet_run import run_fleet  # which is made of this module's parts

        return run_fleet(cfg)
    cfg = with_world(cfg)
    if not cfg.world.name:
        require_complete(cfg)
    if cfg.train.step == "fused":
        resolve_step(cfg)
    pick_device(cfg.stream.device, "stream.device")
    accelerator = make_accelerator(cfg.run, cfg.train)
    folder = Path(cfg.run.folder or "runs/run")
    if accelerator.is_main_process:
        require_free(folder, cfg)
    accelerator.wait_for_everyone()
    cfg = with_lanes(cfg, folder, accelerator.num_processes)
    opened = None if cfg.train.model_loss == "none" else opened_once(cfg, accelerator)
    source = open_source(cfg, accelerator, opened)
    try:
        sites = Sites.of(cfg.coder, source.widths)
        cfg = resolve(with_dtypes(cfg, source), sites, folder, accelerator.device)
        resume_from = prepare_folder(cfg, folder, accelerator)
        coder = train_coder(
            cfg,
            source,
            accelerator,
            folder=folder,
            resume_from=resume_from,
            model_loss=None if opened is None else model_loss(cfg, opened, accelerator),
        )
    finally:
        source.close()
    if accelerator.is_main_process:
        save_dictionary(coder, folder / "final")
    accelerator.wait_for_everyone()
    return folder


def with_world(cfg: Config) -> Config:
    """Return `cfg` with its world's settings filled in; without a world, `cfg` itself.

    Errors: ValueError for a world's settings without one, and for settings of models, text and
    buffers beside it.
    """
    cfg = replace(cfg, world=resolve_world(cfg.world))
    if not cfg.world.name:
        return cfg
    given, default = flatten(cfg), flatten(Config())
    idle = [
        key
        for key, value in given.items()
        if key.split(".")[0] in ("model", "data", "stream", "harvest")
        and key not in ("stream.normalisation", "stream.lanes")
        and value != default[key]
    ]
    if idle:
        raise ValueError(
            f"`{idle[0]}` must be left out where `world.name` is given, as a world has neither "
            f"model nor text; got {given[idle[0]]!r}. Leave out one of the two."
        )
    return cfg


def opened_once(cfg: Config, accelerator: Accelerator) -> OpenedModel:
    """Open text and model of `cfg`; a packaged model is converted by the first process alone.

    Errors: ValueError, before weights load, for several places where an sae is trained.
    """
    with accelerator.main_process_first():
        if is_of_one_place(cfg):
            require_single(outlined_hookpoints(cfg), cfg.model.other is not None)
        return open_model(cfg, accelerator.device)


def is_of_one_place(cfg: Config) -> bool:
    """Say whether the run trains one dictionary of one place."""
    return cfg.coder.site == "sae" and cfg.fleet.is_empty


def model_loss(cfg: Config, opened: OpenedModel, accelerator: Accelerator) -> ModelLoss:
    """Return the loss of the model that this process trains with."""
    return ModelLoss(cfg, opened, accelerator.process_index, accelerator.num_processes)


def open_source(
    cfg: Config, accelerator: Accelerator, opened: OpenedModel | None = None
) -> ActivationSource:
    """Open what `cfg` trains on: this process's lanes of a model's activations, shards or world.

    `opened`: the model, where it is open already.
    """
    assert cfg.stream.lanes is not None
    n_mine = cfg.stream.lanes // accelerator.num_processes
    first = accelerator.process_index * n_mine
    lanes = range(first, first + n_mine)
    if cfg.world.name:
        world = make_world(cfg.world, accelerator.device)
        return WorldSource(world, seed=cfg.run.seed, lanes=lanes, n_lanes=cfg.stream.lanes)
    if cfg.stream.shards is None:
        streams = model_lanes(cfg, lanes, opened or opened_once(cfg, accelerator))
    else:
        streams = shard_lanes(cfg, lanes)
    return BufferedSource(
        streams,
        cfg.stream,
        context_size=cfg.data.context_size,
        seed=cfg.run.seed,
        device=accelerator.device,
        max_norm_ratio=cfg.data.max_norm_ratio,
        over_ranks=mean_over_ranks,
    )


def model_lanes(cfg: Config, lanes: Iterable[int], opened: OpenedModel) -> dict[int, RowStream]:
    """Return lanes of an open model's activations."""
    if is_of_one_place(cfg):
        require_single(opened.hookpoints, opened.other is not None)
    reader, n_lanes = opened.reader(), cfg.stream.lanes or 1
    return {lane: opened.rows(reader, lane=lane, n_lanes=n_lanes) for lane in lanes}


def shard_lanes(cfg: Config, lanes: Iterable[int]) -> dict[int, RowStream]:
    """Open the shards of `cfg`; no model is loaded."""
    n_lanes = cfg.stream.lanes or 1
    streams = {lane: open_shards(cfg, cfg.run.seed, lane, n_lanes) for lane in lanes}
    if is_of_one_place(cfg):
        require_single(next(iter(streams.values())).names)
    return dict(streams)


def with_lanes(cfg: Config, folder: Path, n_processes: int) -> Config:
    """Return `cfg` with a number of lanes: its own, that of the run it continues, or one a process.

    Errors: ValueError where the processes cannot divide them, or they the batch.
    """
    lanes = cfg.stream.lanes or saved_lanes(folder) or n_processes
    require_divisible_lanes(lanes, n_processes)
    require_divisible(cfg.train, lanes, "lanes")
    return replace(cfg, stream=replace(cfg.stream, lanes=lanes))


def resolve(cfg: Config, sites: Sites, folder: Path | None, device: torch.device) -> Config:
    """Return `cfg` with every derived value filled in: what is saved with the run."""
    coder = resolve_coder(cfg.coder, sites)
    assert coder.d_sae is not None
    has_buffer = not cfg.world.name
    tokens_held = buffer_tokens(cfg.stream, cfg.data.context_size) if has_buffer else None
    resolved = replace(
        cfg,
        coder=coder,
        train=schedule.resolve(cfg.train, coder.d_sae, device),
        stream=replace(cfg.stream, buffer_tokens=tokens_held),
        run=replace(cfg.run, folder=str(folder) if folder else None),
    )
    return resolve_step(resolved)


def with_dtypes(cfg: Config, source: ActivationSource) -> Config:
    """Return `cfg` with the dtypes that this machine chose, so that another keeps to them."""
    if not isinstance(source, BufferedSource):
        return cfg
    first = next(iter(source.lanes.values()))
    dtypes = {"model.dtype": first.stream.dtypes[0], "stream.dtype": source.dtypes[0]}
    return from_flat({key: str(t).removeprefix("torch.") for key, t in dtypes.items()}, cfg)


def prepare_folder(cfg: Config, folder: Path, accelerator: Accelerator) -> Path | None:
    """Write the run's files and return the checkpoint to continue from, if there is one."""
    if accelerator.is_main_process:
        require_same(folder, cfg)
        write_run_files(folder, cfg, accelerator.device, accelerator.num_processes)
    accelerator.wait_for_everyone()
    saved = checkpoints(folder)
    if not saved:
        return None
    verify(saved[-1])
    return saved[-1]
