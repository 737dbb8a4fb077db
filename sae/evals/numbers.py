"""Pseudorandom numbers that depend on what is numbered alone.

"The lowest numbers so far" is then a uniform sample that does not depend on batches, their order,
or which process saw them, and two samples merge exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.stream.contexts import Contexts

HALVES = 2
HIGHEST = 2**62 - 1
# Odd constants of SplitMix64 as signed integers; int64 arithmetic wraps round.
STEP, MIX_1, MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def mixed(numbers: Tensor) -> Tensor:
    """Return int64 numbers with their bits mixed, as SplitMix64 does (Steele et al. 2014)."""
    numbers = numbers + STEP
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        numbers = (numbers ^ _shifted(numbers, shift)) * factor
    return numbers ^ _shifted(numbers, 31)


def numbers_of(ids: Tensor, seed: int) -> Tensor:
    """Return a number in [0, HIGHEST] of each id (n) int64."""
    return mixed(mixed(ids + wrapped(seed * STEP)) + STEP).bitwise_and(HIGHEST)


def halves_of(documents: Tensor, seed: int) -> Tensor:
    """Return which half each document falls into, (n) int64, 0 or 1."""
    return mixed(documents + wrapped((seed + 1) * STEP)) & 1


def token_numbers(contexts: Contexts, kept: Tensor, seed: int) -> Tensor:
    """Return a number in [0, HIGHEST] of each kept token, from its context and its place, (n).

    Shapes: kept (n) int64, where the tokens lie in the flattened (b · t), on the CPU.
    """
    tokens, documents = contexts.tokens.cpu(), contexts.document_ids.cpu()
    context = torch.full((len(tokens),), wrapped(seed * STEP), dtype=torch.int64)
    for column, of_documents in zip(tokens.unbind(1), documents.unbind(1), strict=True):
        context = mixed(context + column + of_documents * STEP)
    width = tokens.shape[1]
    return mixed(context[kept // width] + kept % width).bitwise_and(HIGHEST)


def wrapped(number: int) -> int:
    """Return Python's unbounded integer as int64 arithmetic has it."""
    return (number + 2**63) % 2**64 - 2**63


def _shifted(numbers: Tensor, by: int) -> Tensor:
    """Return a shift right that fills with zeros, which torch's does not for negative numbers."""
    return (numbers >> by) & ((1 << (64 - by)) - 1)
