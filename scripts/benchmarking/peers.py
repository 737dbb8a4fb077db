"""What others run for the same work: PyTorch's own ops, eai-sparsify's wheel, and dense autograd.

A re-implementation does, in plain PyTorch, what a kind of trainer does; its code is here to read.
"""

import importlib.util
import sys
import types
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import BANDWIDTH, Batch, Code, PreActs, Weights
from .rows import Absent

PYTORCH = f"own package: torch {torch.__version__}"
RE_IMPLEMENTATION = "re-implementation"
MAX_ELEMENTS = 2**31


def _sparsify_version() -> str:
    try:
        return version("eai-sparsify")
    except PackageNotFoundError:
        return "not installed"


SPARSIFY = f"own package: eai-sparsify {_sparsify_version()}"


def bag(code: Code) -> Tensor:
    """Decode with F.embedding_bag, without a bias."""
    return F.embedding_bag(code.indices, code.W_dec, per_sample_weights=code.values, mode="sum")


def bag_ragged(code: Code) -> Tensor:
    """Decode with F.embedding_bag from flat pairs and offsets, without a bias."""
    return F.embedding_bag(
        code.indices.reshape(-1),
        code.W_dec,
        code.offsets,
        per_sample_weights=code.values.reshape(-1),
        mode="sum",
        include_last_offset=True,
    )


def bag_loss(code: Code) -> dict[str, Tensor]:
    """Decode, squared error, and its gradient to the values by autograd."""
    values = code.values.detach().requires_grad_()
    with torch.enable_grad():
        x_hat = F.embedding_bag(
            code.indices, code.W_dec.detach(), per_sample_weights=values, mode="sum"
        )
        residual = code.target - (x_hat + code.b_dec)
        loss = residual.float().square().sum(-1)
        (grad_values,) = torch.autograd.grad(loss.sum(), values)
    return {"loss": loss.detach(), "residual": residual.detach(), "grad_values": grad_values}


def dense_encoder_grad(code: Code) -> tuple[Tensor, Tensor]:
    """Scatter the values' gradients into (n, d_sae), then a dense matmul: dense autograd."""
    dense = code.values.new_zeros(len(code.values), code.W_dec.shape[0])
    dense.scatter_(1, code.indices, code.values)
    return dense.T @ code.target, dense.sum(0)


def dense_encode(batch: Batch) -> tuple[Tensor, Tensor]:
    """Encode densely, then torch.topk and a ReLU."""
    values, indices = F.linear(batch.x - batch.b_dec, batch.W_enc, batch.b_enc).topk(
        batch.k, dim=-1, sorted=False
    )
    return values.relu(), indices


def dense_loss(batch: Batch) -> Tensor:
    """Return each token's squared error through dense latents: five matmuls with the backward."""
    values, indices = dense_encode(batch)
    latents = values.new_zeros(len(batch.x), batch.W_enc.shape[0]).scatter(1, indices, values)
    x_hat = torch.addmm(batch.b_dec, latents, batch.W_dec)
    return (batch.x - x_hat).float().square().sum(-1)


def flat_topk(inputs: PreActs) -> tuple[Tensor, Tensor]:
    """Return the k · n largest of all pre-activations and their flat positions, by torch.topk."""
    if inputs.x.numel() >= MAX_ELEMENTS:
        raise Absent("not given more than 2**31 elements: where it overflows, the run would end")
    found = torch.topk(inputs.x.reshape(-1), inputs.k * len(inputs.x), sorted=False)
    return found.values, found.indices


class _DenseJumpReLU(torch.autograd.Function):
    """x where above theta, else 0; theta's gradient by the rectangle of a bandwidth."""

    @staticmethod
    def forward(ctx, x, theta, bandwidth):
        ctx.save_for_backward(x, theta)
        ctx.bandwidth = bandwidth
        return x.where(x > theta, 0)

    @staticmethod
    def backward(ctx, *grads):
        (grad,), (x, theta) = grads, ctx.saved_tensors
        in_window = (x - theta).abs() < ctx.bandwidth / 2
        grad_theta = (grad * (-theta / ctx.bandwidth)).where(in_window, 0).sum(0)
        return grad.where(x > theta, 0), grad_theta, None


def dense_jumprelu(inputs: PreActs) -> Tensor:
    """Mask the dense pre-activations, with JumpReLU's straight-through gradients."""
    return _DenseJumpReLU.apply(inputs.x, inputs.theta, BANDWIDTH)


def fused_adam(weights: Weights) -> Callable[[], Tensor]:
    """Return a call that makes one step of torch.optim.Adam(fused=True) from zeros on."""
    parameters = torch.nn.Parameter(weights.parameters.clone())
    parameters.grad = weights.gradients
    optimizer = torch.optim.Adam([parameters], lr=1e-3, fused=True)

    def step() -> Tensor:
        optimizer.step()
        return parameters.detach()

    return step


def sparsify_decode(code: Code) -> Tensor:
    """Decode with the kernel of eai-sparsify, without a bias."""
    if code.W_dec.numel() >= MAX_ELEMENTS:
        raise Absent("not given more than 2**31 weights: where it overflows, the run would end")
    return _sparsify_decoder()(code.indices, code.values, code.W_dec.mT)


def sparsify_step(batch: Batch) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]]:
    """Return a call of eai-sparsify's forward and backward: each token's error, and gradients."""
    coders = sparsify_module("sparse_coder")
    d_sae, d = batch.W_enc.shape
    cfg = coders.SparseCoderConfig(num_latents=d_sae, k=batch.k)
    coder = coders.SparseCoder(d, cfg, device=batch.x.device, dtype=batch.x.dtype)
    coder.encoder.weight.data, coder.encoder.bias.data = batch.W_enc, batch.b_enc
    coder.W_dec.data, coder.b_dec.data = batch.W_dec, batch.b_dec
    parameters = tuple(coder.parameters())

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        found = coder(batch.x)
        gradients = torch.autograd.grad(found.fvu, parameters)
        return (batch.x - found.sae_out).float().square().sum(-1).detach(), gradients

    return step


@cache
def _sparsify_decoder() -> Callable[..., Any]:
    """Return the wheel's decoder: on a GPU its Triton kernel, on a CPU its eager form."""
    utils = sparsify_module("utils")
    return utils.decoder_impl if torch.cuda.is_available() else utils.eager_decode


def sparsify_module(name: str) -> Any:
    """Import a module of the wheel without its trainer, which needs packages that it does not."""
    if "sparsify" not in sys.modules:
        found = importlib.util.find_spec("sparsify")
        if found is None or not found.submodule_search_locations:
            raise Absent("the package eai-sparsify is not installed: pip install 'sae[bench]'")
        package = types.ModuleType("sparsify")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["sparsify"] = package
    try:
        return import_module(f"sparsify.{name}")
    except ImportError as error:
        raise Absent(f"eai-sparsify cannot be imported: {error}") from error
