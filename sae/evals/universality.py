"""Whether two dictionaries, of other seeds, widths or models, found the same latents.

With C (m_a, m_b) the |cosine| of their decoder rows, `agreement` gives:
    mcc = mean C over the min(m_a, m_b) one-to-one pairs with the largest sum
    mmcs_a, mmcs_b = mean over the first's (the second's) latents of the largest C
    shared_0.7 = share of the min(m_a, m_b) pairs that encoder rows assign to each other too, with
        both cosines at least 0.7
    mcc_null = mcc where the second dictionary's rows are turned by a random rotation: what
        directions that lie as these do, but elsewhere, score by chance
    mcc_normalised = (mcc − mcc_null) / (1 − mcc_null)
`pairwise_agreement` has their means over all pairs of several dictionaries (PW-MCC is the mean
`mcc`; at least three seeds tell a spread). Dictionaries of different models share no directions:
`code_agreement` puts |correlation| of codes on the same tokens in place of C; its null pairs each
token with another one.

Source: arXiv 2505.20254 (PW-MCC); Paulo and Belrose 2025, "Sparse autoencoders trained on the same
data learn different features" (arXiv 2501.16615; shared by encoder and decoder. They compare signed
cosines, we |cosine|, as in `matching`).
Cost: O(m_a m_b d), and O(min² max) for each assignment: minutes beyond some 8,000 latents. Codes:
`cofiring`, twice.
Cannot see: whether what is found twice is anything. PCA and the axes, which no seed enters, score
1: consistency is not validity. `agreement` does not see codes.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.cofiring import Cofiring
from sae.evals.geometry import random_rotation
from sae.evals.interface import Undefined, Value
from sae.evals.matching import absolute_cosines, assigned, assignment

SHARED = 0.7


def agreement(a: Any, b: Any, *, seed: int = 0) -> dict[str, Value]:
    """Return how far dictionaries `a` and `b` have the same latents, by their directions.

    Args:
        a, b: have `W_dec` (m, d) of one width; `W_enc` (m, d) for `shared_0.7`.
        seed: of the rotation behind the null.

    Errors: ValueError for dictionaries of different widths.
    """
    rows_a, rows_b = _rows(a, "W_dec"), _rows(b, "W_dec")
    if rows_a.shape[1] != rows_b.shape[1]:
        raise ValueError(
            "dictionaries compared by direction must have one width; got "
            f"{rows_a.shape[1]} and {rows_b.shape[1]}. Compare their codes with `code_agreement`."
        )
    rotation = random_rotation(rows_b.shape[1], torch.Generator().manual_seed(seed)).double()
    null = assigned(absolute_cosines(rows_a, rows_b @ rotation)).mean()
    return {
        **_scores(absolute_cosines(rows_a, rows_b), float(null)),
        f"shared_{SHARED}": _shared(a, b),
    }


def pairwise_agreement(coders: list[Any], *, seed: int = 0) -> dict[str, Value]:
    """Return the means of `agreement` over all pairs, and the smallest and largest `mcc`.

    Errors: ValueError for fewer than two dictionaries.
    """
    if len(coders) < 2:
        raise ValueError(
            f"at least two dictionaries must be given; got {len(coders)}. Train more seeds."
        )
    found = [agreement(a, b, seed=seed) for a, b in combinations(coders, 2)]
    mcc = [value for pair in found if isinstance(value := pair["mcc"], float)]
    means = {name: _mean([pair[name] for pair in found]) for name in found[0]}
    return {**means, "mcc_smallest": min(mcc), "mcc_largest": max(mcc)}


def code_agreement(
    a: Latents, b: Latents, d_sae_a: int, d_sae_b: int, *, seed: int = 0
) -> dict[str, Value]:
    """Return how far two codes of the same n tokens, (n, k_a) and (n, k_b), go together.

    Dead latents have correlation 0 with everything, and count.

    Errors: ValueError where the codes are of different numbers of tokens.
    """
    n = len(a.values)
    if len(b.values) != n:
        raise ValueError(
            f"codes must be of the same tokens; got {n} and {len(b.values)}. Encode both "
            "models' activations of one text."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled = Latents(b.values.cpu()[order], b.indices.cpu()[order])
    null = assigned(_correlations(a, shuffled, d_sae_a, d_sae_b)).mean()
    return _scores(_correlations(a, b, d_sae_a, d_sae_b), float(null))


def _scores(similarity: Tensor, null: float) -> dict[str, Value]:
    mcc = float(assigned(similarity).mean())
    above = Undefined("the null scores 1: there is nothing above it")
    return {
        "mcc": mcc,
        "mmcs_a": float(similarity.amax(1).mean()),
        "mmcs_b": float(similarity.amax(0).mean()),
        "mcc_null": null,
        "mcc_normalised": (mcc - null) / (1 - null) if null < 1 else above,
    }


def _shared(a: Any, b: Any) -> Value:
    if not (hasattr(a, "W_enc") and hasattr(b, "W_enc")):
        return Undefined("it needs the encoder rows of both dictionaries")
    found = []
    for name in ("W_dec", "W_enc"):
        cosines = absolute_cosines(_rows(a, name), _rows(b, name))
        pairs = torch.zeros(cosines.shape, dtype=torch.bool)
        pairs[assignment(cosines)] = True
        found.append(pairs & (cosines >= SHARED))
    return int((found[0] & found[1]).sum()) / min(found[0].shape)


def _correlations(a: Latents, b: Latents, m: int, n: int) -> Tensor:
    sums = Cofiring(m, n)
    first, second = (Latents(code.values.cpu(), code.indices.cpu()) for code in (a, b))
    sums.update(first, second, torch.zeros(len(a.values), dtype=torch.int64))
    return sums.correlations()


def _rows(coder: Any, name: str) -> Tensor:
    return getattr(coder, name).detach().cpu().double()


def _mean(values: list[Value]) -> Value:
    numbers = [value for value in values if isinstance(value, float | int)]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else values[0]
