"""What others' whole training steps cost: from their own packages, and two re-implementations.

All start from the same dictionary and train with Adam at the same learning rate on the same tokens,
with no dead latents.
"""

import importlib.util
import sys
import types
import warnings
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .peers import SPARSIFY, sparsify_module
from .rows import Absent
from .step_task import BETAS, LR, Task, Trainee

NEVER = 10**12


class _Last:
    """The last step's loss, left on the device until it is asked for."""

    def __init__(self):
        self.loss: Tensor | float | None = None

    def read(self) -> float:
        assert self.loss is not None
        return float(self.loss)


def own_package(name: str) -> str:
    """Return the source of a row that runs from a package as its authors ship it."""
    try:
        return f"own package: {name} {version(name)}"
    except PackageNotFoundError:
        return f"own package: {name} not installed"


SPARSIFY_STEP = f"{SPARSIFY}, its coder with its trainer's step and torch.optim.Adam(fused=True)"
SAE_LENS = f"{own_package('sae-lens')}, SAETrainer._train_step, fp32"
DICTIONARY_LEARNING = f"{own_package('dictionary-learning')}, TopKTrainer.update, fp32"
DENSE = "re-implementation: dense latents, autograd, torch.optim.Adam(fused=True)"
SKETCH = "re-implementation: torch's embedding-bag ops over sorted pairs, Adam(fused=True)"


# ---- the unit


def bare_matmul(task: Task, dtype: torch.dtype, is_fresh: bool = False) -> Trainee:
    """Multiply the tokens with the encoder's weight, into memory that is there or into fresh."""
    weight = task.weight().to(dtype)
    xs = {x.data_ptr(): x.to(dtype) for x in task.xs}
    size = (0,) if is_fresh else (task.shape.n, task.shape.d_sae)
    out = torch.empty(size, dtype=dtype, device=task.device)

    def step(x: Tensor) -> None:
        torch.mm(xs[x.data_ptr()], weight.T, out=None if is_fresh else out)

    return Trainee(step, None, lambda: [weight, *xs.values(), out])


# ---- re-implementations


class _Dictionary(nn.Module):
    """The parameters, row j being latent j, and what follows and precedes an optimiser's step."""

    def __init__(self, task: Task):
        super().__init__()
        self.W_enc, self.W_dec = (nn.Parameter(task.weight()) for _ in range(2))
        self.b_enc = nn.Parameter(task.b_enc.clone())
        self.b_dec = nn.Parameter(torch.zeros(task.shape.d, device=task.device))
        self.k = task.shape.k
        self.optimizer = torch.optim.Adam(self.parameters(), lr=LR, betas=BETAS, fused=True)

    @torch.no_grad()
    def update(self) -> None:
        """Project W_dec's gradient, step, renormalise."""
        grad = self.W_dec.grad
        assert grad is not None
        grad.addcmul_(torch.linalg.vecdot(grad, self.W_dec)[:, None], self.W_dec, value=-1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))


def dense_autograd(task: Task, is_bf16: bool) -> Trainee:
    """Train through dense latents: five matmuls of n · d_sae · d."""
    coder, last = _Dictionary(task), _Last()
    precision = torch.autocast(task.device.type, torch.bfloat16) if is_bf16 else nullcontext()

    def step(x: Tensor) -> None:
        with precision:
            pre_acts = F.linear(x - coder.b_dec, coder.W_enc, coder.b_enc)
            values, indices = pre_acts.topk(coder.k, dim=-1, sorted=False)
            latents = torch.zeros_like(pre_acts).scatter(1, indices, values.relu())
            x_hat = F.linear(latents, coder.W_dec.T) + coder.b_dec
            loss = (x - x_hat).float().square().sum(-1).mean()
        loss.backward()
        coder.update()
        last.loss = loss.detach()

    return Trainee(step, last.read, partial(_kept, coder, coder.optimizer))


def torch_sketch(task: Task) -> Trainee:
    """Train with torch's own sparse ops and gradients by hand."""
    coder, last = _Dictionary(task), _Last()

    @torch.no_grad()
    def step(x: Tensor) -> None:
        centred = x - coder.b_dec
        pre_acts = torch.addmm(coder.b_enc, centred, coder.W_enc.T)
        values, indices = pre_acts.topk(coder.k, dim=-1, sorted=False)
        del pre_acts
        values = values.relu_()
        residual = F.embedding_bag(indices, coder.W_dec, per_sample_weights=values, mode="sum")
        residual += coder.b_dec - x
        last.loss = residual.square().sum(-1).mean()
        _set_gradients(coder, centred, values, indices, residual.mul_(2 / len(x)))
        coder.update()

    return Trainee(step, last.read, partial(_kept, coder, coder.optimizer))


def _set_gradients(
    coder: _Dictionary, x: Tensor, values: Tensor, indices: Tensor, grad_x_hat: Tensor
) -> None:
    """Set all gradients from dL/dx_hat; the weights' are bags of tokens, one bag a latent."""
    flat, k, d_sae = indices.reshape(-1), coder.k, len(coder.W_enc)
    bag_of = torch.arange(len(flat), device=flat.device) // k
    starts = torch.arange(0, len(flat), k, device=flat.device)
    grad_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_x_hat, coder.W_dec, flat, starts, bag_of, 0
    )
    grad_values = grad_values.where(values.reshape(-1) > 0, 0)
    latents, order = flat.sort(stable=True)
    bags = {
        "input": order // k,
        "offsets": torch.searchsorted(latents, torch.arange(d_sae, device=flat.device)),
        "mode": "sum",
    }
    for weight, rows, scales in (
        (coder.W_dec, grad_x_hat, values.reshape(-1)),
        (coder.W_enc, x, grad_values),
    ):
        weight.grad = F.embedding_bag(weight=rows, per_sample_weights=scales[order], **bags)
    coder.b_enc.grad = torch.zeros_like(coder.b_enc).index_add_(0, flat, grad_values)
    coder.b_dec.grad = grad_x_hat.sum(0) - coder.b_enc.grad @ coder.W_enc


# ---- own packages


def sparsify(task: Task) -> Trainee:
    """Train eai-sparsify's coder with the calls of its trainer, on a GPU in its own bf16 autocast.

    Its trainer takes bitsandbytes' Adam where it is installed, else torch's; here it is torch's,
    fused. Its reads of the losses on the host are left out.
    """
    coders, utils = sparsify_module("sparse_coder"), sparsify_module("utils")
    if not torch.cuda.is_available():
        coders.decoder_impl = utils.eager_decode  # what the package does without Triton
    shape = task.shape
    cfg = coders.SparseCoderConfig(num_latents=shape.d_sae, k=shape.k)
    coder = coders.SparseCoder(shape.d, cfg, device=task.device, dtype=torch.float32)
    _copy_start(task, coder.encoder.weight, coder.W_dec, coder.encoder.bias)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LR, betas=BETAS, fused=True)
    did_fire = torch.zeros(shape.d_sae, dtype=torch.bool, device=task.device)
    last = _Last()

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = coder(x=x, y=x, dead_mask=None, total_variance=total_variance)
        did_fire[out.latent_indices.flatten()] = True
        (out.fvu + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        last.loss = out.fvu.detach() * total_variance / len(x)

    return Trainee(step, last.read, partial(_kept, coder, optimizer))


def sae_lens(task: Task) -> Trainee:
    """Train SAELens's TopK SAE with its trainer's own step; the optimiser is its own, too."""
    topk = _submodule("sae_lens", "sae-lens", "saes.topk_sae")
    trainers = _submodule("sae_lens", "sae-lens", "training.sae_trainer")
    configs = _submodule("sae_lens", "sae-lens", "config")
    shape = task.shape
    cfg = topk.TopKTrainingSAEConfig(
        d_in=shape.d, d_sae=shape.d_sae, k=shape.k, device=str(task.device)
    )
    coder = topk.TopKTrainingSAE(cfg)
    _copy_start(task, coder.W_enc, coder.W_dec, coder.b_enc)
    training = configs.SAETrainerConfig(
        total_training_samples=NEVER,
        train_batch_size_samples=shape.n,
        lr=LR,
        lr_end=LR,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        device=str(task.device),
    )
    trainer, last = trainers.SAETrainer(training, coder, iter(())), _Last()

    def step(x: Tensor) -> None:
        last.loss = trainer._train_step(sae=coder, sae_in=x).losses["mse_loss"].detach()

    return Trainee(step, last.read, partial(_kept, coder, trainer.optimizer))


def dictionary_learning(task: Task) -> Trainee:
    """Train dictionary_learning's TopK autoencoder with its trainer's `update`."""
    _without_init("dictionary_learning", "dictionary-learning")  # it needs nnsight
    trainers = _submodule("dictionary_learning", "dictionary-learning", "trainers.top_k")
    shape = task.shape
    trainer = trainers.TopKTrainer(
        steps=NEVER,
        activation_dim=shape.d,
        dict_size=shape.d_sae,
        k=shape.k,
        layer=0,
        lm_name="none",
        lr=LR,
        warmup_steps=0,
        device=str(task.device),
    )
    coder, last = trainer.ae, _Last()
    _copy_start(task, coder.encoder.weight, coder.decoder.weight, coder.encoder.bias)

    def step(x: Tensor) -> None:
        last.loss = trainer.update(1, x)  # step 0 would set b_dec first

    return Trainee(step, last.read, partial(_kept, coder, trainer.optimizer))


@torch.no_grad()
def _copy_start(task: Task, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor) -> None:
    """Give a peer the dictionary that all start from, whichever way round it stores weights."""
    for weight in (W_enc, W_dec):
        weight.copy_(task.rows if weight.shape == task.rows.shape else task.rows.T)
    b_enc.copy_(task.b_enc)


def _kept(coder: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [*coder.parameters(), *(value for value in states if isinstance(value, Tensor))]


def _submodule(package: str, name: str, path: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise Absent(f"the package {name} is not installed")
    try:
        with warnings.catch_warnings(action="ignore"):  # of what the package imports in turn
            return import_module(f"{package}.{path}")
    except ImportError as error:
        raise Absent(f"{name} cannot be imported: {error}") from error


def _without_init(package: str, name: str) -> None:
    """Let submodules be imported without what the package imports for other purposes."""
    if package in sys.modules:
        return
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise Absent(f"the package {name} is not installed")
    module = types.ModuleType(package)
    module.__path__ = list(found.submodule_search_locations)
    module.__spec__ = found
    sys.modules[package] = module
