"""Targeted perturbation of concepts that rules name: does ablating a concept's latents remove it?

For each concept c of tokens (`sae.evals.concepts`: digits, capitals, quotes, code, languages, …) a
probe on the activation that is written says whether the token is of c. The n latents whose mean is
larger by most on tokens of c than on others are ablated with the error kept, which takes
Σ_{k in S_c} z_k d_k from x, and
    concept_tpp_n = mean over c of what probe c loses, less what the others lose (`targeted`)
Probes and latents are found on documents of half 0, accuracies are of half 1. Baselines: the
difference of means between tokens of c and others, and the principal component nearest to it,
projected out; a random direction; a random latent.
No forward of the model is run: the probe reads where the latents write.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.blocks import N_BLOCKS, block_of
from sae.evals.concepts import concepts_of_contexts
from sae.evals.intervening.sample import ContextSample, Tokens
from sae.evals.targeted import Hits, Probes
from sae.stream.vocabulary import token_texts

SIZES = (1, 5)
MIN_TOKENS = 32
N_COMPONENTS = 8


def tokens_with_concepts(sample: ContextSample, tokenizer: object) -> Tensor:
    """Return which concepts each unmasked token of the sample is of, (n, concepts) bool."""
    ids = torch.cat([row.tokens for row in sample.rows]).unique().tolist()
    texts = dict(zip(ids, token_texts(tokenizer, ids), strict=True))
    found = [
        concepts_of_contexts(row.tokens[None], row.document_ids[None], texts)[0, row.kept]
        for row in sample.rows
    ]
    return torch.cat(found)


class ConceptPerturbation:
    """Probes, chosen latents and what each change takes from the probes' scores.

    Args:
        written: (n, d_out), what the tokens hold where the coder writes. directions: (d_sae,
            d_out). is_on: (n, concepts).
    """

    def __init__(
        self, tokens: Tokens, written: Tensor, directions: Tensor, is_on: Tensor, seed: int
    ) -> None:
        finds, tries = tokens.halves == 0, tokens.halves == 1
        usable = torch.stack([_has_both(is_on[half]) for half in (finds, tries)]).all(0)
        self.n_concepts = int(usable.sum())
        if self.n_concepts < 2:
            return
        is_on = is_on[:, usable]
        probes = Probes(written[finds], is_on[finds])
        blocks = block_of(tokens.document_ids[tries])
        self.present = torch.zeros(N_BLOCKS, dtype=torch.bool)
        self.present[blocks] = True
        self.hits = Hits(probes.scores(written[tries]), is_on[tries], blocks)
        code = [Latents(*(part[half] for part in tokens.code)) for half in (finds, tries)]
        contrast = _contrast(code[0], probes.on_less_off, len(directions))
        spread = written[finds] - probes.mean
        self.changes = _taken_by_latents(probes, contrast, code[1], directions, seed)
        self.changes |= _taken_along(probes, spread, written[tries], seed)

    def statistics(self, weights: Tensor) -> dict[str, Tensor]:
        """Return every metric for weights (r, blocks), (r) each."""
        return {
            "concept_probe_accuracy": self.hits.accuracy(weights),
            **self.hits.gaps(weights, self.changes),
        }


def _has_both(is_on: Tensor) -> Tensor:
    n = is_on.sum(0)
    return (n >= MIN_TOKENS) & (len(is_on) - n >= MIN_TOKENS)


def _contrast(code: Latents, on_less_off: Tensor, d_sae: int) -> Tensor:
    """Return each latent's mean on a concept's tokens less that on others, (concepts, d_sae)."""
    found = torch.zeros(on_less_off.shape[1], d_sae)
    flat = code.indices.flatten()
    for row, weights in zip(found, on_less_off.T, strict=True):
        row.index_add_(0, flat, (code.values * weights[:, None]).flatten())
    return found


def _taken_by_latents(
    probes: Probes, contrast: Tensor, code: Latents, directions: Tensor, seed: int
) -> dict[str, Tensor]:
    """Return what ablating latents takes from the probes' scores, (concepts, n, concepts) each."""
    generator = torch.Generator().manual_seed(seed)
    n, d_sae = contrast.shape
    chosen = {
        f"concept_tpp_{size}": contrast.topk(min(size, d_sae), dim=1).indices for size in SIZES
    }
    chosen["concept_tpp_random_latent"] = torch.randint(d_sae, (n, 1), generator=generator)
    read = directions @ probes.probes
    return {
        name: torch.stack([_activations(code, row) @ read[row] for row in latents])
        for name, latents in chosen.items()
    }


def _taken_along(probes: Probes, spread: Tensor, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Return what projecting directions out of x takes, (concepts, n, concepts) each.

    Shapes: spread (·, d), activations about their mean, of which the components are.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    random = torch.randn(probes.difference.shape, generator=generator)
    rows = {
        "concept_tpp_difference": probes.difference,
        "concept_tpp_pca": _nearest_components(spread, probes.difference),
        "concept_tpp_random_direction": random,
    }
    return {name: probes.along(directions, x) for name, directions in rows.items()}


def _nearest_components(centred: Tensor, differences: Tensor) -> Tensor:
    """Return for each difference the one of the largest components that lies along it most."""
    spectrum = torch.linalg.eigh(centred.double().T @ centred.double())
    components = spectrum.eigenvectors.T.flip(0)[:N_COMPONENTS].float()
    return components[(differences @ components.T).abs().argmax(1)]


def _activations(code: Latents, latents: Tensor) -> Tensor:
    """Return the activations of some latents, (n, len(latents))."""
    columns = [code.values.where(code.indices == k, 0.0).sum(1) for k in latents.tolist()]
    return torch.stack(columns, 1)
