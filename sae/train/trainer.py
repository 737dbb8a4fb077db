"""Training one coder, read from top to bottom: set-up, then the loop.

One turn of the loop is what is due once in a while (dead list, log, checkpoint, stop) and then one
training step. The loop runs one extra turn, so that the last log and save need no second copy. No
step waits for the device: metrics stay there and are read every `log_every_steps`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sae.coder import SparseCoder
from sae.coder.initialisation import initial_b_dec, start_biases_, start_thresholds_
from sae.coder.losses import extra_loss_names
from sae.coder.sites import Sites
from sae.config import Config
from sae.stream.normalisation import Normaliser, PooledSample
from sae.stream.source import ActivationSource, NonFiniteActivationsError
from sae.train import resampling
from sae.train.checkpoint import load_checkpoint, save_checkpoint
from sae.train.dead import DeadLatents
from sae.train.distributed import sum_over_ranks
from sae.train.ema import Ema
from sae.train.interrupt import Interrupt, Interrupted
from sae.train.latent_rows import is_sorting_due, sort_latents_
from sae.train.metrics import MetricSums
from sae.train.model_loss import ModelLoss
from sae.train.null_inputs import CALIBRATION, as_trained_on
from sae.train.optimisers import OPTIMISERS
from sae.train.origin import origin
from sae.train.progress import ShowsRows, TrainProgress
from sae.train.schedule import lr_at, n_steps, values_at
from sae.train.state import Calibration, TrainState
from sae.train.steps import KeepsWeights, make_step
from sae.train.tracking import Tracker, open_trackers


def train_coder(
    cfg: Config,
    source: ActivationSource,
    accelerator: Accelerator,
    *,
    folder: Path | None = None,
    resume_from: Path | None = None,
    is_shown: bool = True,
    model_loss: ModelLoss | None = None,
) -> SparseCoder:
    """Train a coder on `source` as the resolved `cfg` says and return it in raw units.

    `folder` receives the log and the checkpoints; None keeps nothing. `model_loss` is there where
    `train.model_loss` asks for it.

    Errors: NonFiniteActivationsError naming hookpoint and step; Interrupted after a signal, once
    the state is saved; KeyboardInterrupt after Ctrl-C where there is no folder to save to.
    """
    # ---- set-up ----
    state = make_state(cfg, source, accelerator)
    state.model_loss = model_loss
    if resume_from is not None:
        load_checkpoint(state, resume_from, accelerator)
    step = make_step(cfg, state, accelerator)
    is_shown = is_shown and accelerator.is_main_process
    progress = TrainProgress(cfg.train, seen_tokens=state.tokens_seen, is_shown=is_shown)
    trackers = _trackers(cfg, folder, state.step, accelerator)
    last_step, saved_step = n_steps(cfg.train), state.step

    with (
        progress,
        Log(cfg, state, trackers, progress) as log,
        Interrupt(accelerator.device) as interrupt,
    ):
        warm_up(source, progress, interrupt)
        while True:
            # ---- once in a while ----
            is_last = state.step >= last_step
            if is_last or state.step % cfg.train.dead_refresh_steps == 0:
                state.dead.refresh(state.tokens_seen)
            is_log_due = is_last or state.step % cfg.train.log_every_steps == 0
            if is_log_due:
                log.row()
            stop = stop_signal(interrupt, accelerator, is_log_due)
            is_save_due = is_last or stop or state.step % checkpoint_interval(cfg) == 0
            if folder is not None and is_save_due and state.step > saved_step:
                require_finite_weights(state.coder, source.name, state.step)
                save_checkpoint(state, folder, accelerator, keep=cfg.train.keep_checkpoints)
                saved_step = state.step
            if stop or is_last:
                break

            # ---- one training step ----
            inputs = tended(cfg, state, step, _inputs(cfg, state, accelerator))
            step(inputs, lr_at(state.step, cfg.train), values_at(state.step, cfg))
            state.step += 1
            if state.ema is not None:
                state.ema.update_(state.coder, state.step)

    if stop:
        raise stopped(stop, folder, saved_step)
    return state.raw_coder()


def make_state(
    cfg: Config,
    source: ActivationSource,
    accelerator: Accelerator,
    calibration: Calibration | None = None,
) -> TrainState:
    """Return the state before the first step: calibrated, initialised, on the device.

    `calibration` is that of another state on the same activations, where there is one.
    """
    device = accelerator.device
    sample = source.calibration_sample().to(device)
    sample = as_trained_on(sample, cfg.train, cfg.run.seed, CALIBRATION)
    sites = Sites.of(cfg.coder, source.widths)
    calibration = calibration or calibrate(sample, cfg, sites)
    metadata = origin(source, sites, cfg.coder.site)
    coder = SparseCoder.create(
        sites.d_in, cfg.coder, seed=cfg.run.seed, metadata=metadata, sites=sites
    )
    coder.to(device)
    with torch.no_grad():
        coder.b_dec.copy_(calibration.b_dec)
    start_biases_(coder, calibration.normaliser.apply(sample), sum_over_ranks)
    start_thresholds_(coder, calibration.normaliser.apply(sample), sum_over_ranks)
    assert cfg.train.dead_after_tokens is not None
    assert cfg.coder.k_aux is not None
    return TrainState(
        coder=coder,
        optimiser=OPTIMISERS[cfg.train.optimizer](coder, cfg.train),
        dead=DeadLatents(
            coder.d_sae,
            dead_after_tokens=cfg.train.dead_after_tokens,
            # The penalty is for all dead latents, AuxK for a few times as many as it chooses.
            k_aux=coder.d_sae if cfg.coder.dead_penalty else cfg.coder.k_aux,
            device=device,
            is_counting=cfg.train.sort_latents_every_steps is not None,
        ),
        metrics=MetricSums(calibration.mean, loss_names(cfg)),
        source=source,
        calibration=calibration,
        batch_tokens=cfg.train.batch_tokens,
        ema=None if cfg.train.ema_decay is None else Ema(coder, cfg.train.ema_decay),
    )


def calibrate(sample: Tensor, cfg: Config, sites: Sites) -> Calibration:
    """Return normaliser, variance, mean and b_dec from a sample (m, Σ widths) of every process.

    All but the normaliser are of what is written.

    Errors: ValueError where all activations are equal.
    """
    # One matrix that reads and writes all places cannot take up a factor for each: one for all.
    is_one_matrix = cfg.coder.activation == "matching_pursuit"
    normaliser = Normaliser.fit(
        sample,
        cfg.stream.normalisation,
        sum_over_ranks,
        sites=None if is_one_matrix else sites,
        is_tied=cfg.coder.tie_decoders,
    )
    x = sites.written(normaliser.apply(sample))
    pooled = PooledSample(x, sum_over_ranks)
    mean = pooled.mean(lambda rows: rows.sum(0))
    variance = float(pooled.mean(lambda rows: (rows - mean).square().sum()))
    if variance == 0:
        raise ValueError(
            "activations must differ from one another; all tokens of the calibration sample are "
            "equal. Check the hookpoint or the data."
        )
    b_dec = initial_b_dec(x, cfg.coder.b_dec_init, sum_over_ranks).to(sample.device)
    return Calibration(normaliser, variance, mean.float(), b_dec)


def loss_names(cfg: Config) -> tuple[str, ...]:
    """Return the names of the losses that `cfg`'s coder trains with, their sum first."""
    of_model = () if cfg.train.model_loss == "none" else ("model",)
    return ("loss", "reconstruction", *extra_loss_names(cfg.coder), *of_model)


class Log:
    """Reads the metrics since the last row and hands the row to trackers and progress."""

    def __init__(
        self, cfg: Config, state: TrainState, trackers: list[Tracker], progress: ShowsRows
    ):
        self.cfg, self.state, self.trackers, self.progress = cfg, state, trackers, progress
        self._time, self._tokens = time.monotonic(), state.tokens_seen

    def row(self) -> None:
        """Log one row; the one place where the host waits for the device.

        Errors: NonFiniteActivationsError where the loss is not finite.
        """
        state, tokens = self.state, self.state.tokens_seen
        means = state.metrics.compute()
        if not means:  # before the first step, and right after a resume
            self._time = time.monotonic()
            return
        state.metrics.clear()
        row = {
            "step": state.step,
            "tokens": tokens,
            **means,
            "dead_share": float(state.dead.share(tokens)),
            "lr": lr_at(state.step - 1, self.cfg.train),
            "tokens_per_second": self._rate(tokens),
            **state.source.log_values(),
        }
        _require_finite_loss(row, state.source.name)
        self.progress.show(row)
        for tracker in self.trackers:
            tracker.log(row)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        """Let trackers write what they hold back, however the run ended."""
        for tracker in self.trackers:
            tracker.close()

    def _rate(self, tokens: int) -> float:
        now, before = time.monotonic(), self._time
        since, self._time, self._tokens = tokens - self._tokens, now, tokens
        return since / max(now - before, 1e-9)


def tended(
    cfg: Config, state: TrainState, step: KeepsWeights, inputs: Iterator[Tensor]
) -> Iterable[Tensor]:
    """Sort and resample latents where that is due, and return the inputs of the step.

    It comes behind the save, so that a resumed run does it again.
    """
    if is_sorting_due(state.step, cfg.train.sort_latents_every_steps):
        sort_latents_(state)
        step.weights_changed()
    if resampling.is_due(state.step, cfg):
        batches = list(inputs)
        resampling.resample_(state, torch.cat(batches), cfg.run.seed)
        step.weights_changed()
        return batches
    return inputs


def _inputs(cfg: Config, state: TrainState, accelerator: Accelerator) -> Iterator[Tensor]:
    """Yield this process's micro-batches of one step, each when it is asked for."""
    n_micro = cfg.train.grad_accumulation_steps
    n_tokens = cfg.train.batch_tokens // accelerator.num_processes // n_micro
    for _ in range(n_micro):
        x = _next_input(state, n_tokens, accelerator)
        x = as_trained_on(x, cfg.train, cfg.run.seed, state.step)
        yield state.calibration.normaliser.apply(x)


def _next_input(state: TrainState, n: int, accelerator: Accelerator) -> Tensor:
    """Return this process's next n rows in raw units, on the device."""
    try:
        x = state.source.next_batch(n)
    except NonFiniteActivationsError as error:
        raise NonFiniteActivationsError(f"at step {state.step}: {error}") from error
    return x.detach().to(accelerator.device)


def stop_signal(interrupt: Interrupt, accelerator: Accelerator, is_log_due: bool) -> int:
    """Return the signal to stop for, or 0; several processes agree on it at the log's steps."""
    if accelerator.num_processes == 1:
        return interrupt.number
    return interrupt.agreed() if is_log_due else 0


def stopped(number: int, folder: Path | None, saved_step: int) -> BaseException:
    """Return what ends a run that a signal stopped.

    Where nothing was to be kept, in a notebook or a script, Ctrl-C is what it always is.
    """
    if number == signal.SIGINT and folder is None:
        return KeyboardInterrupt()
    return Interrupted(number, is_saved=folder is not None and saved_step > 0)


def checkpoint_interval(cfg: Config) -> int:
    assert cfg.train.checkpoint_every_steps is not None
    return cfg.train.checkpoint_every_steps


def _trackers(
    cfg: Config, folder: Path | None, step: int, accelerator: Accelerator
) -> list[Tracker]:
    if folder is None or not accelerator.is_main_process:
        return []
    return open_trackers(cfg, folder, step)


def warm_up(source: ActivationSource, progress: TrainProgress, interrupt: Interrupt) -> None:
    """Let the source fill its buffer; a signal ends that at once, as there is nothing to save."""

    def tell(rows: int, capacity: int) -> None:
        progress.filling(rows, capacity)
        if interrupt.number:
            raise Interrupted(interrupt.number, is_saved=False)

    source.warm_up(tell)


def _require_finite_loss(row: Mapping[str, float], name: str) -> None:
    if not row["loss"] < float("inf"):
        raise NonFiniteActivationsError(
            f"the loss on `{name}` must be finite; it is {row['loss']} at step {row['step']:.0f}. "
            "The last checkpoint is unharmed. Lower `train.lr` or set `train.grad_clip_norm: 1`."
        )


def require_finite_weights(coder: SparseCoder, name: str, step: int) -> None:
    """Never let a broken coder replace a good checkpoint."""
    if not all(torch.isfinite(p).all() for p in coder.parameters()):
        raise NonFiniteActivationsError(
            f"the weights trained on `{name}` must be finite; they are not at step {step}. The "
            "last checkpoint is unharmed. Lower `train.lr` or set `train.grad_clip_norm: 1`."
        )
