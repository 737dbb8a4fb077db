"""What is collected of every latent, against a dense computation."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.analysis import Atlas, OpenedRun
from sae.analysis.features import FeatureCollector, Features, histogram_edges
from sae.analysis.logit_effects import logit_effects
from sae.analysis.neighbours import nearest_latents
from sae.analysis.strongest import KEY_TOKENS, NO_TOKEN
from sae.coder import SparseCoder
from sae.config import CoderConfig
from sae.evals.readout import find_readout
from sae.stream.contexts import CapturedContexts
from sae.stream.masks import PADDING_DOCUMENT

D_IN, D_SAE, N, T, LEFT, RIGHT = 6, 15, 12, 9, 3, 2


def make_coder() -> SparseCoder:
    return SparseCoder.create(D_IN, CoderConfig(d_sae=D_SAE, k=3), seed=1)


def make_contexts(n: int = N) -> CapturedContexts:
    generator = torch.Generator().manual_seed(4)
    return CapturedContexts(
        tokens=torch.randint(0, 50, (n, T), generator=generator),
        document_ids=torch.arange(n)[:, None].expand(n, T),
        is_kept=torch.rand(n, T, generator=generator) > 0.2,
        activations=torch.randn(n, T, D_IN, generator=generator),
    )


def part(contexts: CapturedContexts, rows: slice) -> CapturedContexts:
    names = ("tokens", "document_ids", "is_kept", "activations")
    return CapturedContexts(**{name: getattr(contexts, name)[rows] for name in names})


def collected(splits: list[int]) -> Features:
    coder, contexts, start = make_coder(), make_contexts(), 0
    collector = FeatureCollector(D_SAE, contexts_per_latent=4, left=LEFT, right=RIGHT)
    for size in [*splits, N - sum(splits)]:
        collector.update(coder, part(contexts, slice(start, start + size)))
        start += size
    return collector.features()


def dense_code() -> torch.Tensor:
    contexts = make_contexts()
    with torch.no_grad():
        return make_coder().encode(contexts.activations) * contexts.is_kept[..., None]


def strongest_of_distinct_texts(code: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """Return one latent's peaks (n, t) by sequence, only the strongest of equal texts, falling."""
    best: dict[tuple[int, ...], float] = {}
    for row, ids in zip(code, tokens, strict=True):
        peak = int(row.argmax())
        text = tuple(ids[max(0, peak - KEY_TOKENS + 1) : peak + 1].tolist())
        if row[peak] > 0:
            best[text] = max(best.get(text, 0.0), float(row[peak]))
    return sorted(best.values(), reverse=True)


def test_counts_and_maxima_are_those_of_the_dense_code():
    features, code = collected([]), dense_code()
    assert torch.equal(features.firing_counts, (code != 0).sum((0, 1)))
    torch.testing.assert_close(features.max_activations, code.amax((0, 1)))
    assert features.n_tokens == int(make_contexts().is_kept.sum())
    assert features.l0 == pytest.approx(float((code != 0).sum()) / features.n_tokens)
    assert torch.equal(features.histogram.sum(1), features.firing_counts)


def test_the_histogram_counts_by_edges():
    features, code, edges = collected([]), dense_code(), histogram_edges()
    for latent in range(D_SAE):
        values = code[..., latent][code[..., latent] != 0].double()
        expected = torch.histogram(values, edges).hist.long()
        assert torch.equal(features.histogram[latent], expected)


def test_contexts_are_each_sequences_strongest_token_with_its_surroundings():
    features, code, tokens = collected([]), dense_code(), make_contexts().tokens
    for latent in range(D_SAE):
        expected = torch.tensor(strongest_of_distinct_texts(code[..., latent], tokens)[:4])
        torch.testing.assert_close(features.peaks[latent][: len(expected)], expected)
        assert torch.isinf(features.peaks[latent][len(expected) :]).all()
        for row in range(len(expected)):
            sequence = int(features.sequence_ids[latent, row])
            peak = int(code[sequence, :, latent].argmax())
            for window, place in enumerate(range(peak - LEFT, peak + RIGHT + 1)):
                is_inside = 0 <= place < T
                token = int(tokens[sequence, place]) if is_inside else NO_TOKEN
                value = float(code[sequence, place, latent]) if is_inside else 0.0
                assert int(features.tokens[latent, row, window]) == token
                assert float(features.activations[latent, row, window]) == pytest.approx(value)


@given(st.lists(st.integers(0, 4), max_size=3))
@settings(max_examples=15, deadline=None)
def test_any_split_into_batches_gives_the_same(splits: list[int]):
    whole, parts = collected([]), collected(splits)
    for name in ("firing_counts", "histogram", "peaks", "sequence_ids", "tokens", "activations"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name


def test_padding_is_not_shown():
    """A context whose document ends is as if it ended there."""
    contexts, n_padding = make_contexts(), 4
    is_padding = torch.arange(T) >= T - n_padding
    padded = replace(
        contexts,
        document_ids=contexts.document_ids.masked_fill(is_padding, PADDING_DOCUMENT),
        is_kept=contexts.is_kept & ~is_padding,
    )
    ended = CapturedContexts(
        *(getattr(padded, field.name)[:, : T - n_padding] for field in fields(padded))
    )
    features = []
    for given_contexts in (padded, ended):
        collector = FeatureCollector(D_SAE, contexts_per_latent=4, left=LEFT, right=RIGHT)
        collector.update(make_coder(), given_contexts)
        features.append(collector.features())
    assert torch.equal(features[0].tokens, features[1].tokens)
    assert torch.equal(features[0].peaks, features[1].peaks)


def test_a_text_that_comes_twice_is_shown_once():
    contexts, coder = make_contexts(4), make_coder()
    twice = CapturedContexts(
        contexts.tokens.repeat(2, 1),
        contexts.document_ids.repeat(2, 1),
        contexts.is_kept.repeat(2, 1),
        contexts.activations.repeat(2, 1, 1) * torch.tensor([1.0] * 4 + [0.9] * 4)[:, None, None],
    )
    with torch.no_grad():
        code = coder.encode(twice.activations) * twice.is_kept[..., None]
    for sizes in ([8], [4, 4], [1, 6, 1]):
        collector, start = FeatureCollector(D_SAE, contexts_per_latent=3), 0
        for size in sizes:
            collector.update(coder, part(twice, slice(start, start + size)))
            start += size
        features = collector.features()
        for latent in range(D_SAE):
            found = features.peaks[latent][features.sequence_ids[latent] >= 0]
            expected = strongest_of_distinct_texts(code[..., latent], twice.tokens)[:3]
            torch.testing.assert_close(found, torch.tensor(expected))


def test_merging_two_passes_is_one_pass():
    coder, contexts = make_coder(), make_contexts()
    first, second = (FeatureCollector(D_SAE, contexts_per_latent=4) for _ in range(2))
    first.update(coder, part(contexts, slice(0, 5)))
    second.update(coder, part(contexts, slice(5, N)))
    first.merge(second)
    whole = FeatureCollector(D_SAE, contexts_per_latent=4)
    whole.update(coder, contexts)
    for name in ("firing_counts", "histogram", "peaks", "sequence_ids", "tokens"):
        assert torch.equal(getattr(first.features(), name), getattr(whole.features(), name)), name


def test_nothing_kept_is_nothing_found():
    contexts = make_contexts()
    silent = CapturedContexts(
        contexts.tokens,
        contexts.document_ids,
        torch.zeros_like(contexts.is_kept),
        contexts.activations,
    )
    collector = FeatureCollector(D_SAE)
    collector.update(make_coder(), silent)
    features = collector.features()
    assert features.n_tokens == 0
    assert features.max_activations.tolist() == [0.0] * D_SAE


def test_neighbours_are_the_largest_cosines():
    W_dec = make_coder().W_dec.detach() * torch.arange(1, D_SAE + 1)[:, None]
    cosines = torch.nn.functional.cosine_similarity(W_dec[:, None], W_dec[None], dim=2)
    cosines.fill_diagonal_(-2)
    expected = cosines.topk(5).values
    for chunk in (4, 100):
        torch.testing.assert_close(nearest_latents(W_dec, chunk=chunk).cosines, expected)


def test_logit_effects_are_the_jacobian_of_the_readout(opened_run: OpenedRun):
    """Moving the residual along d_k moves the logits as said, up to a factor and a shift."""
    model, d = opened_run.lm.module, opened_run.coder.W_dec[:7].detach()
    readout, note = find_readout(model, d.shape[1])
    assert readout is not None
    assert note == ""
    effects = logit_effects(readout, d, n_tokens=4)
    norm, head = model.model.norm, model.get_output_embeddings()
    with torch.no_grad():
        direct = d * norm.weight @ head.weight.T
        z = (direct - direct.mean(1, keepdim=True)) / direct.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(effects.promoted, z.topk(4).values, rtol=1e-4, atol=1e-4)
    low = z.topk(4, largest=False).values
    torch.testing.assert_close(effects.suppressed, low, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(effects.scores, z.amax(1), rtol=1e-4, atol=1e-4)


def test_a_width_that_the_unembedding_does_not_read_is_said(opened_run: OpenedRun):
    readout, note = find_readout(opened_run.lm.module, 99)
    assert readout is None
    assert "99" in note


def test_an_atlas_saves_and_loads(opened_run: OpenedRun, tmp_path: Path):
    atlas = opened_run.atlas
    atlas.save(tmp_path)
    again = Atlas.load(tmp_path)
    assert again.contexts(3) == atlas.contexts(3)
    assert again.promoted(3) == atlas.promoted(3)
    assert torch.equal(again.neighbours.latents, atlas.neighbours.latents)
    with pytest.raises(ValueError, match="sae report RUN"):
        Atlas.load(tmp_path / "nothing")
