"""What the public ops demand of their arguments, and the words they say it with.

Every message has one form: what must hold; what was given; what to do. Checks read shapes, dtypes
and devices only, so they cost no synchronisation; the range of `indices` is data, and is read only
in debug mode.
"""

import os
from typing import Literal

import torch
from torch import Tensor

from .launching import why_not_triton

Impl = Literal["auto", "triton", "reference"]
IMPLS = ("auto", "triton", "reference")
Form = Literal["reference", "torch", "triton"]

_debug = os.environ.get("SAE_KERNELS_DEBUG", "") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Turn the checks that read data on or off: today, that every index lies in [0, d_sae).

    Off by default, since on a GPU they wait for the device. `SAE_KERNELS_DEBUG=1` in the
    environment turns them on from the start. They never run inside torch.compile.
    """
    global _debug
    _debug = enabled


def choose_form(impl: str, op: str, *tensors: Tensor | None) -> Form:
    """Return which form of `op` shall run on `tensors`.

    "auto" is Triton where it can run and the tensors are on a GPU, else the fast torch form.
    Raises ValueError for an unknown `impl`, RuntimeError where "triton" cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"`impl` must be one of {IMPLS}; got {impl!r}. Leave it at 'auto'.")
    if impl == "reference":
        return "reference"
    obstacle = why_not_triton(*tensors)
    if impl == "triton" and obstacle:
        raise RuntimeError(
            f"`{op}` with impl='triton' must have Triton, 16- or 32-bit floats and a CUDA device; "
            f"here {obstacle}. Use impl='auto', which takes the fast torch form. (To run kernels "
            "on a CPU for tests, set TRITON_INTERPRET=1 before the first import.)"
        )
    on_gpu = any(tensor is not None and tensor.is_cuda for tensor in tensors)
    return "triton" if impl == "triton" or (on_gpu and not obstacle) else "torch"


def check_floating(**tensors: Tensor | None) -> None:
    """Raise TypeError for a tensor that is not floating point."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(
                f"`{name}` must be floating point; got {tensor.dtype}. "
                f"Convert it with `{name}.float()`."
            )


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors lie on one device."""
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in given.items())
        names = ", ".join(f"`{name}`" for name in given)
        raise ValueError(f"{names} must share one device; got {listed}. Move them with `.to()`.")


def check_at_least_1d(**tensors: Tensor) -> None:
    """Raise ValueError for a tensor without a last axis."""
    for name, tensor in tensors.items():
        if tensor.dim() < 1:
            raise ValueError(
                f"`{name}` must have at least one axis; got a scalar. Give it the shape (n, width)."
            )


def check_shape(name: str, tensor: Tensor | None, axes: dict[str, int | None]) -> None:
    """Raise ValueError unless `tensor` has `axes`, name to size (None where any size will do)."""
    if tensor is None:
        return
    sizes = tuple(axes.values())
    fits = tensor.dim() == len(sizes) and all(
        want is None or want == got for want, got in zip(sizes, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(a if s is None else f"{a}={s}" for a, s in axes.items())
        raise ValueError(
            f"`{name}` must have shape ({wanted}); got {tuple(tensor.shape)}. "
            "Row j of a weight is latent j: transpose a (d, d_sae) layout before the call."
        )


def check_k(k: int, width: int, axis: str) -> None:
    """Raise ValueError unless 1 ≤ k ≤ width."""
    if not 1 <= k <= width:
        raise ValueError(
            f"`k` must be in [1, {axis}]; got k={k}, {axis}={width}. Lower `k` or widen the rows."
        )


def check_pairs(name: str, values: Tensor, indices: Tensor) -> None:
    """Raise unless `values` and int64 `indices` are the two halves of one sparse code."""
    if indices.dtype != torch.int64:
        raise TypeError(
            f"`indices` must be torch.int64; got {indices.dtype}. Convert it with `.long()`."
        )
    check_at_least_1d(indices=indices)
    if values.shape != indices.shape:
        raise ValueError(
            f"`{name}` and `indices` must have one shape (..., k); got {tuple(values.shape)} and "
            f"{tuple(indices.shape)}. Pass both halves of the same top-k."
        )


def check_index_range(indices: Tensor, d_sae: int, check_indices: bool) -> None:
    """In debug mode, or when `check_indices`, raise ValueError for an index outside [0, d_sae)."""
    if torch.compiler.is_compiling() or not (check_indices or _debug) or not indices.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= d_sae:
        raise ValueError(
            f"`indices` must lie in [0, d_sae); got [{low}, {high}] with d_sae={d_sae}. "
            "Check that they come from a dictionary of this width."
        )


def check_finite_values(enabled: bool, **tensors: Tensor | None) -> None:
    """When `enabled`, raise ValueError for a tensor that holds NaN or an infinity.

    It reads the data, so on a GPU it waits for the device; it never runs inside torch.compile.
    """
    if not enabled or torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        n_bad = int(tensor.numel() - torch.isfinite(tensor).sum())
        if n_bad:
            raise ValueError(
                f"`{name}` must be finite; got {n_bad} NaN or infinite of {tensor.numel()} "
                "elements. Look for an overflow or a division by zero before this call."
            )


def check_code(name: str, values: Tensor, indices: Tensor, offsets: Tensor | None) -> None:
    """Raise unless `values` (called `name`) and `indices` are a sparse code, ragged if `offsets`.

    The contents of `offsets` are data: that they ascend from 0 to at most p is not checked.
    """
    check_pairs(name, values, indices)
    if offsets is None:
        return
    if offsets.dtype != torch.int64:
        raise TypeError(
            f"`offsets` must be torch.int64; got {offsets.dtype}. Convert it with `.long()`."
        )
    if offsets.dim() != 1 or not offsets.numel():
        raise ValueError(
            f"`offsets` must have shape (n + 1,); got {tuple(offsets.shape)}. Pass 0 and then "
            "where each token's pairs end."
        )
    if indices.dim() != 1:
        raise ValueError(
            f"With `offsets`, `{name}` and `indices` must have shape (p,); got "
            f"{tuple(indices.shape)}. Flatten them, or leave `offsets` out for k pairs a token."
        )


def leading_axes(indices: Tensor, offsets: Tensor | None) -> dict[str, int | None]:
    """Return the axes, name to size, that a code shares with its tokens' rows."""
    if offsets is not None:
        return {"n": offsets.numel() - 1}
    return {f"axis {i}": size for i, size in enumerate(indices.shape[:-1])}
