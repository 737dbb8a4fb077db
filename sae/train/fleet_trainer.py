"""Training a fleet, read from top to bottom: the page of `trainer`, for several coders at once.

One turn of the loop is what is due once in a while, for every member, and then one batch of every
hookpoint, on which each group of members takes its step. All members are at the same step, so one
checkpoint holds the stream's place and all their states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from sae.coder.sites import Sites
from sae.stream.source import NonFiniteActivationsError
from sae.train.fleet_checkpoint import load_fleet, save_fleet
from sae.train.fleet_groups import Trainee, make_groups
from sae.train.fleet_members import Member
from sae.train.fleet_stream import FleetStream
from sae.train.fleet_summary import write_summary
from sae.train.interrupt import Interrupt
from sae.train.null_inputs import CALIBRATION, as_trained_on
from sae.train.progress import TrainProgress
from sae.train.schedule import n_steps
from sae.train.side_by_side import SideBySide
from sae.train.state import Calibration, TrainState
from sae.train.tracking import open_trackers
from sae.train.trainer import (
    Log,
    calibrate,
    checkpoint_interval,
    make_state,
    require_finite_weights,
    stop_signal,
    stopped,
    warm_up,
)


def train_fleet(
    members: Sequence[Member],
    stream: FleetStream,
    accelerator: Accelerator,
    folder: Path,
    resume_from: Path | None = None,
) -> dict[str, TrainState]:
    """Train the resolved `members` on one stream and return their last states, by name.

    `folder` is the fleet's: each member's log goes into its own below it.

    Errors: NonFiniteActivationsError naming hookpoint and step; Interrupted after a signal, once
    all states are saved.
    """
    # ---- set-up ----
    cfg = members[0].cfg  # of what all share: lengths, intervals, batches
    trainees = make_trainees(members, stream, accelerator)
    stream.forget_samples()
    states = {trainee.name: trainee.state for trainee in trainees}
    if resume_from is not None:
        load_fleet(states, stream.source, resume_from)
    groups = make_groups(trainees, accelerator)
    steps = SideBySide(groups, accelerator.device)
    step = trainees[0].state.step
    progress = TrainProgress(cfg.train, seen_tokens=trainees[0].state.tokens_seen)
    progress.say(f"{len(members)} coders in {len(groups)} groups; shown are their means.")
    last_step, saved_step = n_steps(cfg.train), step

    with (
        steps,
        progress,
        FleetLog(trainees, progress, folder) as log,
        Interrupt(accelerator.device) as interrupt,
    ):
        warm_up(stream.source, progress, interrupt)
        while True:
            # ---- once in a while ----
            is_last = step >= last_step
            if is_last or step % cfg.train.dead_refresh_steps == 0:
                refresh_dead(states)
            is_log_due = is_last or step % cfg.train.log_every_steps == 0
            if is_log_due:
                stream.read_log_values()
                log.rows()
            stop = stop_signal(interrupt, accelerator, is_log_due)
            is_save_due = is_last or stop or step % checkpoint_interval(cfg) == 0
            if is_save_due and step > saved_step:
                save(states, stream, folder, keep=cfg.train.keep_checkpoints)
                saved_step = step
            if stop or is_last:
                break

            # ---- one training step of every member ----
            batches = next_batches(trainees, stream, accelerator)
            steps.train(batches)
            step += 1

    if stop:
        raise stopped(stop, folder, saved_step)
    return states


def refresh_dead(states: Mapping[str, TrainState]) -> None:
    """Make every member's list of dead latents anew."""
    for state in states.values():
        state.dead.refresh(state.tokens_seen)


def save(states: Mapping[str, TrainState], stream: FleetStream, folder: Path, *, keep: int) -> None:
    """Write a checkpoint, and the page that compares the members so far."""
    for name, state in states.items():
        require_finite_weights(state.coder, f"{state.source.name} by {name}", state.step)
    save_fleet(states, stream.source, folder, keep=keep)
    write_summary(folder)


def make_trainees(
    members: Sequence[Member], stream: FleetStream, accelerator: Accelerator
) -> list[Trainee]:
    """Return every member with its state before the first step.

    Members on one hookpoint share what was estimated of it: they are trained in the same units.
    """
    calibrations: dict[int, Calibration] = {}
    trainees = []
    for member in members:
        place = stream.place_of(member)
        share = stream.share(place)
        if place not in calibrations:
            sample = share.calibration_sample().to(accelerator.device)
            cfg = member.cfg
            sample = as_trained_on(sample, cfg.train, cfg.run.seed, CALIBRATION)
            calibrations[place] = calibrate(sample, cfg, Sites.of(cfg.coder, share.widths))
        state = make_state(member.cfg, share, accelerator, calibrations[place])
        trainees.append(Trainee(member.name, member.cfg, state, place))
    return trainees


def next_batches(
    trainees: Sequence[Trainee], stream: FleetStream, accelerator: Accelerator
) -> Mapping[int, list[Tensor]]:
    """Return the micro-batches of one step by hookpoint, in training units, on the device."""
    train, step = trainees[0].cfg.train, trainees[0].state.step
    seed = trainees[0].cfg.run.seed  # one for all members, who share the rows
    n_micro = train.grad_accumulation_steps
    normalisers = {t.place: t.state.calibration.normaliser for t in trainees}
    batches: dict[int, list[Tensor]] = {place: [] for place in normalisers}
    for _ in range(n_micro):
        rows = stream.next_rows(train.batch_tokens // n_micro, step)
        for place, normaliser in normalisers.items():
            x = rows[place].detach().to(accelerator.device)
            x = as_trained_on(x, train, seed, step)
            batches[place].append(normaliser.apply(x))
    return batches


class FleetLog:
    """The logs of all members; progress shows the means of their figures."""

    def __init__(self, trainees: Sequence[Trainee], progress: TrainProgress, folder: Path):
        self.progress, self._shown = progress, []
        self._open = ExitStack()
        with ExitStack() as opened:
            self.logs = {
                t.name: opened.enter_context(
                    Log(t.cfg, t.state, open_trackers(t.cfg, folder / t.name, t.state.step), self)
                )
                for t in trainees
            }
            self._open = opened.pop_all()

    def rows(self) -> None:
        """Log one row of every member."""
        self._shown: list[Mapping[str, float]] = []
        for name, log in self.logs.items():
            try:
                log.row()
            except NonFiniteActivationsError as error:
                message = f"in member `{name}` of the fleet, {error}"
                raise NonFiniteActivationsError(message) from error
        if self._shown:
            names = ("tokens", "tokens_per_second", "fvu", "l0", "dead_share")
            n = len(self._shown)
            self.progress.show({k: sum(row[k] for row in self._shown) / n for k in names})

    def show(self, row: Mapping[str, float]) -> None:
        """Take a member's row, to show the mean of all."""
        self._shown.append(row)

    def __enter__(self) -> FleetLog:
        return self

    def __exit__(self, *_: object) -> None:
        """Let all trackers write what they hold back, however the run ended."""
        self._open.close()
