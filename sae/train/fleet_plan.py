"""What a fleet will cost: the stream once, and the coders of all members together."""

from __future__ import annotations

from pathlib import Path

from sae.config import Config
from sae.stream.buffered import BufferedSource
from sae.train.distributed import make_accelerator
from sae.train.fleet_groups import make_groups
from sae.train.fleet_run import checked, of_stream, resolved
from sae.train.fleet_stream import FleetStream
from sae.train.fleet_trainer import make_trainees
from sae.train.memory import peak, reset_peak
from sae.train.plan import Plan, disk_parts, memory_parts, plan_of, timed, with_small_buffer
from sae.train.run import open_source, with_dtypes, with_lanes
from sae.train.side_by_side import SideBySide


def plan_fleet(cfg: Config, seconds: float) -> Plan:
    """Return what a fleet of `cfg` will cost, from its first `seconds`. Nothing is written.

    Errors: those of the fleet itself, for a configuration that cannot work.
    """
    cfg, members = checked(cfg)
    accelerator = make_accelerator(cfg.run, cfg.train)
    device = accelerator.device
    cfg = with_lanes(cfg, Path(cfg.run.folder or "runs/run"), 1)
    reset_peak(device)
    source = open_source(with_small_buffer(of_stream(cfg, members)), accelerator)
    assert isinstance(source, BufferedSource)
    try:
        cfg = with_dtypes(cfg, source)
        stream = FleetStream(source, is_whole=cfg.coder.site != "sae")
        members = resolved(cfg, members, stream, accelerator)
        loading = peak(device)
        reset_peak(device)
        trainees = make_trainees(members, stream, accelerator)
        train = members[0].cfg.train
        n_micro = train.grad_accumulation_steps
        inputs = {}
        for trainee in trainees:
            if trainee.place not in inputs:
                sample = stream.samples[trainee.place].to(device)
                x = trainee.state.calibration.normaliser.apply(sample)
                n = train.batch_tokens // n_micro
                inputs[trainee.place] = [x.repeat(-(-n // len(x)), 1)[:n].clone()] * n_micro

        with SideBySide(make_groups(trainees, accelerator), device) as steps:
            speed = timed(source, lambda: steps.train(inputs), device, seconds)
        states = [trainee.state for trainee in trainees]
        lead = members[0].cfg
        memory = memory_parts(lead, source, states, device, loading)
    finally:
        source.close()
    disk = disk_parts(lead, states, memory["shuffle buffer"], 1)
    return plan_of(lead, source, accelerator, speed, memory, disk, tuple(m.name for m in members))
