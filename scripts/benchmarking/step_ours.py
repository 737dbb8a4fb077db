"""Our own training steps, made as the trainer makes them."""

import torch
from accelerate import Accelerator
from torch import Tensor

from sae.coder.sites import Sites
from sae.config import Config
from sae.configuration import from_flat
from sae.stream.arrays import open_source
from sae.train import steps
from sae.train.run import resolve
from sae.train.state import TrainState
from sae.train.trainer import make_state

from .step_floors import Moments, Precision
from .step_task import BETAS, LR, SEED, Task, Trainee

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16"}


def ours(
    task: Task,
    step: str,
    precision: Precision,
    moments: Moments = "fp32",
    with_auxk: bool = False,
) -> Trainee:
    """Return our training, before its first step."""
    cfg = settings(task, step, precision, moments)
    accelerator = Accelerator(cpu=task.device.type == "cpu")
    state = make_state(cfg, open_source(task.xs[0]), accelerator)
    with torch.no_grad():
        state.coder.b_enc.copy_(task.b_enc)
    if with_auxk:
        state.dead.indices = task.dead()
    run = steps.make_step(cfg, state, accelerator)

    def one_step(x: Tensor) -> None:
        run([x], LR)
        state.step += 1

    return Trainee(
        one_step,
        lambda: _take_loss(state),
        lambda: [*state.coder.parameters(), *state.optimiser.tensors().values()],
        _shadow_bytes(run),
    )


def settings(task: Task, step: str, precision: Precision, moments: Moments) -> Config:
    """Return the resolved configuration of this training."""
    shape = task.shape
    flat = {
        "coder.d_sae": shape.d_sae,
        "coder.k": shape.k,
        "coder.b_dec_init": "zeros",
        "stream.normalisation": "none",
        "train.tokens": 10**6 * shape.n,
        "train.batch_tokens": shape.n,
        "train.adam_betas": BETAS,
        "train.adam_moments": moments,
        "train.step": step,
        "train.mixed_precision": MIXED_PRECISION[precision],
        "run.seed": SEED,
    }
    return resolve(from_flat(flat, Config()), Sites((shape.d,)), None, task.device)


def _take_loss(state: TrainState) -> float:
    """Return the squared error a token since the last call, in the tokens' own units."""
    loss = state.metrics.compute()["reconstruction"] * state.calibration.variance
    state.metrics.clear()
    return loss


def _shadow_bytes(run: object) -> int:
    """Return what the 16-bit copies of the weights take."""
    coder = getattr(run, "coder", None)
    shadows = [getattr(coder, name, None) for name in ("enc_shadow", "dec_shadow")]
    return sum(shadow.nbytes for shadow in shadows if isinstance(shadow, Tensor))
