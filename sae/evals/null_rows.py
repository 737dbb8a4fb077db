"""The nulls by name: how each is made, what it keeps of a dictionary, and what it destroys.

A measure that a null scores as well on as the dictionary does not see what the null destroys. Two
nulls must be trained: their rows say how, and a run's folder, or a dictionary's, then stands in the
list of nulls by its path. To add one: its object in `nulls`, a row here.

| null | what a score above it says |
|---|---|
| shuffled | the codes belong to their tokens: 0 of the line that scores are drawn on |
| permuted | latents write what they read |
| random | the directions are no accident of how many there are, and how few are used |
| pca, identity | it is more than the data's own covariance, or axes |
| oracle | nothing: the truth of a world, the line's other end |
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from sae.config import EvalConfig, EvalName
from sae.evals.evaluable import Evaluable
from sae.evals.nulls import (
    Directions,
    PermutedDecoder,
    ShuffledCodes,
    TrueDictionary,
    principal_components,
    random_directions,
)
from sae.evals.registry import EVALS

if TYPE_CHECKING:
    from sae.worlds.world import World

CALIBRATION_TOKENS = 8192
FREE_JUDGE = "rules"
ASKS_MUCH = "its judge is a model, asked about the dictionary alone; it has a null of its own"
READS_OTHERS = "it reads labelled texts of its own, for the dictionary alone"
RUNS_MUCH = "it runs the model many times a latent, and has nulls of its own"


@dataclass(frozen=True)
class NullInputs:
    """What nulls are made from.

    Attributes:
        coder: the dictionary. sample: (n, d_in), of what is read, the first evaluated tokens. A
            null that is fitted to it is, if anything, flattered.
        l0: the dictionary's on that sample.
        world, frequent: the world, and its most frequent features; None where there is none.
    """

    coder: Evaluable
    sample: Tensor
    l0: float
    seed: int = 0
    world: World | None = None
    frequent: Tensor | None = None


class NullRow(NamedTuple):
    """A row of the registry.

    Attributes:
        how, keeps, destroys: how it is made, what it has of the dictionary, what it has not.
        make: gives the null; None where it must be trained.
        needs: "one place": the dictionary writes what it reads; "world": the truth is known.
    """

    how: str
    keeps: str
    destroys: str
    make: Callable[[NullInputs], Any] | None = None
    needs: Literal["", "one place", "world"] = ""


def _at_l0(rows: Tensor, given: NullInputs, *, is_signed: bool) -> Directions:
    return Directions.at_l0(rows.to(given.sample), given.sample, given.l0, is_signed=is_signed)


def _random(given: NullInputs) -> Directions:
    rows = random_directions(given.coder.d_sae, given.coder.d_in, given.seed)
    return _at_l0(rows, given, is_signed=False)


def _pca(given: NullInputs) -> Directions:
    rows = principal_components(given.sample, given.coder.d_sae)
    return _at_l0(rows, given, is_signed=True)


def _identity(given: NullInputs) -> Directions:
    return _at_l0(torch.eye(given.coder.d_in), given, is_signed=True)


def _oracle(given: NullInputs) -> TrueDictionary:
    assert given.world is not None
    assert given.frequent is not None
    return TrueDictionary(given.world, given.frequent)


NULLS: Mapping[str, NullRow] = {
    "shuffled": NullRow(
        "each token has the code of another one, a permutation of all evaluated tokens",
        "L0, firing rates, magnitudes, the decoder",
        "which token a code belongs to",
        lambda given: ShuffledCodes(given.coder),
    ),
    "permuted": NullRow(
        "latents write one another's decoder rows",
        "the codes, the set of decoder rows",
        "which code belongs to which direction",
        lambda given: PermutedDecoder(given.coder, given.seed),
    ),
    "random": NullRow(
        "random unit directions about the mean, the largest projections at the dictionary's L0",
        "the number of latents, L0",
        "all that was learnt",
        _random,
        "one place",
    ),
    "pca": NullRow(
        "principal components of the first evaluated tokens, the largest at the dictionary's L0",
        "L0, the covariance of the activations",
        "all that is not covariance; more latents than dimensions",
        _pca,
        "one place",
    ),
    "identity": NullRow(
        "the axes of the activations about their mean, the largest at the dictionary's L0",
        "L0",
        "all that was learnt; more latents than dimensions",
        _identity,
        "one place",
    ),
    "oracle": NullRow(
        "the most frequent true features of a world with their true codes",
        "the number of latents",
        "nothing: it is the truth",
        _oracle,
        "world",
    ),
    "frozen": NullRow(
        "an encoder trained with a frozen random decoder: `sae train CONFIG "
        "--train.freeze_decoder --train.step autograd --run.folder runs/frozen`",
        "the number of latents, the training of the encoder",
        "learnt directions",
    ),
    "reinitialised": NullRow(
        "the same coder trained on the model with the weights it has before its own training: "
        "`sae train CONFIG --model.reinitialised 0 --run.folder runs/reinitialised`",
        "the coder, its training, the text",
        "what the model learnt",
    ),
}


def checked_nulls(names: Iterable[str]) -> tuple[str, ...]:
    """Return `names` without repeats: rows of NULLS that can be made, and paths that exist.

    Errors: ValueError for one that is neither, with the near name, or with how to train it.
    """
    given = tuple(dict.fromkeys(names))
    for name in given:
        if Path(name).exists() and name not in NULLS:
            continue
        if name not in NULLS:
            near = difflib.get_close_matches(name, NULLS, 1)
            hint = f"Did you mean {near[0]!r}?" if near else "Choose among them."
            raise ValueError(
                f"every null must be one of {list(NULLS)}, or the path of a dictionary; got "
                f"{name!r}. {hint}"
            )
        if NULLS[name].make is None:
            raise ValueError(
                f"the null {name!r} must be trained, and then be named by its path; got the bare "
                f"name. It is {NULLS[name].how}."
            )
    return given


def require_possible(names: Iterable[str], coder: Evaluable, is_world: bool) -> None:
    """Refuse nulls that this dictionary, or these data, cannot have.

    Errors: ValueError.
    """
    for name in names:
        needs = NULLS[name].needs
        if needs == "one place" and coder.sites.writes is not None:
            raise ValueError(
                f"the null {name!r} must be of a dictionary that writes what it reads; this one "
                "writes elsewhere. Use 'shuffled' or 'permuted'."
            )
        if needs == "world" and not is_world:
            raise ValueError(
                f"the null {name!r} must have a world whose features are known; here there is "
                "none. Leave it out."
            )


def evals_of_nulls(
    names: Iterable[EvalName], settings: EvalConfig
) -> tuple[tuple[EvalName, ...], dict[str, str]]:
    """Return the evals that nulls are given too, and why the dearest are left out."""
    dear: dict[EvalName, str] = {"interventions": RUNS_MUCH}
    if settings.judge != FREE_JUDGE:
        dear["autointerp"] = ASKS_MUCH
    dear |= {name: READS_OTHERS for name in names if EVALS[name].reads == "labelled"}
    left_out = {str(name): dear[name] for name in names if name in dear}
    return tuple(name for name in names if name not in dear), left_out


def short_name(path: str, taken: Iterable[str]) -> str:
    """Return what a null that is a path is called: its folder, or the path where that is taken."""
    parts = [part for part in Path(path).parts if part not in ("/", "final")]
    name = parts[-1] if parts else path
    return path if name in (*NULLS, *taken) and name not in ("frozen", "reinitialised") else name
