"""Outputs kept from one forward and given again: only before the place, only in this block."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae.stream.hookpoints import Hookpoint
from sae.stream.prefix import give_again, keep_before


class Block(nn.Module):
    """Multiplies, counts its runs, and gives a tensor or what `wrap` makes of it."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.inner, self.wrap, self.n_runs = nn.Linear(4, 4), wrap, 0

    def forward(self, x: Any) -> Any:
        self.n_runs += 1
        x = x[0] if isinstance(x, tuple) else x
        return self.wrap(self.inner(x).tanh())


class Stack(nn.Module):
    """Runs its blocks in `order`."""

    def __init__(self, blocks: list[Block], order: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        super().__init__()
        self.blocks, self.order = nn.ModuleList(blocks), order

    def forward(self, x: Any) -> Any:
        for number in self.order:
            x = self.blocks[number](x)
        return x


def four(wrap: Callable[[Tensor], Any] = lambda x: x) -> list[Block]:
    torch.manual_seed(0)
    return [Block(wrap) for _ in range(4)]


def numbers(stack: Stack, kept: dict[nn.Module, Any]) -> list[int]:
    return [i for i, block in enumerate(stack.blocks) if block in kept]


@torch.no_grad()
def ran(stack: Stack, place: str) -> dict[nn.Module, Any]:
    name, _, side = place.partition(":")
    with keep_before(stack, Hookpoint(name, side or "out")) as kept:  # type: ignore[arg-type]
        stack(torch.ones(2, 3, 4))
    return kept


@pytest.mark.parametrize(
    ("place", "expected"),
    [("blocks.2", [0, 1, 2]), ("blocks.2:in", [0, 1]), ("blocks.2.inner:in", [0, 1])],
)
def test_blocks_that_end_before_the_place_are_kept(place, expected):
    stack = Stack(four())
    assert numbers(stack, ran(stack, place)) == expected


def test_an_inner_place_keeps_its_own_output():
    stack = Stack(four())
    kept = ran(stack, "blocks.1.inner")
    assert numbers(stack, kept) == [0]
    assert stack.blocks[1].inner in kept


@pytest.mark.parametrize("order", [(1, 2, 0, 3), (0, 1, 0, 2, 3), (0, 1, 2, 0, 3)])
def test_what_runs_again_or_later_is_not_kept(order):
    stack = Stack(four(), order)
    assert numbers(stack, ran(stack, "blocks.2:in")) == [1]


def test_more_than_one_tensor_is_not_kept():
    one, two = Stack(four(lambda x: (x, None))), Stack(four(lambda x: (x, x)))
    assert numbers(one, ran(one, "blocks.2")) == [0, 1, 2]
    assert numbers(two, ran(two, "blocks.2")) == []


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None)])
@torch.no_grad()
def test_kept_outputs_are_given_for_every_variant_and_only_in_the_block(wrap):
    stack = Stack(four(wrap))
    kept = ran(stack, "blocks.1")
    x = torch.arange(24.0).reshape(2, 3, 4)
    whole = stack(x)
    before = [block.n_runs for block in stack.blocks]
    with give_again(kept, 3):
        found = stack(x.repeat(3, 1, 1))
    expected = stack(torch.ones(6, 3, 4))
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected)
    assert [block.n_runs - n for block, n in zip(stack.blocks, before, strict=True)] == [1, 1, 2, 2]
    torch.testing.assert_close(stack(x), whole)
    assert not any("forward" in block.__dict__ for block in stack.blocks)


@torch.no_grad()
def test_another_thread_runs_the_model_as_it_is():
    stack = Stack(four())
    kept, x = ran(stack, "blocks.1"), torch.zeros(2, 3, 4)
    whole = stack(x)
    with give_again(kept, 1), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(torch.no_grad()(stack), x).result(), whole)
        assert not torch.equal(stack(x), whole)


@torch.no_grad()
def test_a_forward_of_the_instance_s_own_comes_back():
    stack = Stack(four())
    kept, block = ran(stack, "blocks.1"), stack.blocks[0]
    own = block.forward
    block.forward = lambda x: own(x)  # type: ignore[method-assign]
    mine = block.forward
    with give_again(kept, 1):
        assert block.forward is not mine
    assert block.forward is mine
