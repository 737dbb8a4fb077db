"""Rows of the ops that choose which latents fire: topk, batch_topk, threshold_select."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checking import (
    Deviation,
    count_above,
    deviation,
    kth_largest,
    sample,
    selection,
    worst_of,
)
from .floors import Term, one_read
from .inputs import BANDWIDTH, PreActs
from .peers import PYTORCH, RE_IMPLEMENTATION, dense_jumprelu, flat_topk
from .rows import OURS, Backward, Contender, Row, backward, forms, forward, op
from .shapes import Shape

TOPK_GOALS = {"A": 0.13, "B": 0.33, "C": 0.65}


class Kept(NamedTuple):
    """What a selection kept, in one form for ragged and dense results."""

    dense: Callable[[Tensor], Tensor]  # of tokens: (len, d_sae), zero where not kept
    total: int
    is_ascending: bool = True


def topk(impl: str, s: PreActs) -> tuple[Tensor, Tensor]:
    return op("topk")(s.x, s.k, impl=impl)


def torch_topk(s: PreActs) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(s.x, s.k, dim=-1, sorted=False)
    return values, indices


def topk_by_groups(s: PreActs) -> tuple[Tensor, Tensor]:
    group_size = 8 if s.x.is_cpu else 1
    while group_size * group_size * s.k < s.x.shape[1] and s.x.is_cuda:
        group_size *= 2
    return op("topk_by_groups")(s.x, s.k, group_size=group_size, interleaved=s.x.is_cpu)


def batch_topk(impl: str, s: PreActs) -> Any:
    return op("batch_topk")(s.x, s.k * len(s.x), impl=impl)


def threshold_select(has_window: bool, impl: str, s: PreActs) -> Any:
    window = {"bandwidth": BANDWIDTH, "window_capacity": s.window_capacity} if has_window else {}
    return op("threshold_select")(s.x, s.theta, capacity=s.capacity, impl=impl, **window)


def mask_and_nonzero(s: PreActs) -> tuple[Tensor, Tensor]:
    tokens, latents = (s.x > s.theta).nonzero(as_tuple=True)
    return s.x[tokens, latents], tokens * s.x.shape[1] + latents


# ---- results in one form


def kept_of_ragged(d_sae: int, ragged: Any) -> Kept:
    """Return what a Ragged kept."""
    values, indices, offsets = ragged.values.detach(), ragged.indices, ragged.offsets
    total = int(offsets[-1])
    if total > len(values):
        return Kept(lambda rows: values.new_full((len(rows), d_sae), float("nan")), total, False)
    tokens = torch.arange(len(offsets) - 1, device=offsets.device)
    tokens = tokens.repeat_interleave(offsets.diff(), output_size=total)
    flat = tokens * d_sae + indices[:total]

    def dense(rows: Tensor) -> Tensor:
        found = values.new_zeros(len(rows), d_sae)
        for slot, (start, end) in enumerate(
            zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
        ):
            found[slot, indices[start:end]] = values[start:end]
        return found

    return Kept(dense, total, bool((flat.diff() > 0).all()))


def kept_of_positions(n: int, d_sae: int, found: tuple[Tensor, Tensor]) -> Kept:
    """Return what values at flat positions, in any order, kept."""
    positions, order = found[1].sort()
    ends = torch.arange(n + 1, device=positions.device) * d_sae
    offsets = torch.searchsorted(positions, ends)
    ragged = _Pairs(found[0].detach()[order], positions % d_sae, offsets)
    return kept_of_ragged(d_sae, ragged)


class _Pairs(NamedTuple):
    values: Tensor
    indices: Tensor
    offsets: Tensor


def _kept(inputs: PreActs, result: Any) -> Kept:
    """Return what any of this file's ragged, flat or dense results kept."""
    n, d_sae = inputs.x.shape
    if isinstance(result, Tensor):
        return Kept(lambda rows: result.detach()[rows], int(result.count_nonzero()))
    ragged = ragged_of(result)
    return kept_of_positions(n, d_sae, result) if ragged is None else kept_of_ragged(d_sae, ragged)


def ragged_of(result: Any) -> Any:
    """Return the ragged code in an op's result, alone or first of several; None without one."""
    return next((part for part in (result, result[0]) if hasattr(part, "offsets")), None)


# ---- checks


def check_topk(s: PreActs, found: tuple[Tensor, Tensor]) -> Deviation:
    """Compare by values and by gathering, never by index."""
    rows = sample(len(s.x), s.x.device)
    x, values, indices = s.x[rows], found[0].detach()[rows], found[1][rows]
    if values.shape != (len(rows), s.k) or bool(
        (indices < 0).any() | (indices >= x.shape[1]).any()
    ):
        return selection(False)
    best = torch.topk(x.float(), s.k, dim=-1).values
    return selection(
        torch.equal(values.float().sort(dim=-1, descending=True).values, best)
        and torch.equal(x.gather(1, indices), values)
        and bool((indices.sort(dim=-1).values.diff(dim=-1) > 0).all())
    )


def check_topk_backward(s: PreActs, found: Backward) -> Deviation:
    """The gradient was the values themselves, so x's is x where it was kept."""
    rows, grad = sample(len(s.x), s.x.device), found.gradients["x"]
    values, indices = (half[rows] for half in found.outputs)
    want = torch.zeros_like(s.x[rows]).scatter(1, indices, values.detach())
    return selection(grad is not None and torch.equal(grad[rows], want))


def check_batch_topk(s: PreActs, result: Any) -> Deviation:
    """Nothing that was left out may be larger than anything that was kept."""
    k_total, rows, kept = s.k * len(s.x), sample(len(s.x), s.x.device), _kept(s, result)
    if kept.total != k_total or not kept.is_ascending:
        return selection(False)
    values = result[0] if ragged_of(result) is None else result[0].values[:k_total]
    threshold, x, dense = kth_largest(s.x, k_total), s.x[rows], kept.dense(rows)
    is_right = (
        float(values.min()) == threshold
        and int((values > threshold).sum()) == count_above(s.x, threshold)
        and torch.equal(dense, x.where(dense != 0, 0))
        and bool((dense != 0)[x > threshold].all())
    )
    named = threshold if ragged_of(result) is None else float(result[1])
    return selection(is_right and named == threshold)


def check_threshold_select(s: PreActs, result: Any) -> Deviation:
    """Exactly the elements above their latent's threshold are kept."""
    rows, kept = sample(len(s.x), s.x.device), _kept(s, result)
    is_complete = kept.total == count_above(s.x, s.theta) and kept.is_ascending
    x = s.x[rows]
    return selection(is_complete and torch.equal(kept.dense(rows), x.where(x > s.theta, 0)))


def check_ragged_backward(s: PreActs, found: Backward) -> Deviation:
    """As in check_topk_backward, whatever the outputs' form."""
    grad, rows = found.gradients["x"], sample(len(s.x), s.x.device)
    if grad is None:
        return selection(False)
    kept = _kept(s, found.outputs)
    same_count = int(grad.count_nonzero()) == kept.total
    return selection(same_count and torch.equal(grad[rows], kept.dense(rows)))


def check_window_backward(s: PreActs, found: Backward) -> Deviation:
    """Besides x's, compare some thresholds' gradients with their pseudo-derivative."""
    grad, latents = found.gradients["theta"], sample(s.x.shape[1], s.x.device)
    if grad is None:
        return selection(False)
    x, theta = s.x[:, latents].double(), s.theta[latents].double()
    # The gradient of a was a itself, x above theta.
    close = (x > theta) & (x - theta < BANDWIDTH / 2)
    truth = (x * (-theta / BANDWIDTH)).where(close, 0).sum(0)
    sums = deviation([(grad[latents], truth.to(grad.dtype), truth)])
    return worst_of([check_ragged_backward(s, found), sums])


# ---- rows


def _from_values(inputs: PreActs, outputs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """Start a backward at the values, with themselves as their gradient."""
    if isinstance(outputs, Tensor):
        values = outputs
    else:
        ragged = ragged_of(outputs)
        values = outputs[0] if ragged is None else ragged.values
    return values, values.detach()


def _back(function: Callable[[Any], Any]) -> Any:
    return backward(function, ("x",), _from_values)


def _back_to_theta(function: Callable[[Any], Any]) -> Any:
    return backward(function, ("x", "theta"), _from_values)


_EITHER = [("forward", forward), ("backward", _back)]


def _forms_of(function: Callable[[str, PreActs], Any], direction: Any) -> tuple[Contender, ...]:
    return forms(lambda impl: direction(partial(function, impl)))


def _rows_of_topk() -> list[Row]:
    checks = {"forward": check_topk, "backward": check_topk_backward}
    return [
        Row(
            "topk",
            part,
            "pre_acts",
            (
                *_forms_of(topk, direction),
                Contender("topk_by_groups", f"{OURS}, torch only", direction(topk_by_groups)),
                Contender("torch.topk", PYTORCH, direction(torch_topk)),
            ),
            checks[part],
            lambda shape, itemsize: (one_read(shape, itemsize),),
            goals=TOPK_GOALS if part == "forward" else {},
        )
        for part, direction in _EITHER
    ]


def _rows_of_batch_topk() -> list[Row]:
    checks = {"forward": check_batch_topk, "backward": check_ragged_backward}
    return [
        Row(
            "batch_topk",
            part,
            "pre_acts",
            (
                *_forms_of(batch_topk, direction),
                Contender("torch.topk of all", PYTORCH, direction(flat_topk)),
            ),
            checks[part],
            lambda shape, itemsize: (one_read(shape, itemsize),),
        )
        for part, direction in _EITHER
    ]


def _rows_of_threshold_select() -> list[Row]:
    def one_pass(shape: Shape, itemsize: int) -> tuple[Term, ...]:
        return (one_read(shape, itemsize),)

    dense = Contender("dense mask", RE_IMPLEMENTATION, forward(dense_jumprelu))
    sparse = Contender("mask, nonzero", RE_IMPLEMENTATION, forward(mask_and_nonzero), False)
    with_window = partial(threshold_select, True)
    ours = (
        _forms_of(partial(threshold_select, False), forward),
        _forms_of(with_window, forward),
        _forms_of(with_window, _back_to_theta),
    )
    dense_back = Contender("dense mask", RE_IMPLEMENTATION, _back_to_theta(dense_jumprelu))
    name, check = "threshold_select", check_threshold_select
    return [
        Row(name, "forward", "pre_acts", (*ours[0], dense, sparse), check, one_pass),
        Row(name, "forward, with window", "pre_acts", ours[1], check, one_pass),
        Row(
            name,
            "backward, with window",
            "pre_acts",
            (*ours[2], dense_back),
            check_window_backward,
            one_pass,
        ),
    ]


ROWS = [*_rows_of_topk(), *_rows_of_batch_topk(), *_rows_of_threshold_select()]
