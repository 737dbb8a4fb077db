"""Interventions: exact on a linear model, the right latent above its nulls, the error kept."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from eval_stand_ins import assert_same
from linear_lm import N_KEYS, PLACE, D, KeyValueCoder, key_value_parts, key_value_text
from torch import Tensor
from toy_worlds import gaussian, unit

from sae.coder.coder import SparseCoder
from sae.coder.latents import Latents
from sae.coder.sites import Sites
from sae.config import CoderConfig, EvalConfig
from sae.evals import evaluate
from sae.evals.evaluable import Evaluable
from sae.evals.interface import ContextBatch, EvalSetup, Undefined
from sae.evals.intervening.ablating import Stage, ablation
from sae.evals.intervening.interventions import (
    LABELS,
    MANY_PLACES,
    NO_LATENT,
    NO_MODEL,
    NO_WORDS,
    Interventions,
)
from sae.evals.intervening.running import Forwards, can_share
from sae.evals.intervening.sample import ContextSample, tokens_of
from sae.evals.intervening.steering import MATCHED_KL, Steered, at_matched_kl, monotone_range
from sae.evals.intervening.targets import find_targets
from sae.evals.replacing import Places, changed, logits_of
from sae.stream.contexts import CapturedContexts
from sae.stream.hookpoints import Hookpoint, find_hookpoint

SETTINGS = EvalConfig(intervention_latents=16)
LM, CODER = key_value_parts()
TEXT = key_value_text(LM)


def setup_of(coder: Evaluable, settings: EvalConfig = SETTINGS) -> EvalSetup:
    return EvalSetup(D, coder.d_sae, 0, 50, coder=coder, settings=settings)


def batch_of(coder: Evaluable, rows: slice = slice(None), **given: Any) -> ContextBatch:
    """Return some contexts with their code."""
    parts = (getattr(TEXT, f.name)[rows] for f in dataclasses.fields(CapturedContexts))
    contexts = CapturedContexts(*parts)
    kept = contexts.is_kept.flatten().nonzero()[:, 0]
    latents, _ = coder.encode_decode(contexts.activations.flatten(0, 1)[kept])
    return ContextBatch(contexts, latents, kept, **{"lm": LM, "places": PLACE, **given})


def ran(coder: Evaluable = CODER, settings: EvalConfig = SETTINGS) -> Interventions:
    eval_ = Interventions(setup_of(coder, settings))
    eval_.update(batch_of(coder))
    return eval_


def stage_of(coder: Evaluable = CODER) -> Stage:
    sample = ContextSample(10_000, 0)
    sample.update(batch_of(coder))
    return Stage(LM, PLACE, coder, sample, tokens_of(sample))


def with_decoder(change: Callable[[Tensor], Tensor]) -> Evaluable:
    """Return the dictionary with other decoder rows and the same codes."""
    given: Any = CODER.coder
    return Evaluable(KeyValueCoder(given.embedding, change(given.W_dec)), D)


@pytest.fixture(scope="module")
def right() -> dict[str, Any]:
    return ran().compute()


@pytest.fixture(scope="module")
def permuted() -> dict[str, Any]:
    return ran(with_decoder(lambda rows: rows.roll(5, 0))).compute()


def test_ablating_with_the_error_kept_takes_away_what_the_latent_wrote():
    held, latent = stage_of().tokens, 3
    fires = (held.code.indices == latent).any(1) & (held.code.values != 0).any(1)
    x, code = held.x[fires][:5], Latents(*(part[fires][:5] for part in held.code))
    change = ablation(CODER, x, code, latent)
    z = code.values.where(code.indices == latent, 0.0).sum(1)
    torch.testing.assert_close(change, -z[:, None] * CODER.directions()[latent])

    tokens = TEXT.tokens[:1]
    changes = torch.zeros(tokens.numel(), D)
    changes[4:9] = change
    clean = logits_of(LM, tokens)
    with changed(LM, PLACE, [changes]):
        ablated = logits_of(LM, tokens)
    module: Any = LM.module
    exact = (changes @ module.head.weight.T)[None]
    torch.testing.assert_close(ablated - clean, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shares", [False, True])
def test_a_dose_of_nothing_changes_nothing(shares):
    tokens = TEXT.tokens[:3]
    changes = torch.zeros(2, tokens.numel(), D)
    changes[1, 5] = 1.0
    forwards = Forwards(LM, PLACE, tokens, torch.arange(tokens.numel()), shares=shares)
    same, moved = forwards.under(changes)
    assert torch.equal(forwards.clean, logits_of(LM, tokens).flatten(0, 1).log_softmax(-1))
    assert torch.equal(same, forwards.clean)
    assert not torch.equal(moved, same)
    assert torch.equal(moved[:5], same[:5])


PATHS = ("model.layers.0", "model.layers.2", "model.layers.1.mlp", "model.layers.2.mlp:in")


@pytest.mark.parametrize("path", PATHS)
def test_what_lies_before_the_place_is_run_once_and_nothing_else_changes(lm, path):
    """Against whole forwards in float64, several variants at once and one after the other."""
    exact = dataclasses.replace(lm, module=copy.deepcopy(lm.module).double())
    places = Places((find_hookpoint(exact.module, path),))
    tokens = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    changes = gaussian(45, 96, 32, seed=3).double()
    counted = torch.tensor([3, 50, 51, 95])
    forwards = Forwards(exact, places, tokens, counted, shares=True)
    with counting(exact.module.model.layers) as runs:
        found = forwards.under(changes)
    whole = Forwards(exact, places, tokens, counted, shares=False)
    torch.testing.assert_close(forwards.clean, whole.clean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, whole.under(changes), rtol=1e-12, atol=1e-12)
    at = int(path.split(".")[2])
    assert runs[:at] == [0] * at
    assert runs[at + 1 :] == [3] * (3 - at)  # 21 variants of 96 tokens at once
    with changed(exact, places, [changes[44]]):
        last = logits_of(exact, tokens).flatten(0, 1)[counted].log_softmax(-1)
    torch.testing.assert_close(found[44], last, rtol=1e-12, atol=1e-12)
    assert can_share(exact, places, tokens[:2, :4], 32)


@contextmanager
def counting(layers: Any) -> Iterator[list[int]]:
    """Count how often each layer's attention runs."""
    runs = [0] * len(layers)

    def count(number: int) -> Callable[..., None]:
        def add(*_: Any) -> None:
            runs[number] += 1

        return add

    hooks = [
        layer.self_attn.register_forward_pre_hook(count(number))
        for number, layer in enumerate(layers)
    ]
    yield runs
    for hook in hooks:
        hook.remove()


def test_a_model_whose_layers_share_more_than_their_outputs_is_run_whole(lm):
    """Layer 3 reads what layer 0 left behind; begun at layer 2 it would read an old one."""
    module: Any = copy.deepcopy(lm.module)
    left: list[Tensor] = []

    def leave(_module: Any, _args: Any, output: Tensor) -> None:
        left[:] = [output[-1:]]

    def take(_module: Any, args: Any) -> Any:
        return (args[0] + left.pop(), *args[1:])

    first, last = module.model.layers[0].self_attn, module.model.layers[3]
    first.register_forward_hook(lambda m, a, output: leave(m, a, output[0]))
    last.register_forward_pre_hook(take)
    places = Places((find_hookpoint(module, "model.layers.2"),))
    stateful = dataclasses.replace(lm, module=module)
    tokens = torch.arange(3, 11).reshape(2, 4)
    assert not can_share(stateful, places, tokens, 32)
    assert can_share(lm, places, tokens, 32)


def test_a_planted_key_value_latent_is_above_its_nulls(right):
    assert right["key_value_auroc"] > 0.95
    assert abs(right["key_value_auroc_random_latent"] - 0.5) < 0.1
    assert right["steering_gain/low"] > right["steering_gain_random_latent/high"]
    assert right["steering_gain/low"] > right["steering_gain_pca/high"]
    assert abs(right["steering_gain_random_direction"]) < 0.15 * right["steering_gain"]
    assert right["ablation_target_drop"] > 5 * abs(right["ablation_target_drop_random_direction"])
    assert right["ablation_kl"] > 2 * right["ablation_kl_random_direction"]
    assert right["dose_slope"] > 0
    assert right["dose_monotone"] == 1
    assert right["intervention_testable"] > 0.9


def test_a_permuted_decoder_is_seen(right, permuted):
    assert abs(permuted["key_value_auroc"] - 0.5) < 0.1
    for name in ("steering_gain", "ablation_target_drop", "ablation_kl"):
        assert permuted[f"{name}/high"] < 0.3 * right[f"{name}/low"], name
    for name in ("steering_gain_difference", "steering_gain_random_direction"):
        assert permuted[name] == pytest.approx(right[name]), name


def test_the_difference_in_means_knows_the_target(right):
    assert right["steering_gain_difference"] > 3 * abs(right["steering_gain_random_latent"])


def test_followers_come_from_one_half_and_are_tried_on_the_other():
    stage = stage_of()
    targets = find_targets(stage.tokens, stage.tokens.x, N_KEYS, 60, 100, 64, 0)
    assert targets is not None
    for latent, shares in zip(targets.latents.tolist(), targets.followers, strict=True):
        assert shares[N_KEYS + latent] == 1
    assert targets.share_testable == len(targets.latents) / N_KEYS
    torch.testing.assert_close(targets.contrasts.sum(1), torch.zeros(len(targets.latents)))
    halves = stage.tokens.halves
    documents = [set(stage.tokens.document_ids[halves == half].tolist()) for half in (0, 1)]
    assert not documents[0] & documents[1]


def test_small_doses_respond_by_the_first_derivative():
    """The response of y to a small dose is its contrast of W_U d, mean over tokens alike."""
    stage = stage_of()
    targets = find_targets(stage.tokens, stage.tokens.x, N_KEYS, 60, 4, 64, 0)
    assert targets is not None
    direction = unit(gaussian(1, D, seed=9))
    steered = Steered(stage, dataclasses.replace(targets, scale=1e-2), direction)
    module: Any = LM.module
    exact = 1e-2 * (targets.contrasts @ (module.head.weight @ direction[0])).double()
    torch.testing.assert_close(steered.response[0, -1], exact, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(steered.response[0, 0], exact / 8, rtol=5e-2, atol=1e-5)


def test_gain_at_matched_kl_does_not_depend_on_strength():
    kl = torch.tensor([0.01, 0.04, 0.16, 0.64]).double()
    response = torch.tensor([[1.0], [2.0], [4.0], [8.0]]).double()
    exact = 10 * MATCHED_KL**0.5
    assert at_matched_kl(kl, response).item() == pytest.approx(exact)
    weak = at_matched_kl(kl / 1e4, response / 100).item()
    assert weak == pytest.approx(exact)
    assert at_matched_kl(torch.zeros(4).double(), response * 0).item() == 0


def test_the_monotone_range_ends_where_the_response_turns():
    rows = [[1, 2, 3, 4], [1, 2, 1, 4], [-1, 2, 3, 4]]
    found = monotone_range(torch.tensor(rows, dtype=torch.float64))
    assert found.tolist() == [1.0, 0.25, 0.0]


def test_parts_in_any_order_give_the_same():
    first, second = Interventions(setup_of(CODER)), Interventions(setup_of(CODER))
    first.update(batch_of(CODER, slice(60, 96)))
    second.update(batch_of(CODER, slice(30, 60)))
    second.update(batch_of(CODER, slice(0, 30)))
    first.merge(second)
    assert_same(first.compute(), ran().compute(), rel=1e-5)
    assert first.seen.n_documents == 96


def test_only_the_contexts_of_lowest_number_are_kept():
    whole, parts = ContextSample(300, 0), ContextSample(300, 0)
    whole.update(batch_of(CODER))
    for start in range(0, 96, 10):
        parts.update(batch_of(CODER, slice(start, start + 10)))
    assert [row.number for row in parts.rows] == [row.number for row in whole.rows]
    assert 300 <= whole.seen.n_tokens < 300 + 24


def test_another_seed_tries_other_contexts():
    one, other = ContextSample(300, 0), ContextSample(300, 3)
    for sample in (one, other):
        sample.update(batch_of(CODER))
    assert {row.number for row in one.rows} != {row.number for row in other.rows}
    assert len(tokens_of(other).halves.unique()) == 2


def test_the_setting_says_how_many_latents():
    few = ran(settings=EvalConfig(intervention_latents=5))
    scores = few.arrays()["latents/steering_gain"]
    assert int(scores.isfinite().sum()) == 5
    assert isinstance(few.compute()["steering_gain/low"], Undefined)
    with pytest.raises(ValueError, match="intervention_latents"):
        EvalConfig(intervention_latents=0)


def test_scores_by_latent_are_those_of_the_latents_drawn(right):
    eval_ = ran()
    eval_.compute()
    scores = eval_.arrays()
    assert int(scores["latents/key_value_auroc"].isfinite().sum()) == 16
    mean = float(scores["latents/steering_gain"].nanmean())
    assert mean == pytest.approx(right["steering_gain"], rel=1e-5)


def test_what_cannot_be_intervened_on_is_said(right):
    assert isinstance(right["concept_tpp_1"], Undefined)
    assert right["concept_tpp_1"].reason == NO_WORDS
    nothing = Interventions(setup_of(CODER))
    nothing.update(batch_of(CODER, lm=None, places=None))
    assert nothing.compute() == dict.fromkeys(LABELS, Undefined(NO_MODEL))
    assert nothing.arrays() == {}
    place = Hookpoint("place")
    many = Interventions(setup_of(CODER))
    many.update(batch_of(CODER, places=Places((place, place))))
    assert many.compute() == dict.fromkeys(LABELS, Undefined(MANY_PLACES))
    silent = Interventions(setup_of(CODER))
    silent.update(batch_of(CODER, slice(0, 1)))
    found = silent.compute()
    assert found["steering_gain"] == Undefined(NO_LATENT)
    assert found["intervention_testable"] == 0


def test_on_a_transformer_with_words(lm, hookpoint, contexts):
    """Concepts, a real read-out and several layers behind the place."""
    coder = SparseCoder.create(32, CoderConfig(d_sae=64, k=8))
    settings = EvalConfig(intervention_latents=3)
    found = evaluate(
        coder,
        [contexts],
        lm=lm,
        hookpoint=hookpoint,
        names=["interventions"],
        n_resamples=20,
        settings=settings,
    )
    assert set(LABELS) <= set(found.metrics)
    assert found.metrics["ablation_kl"] is not None
    assert found.metrics["ablation_kl"] > 0
    assert 0 < found.metrics["key_value_auroc"] < 1  # type: ignore[operator]
    assert found.evals["interventions"].n_tokens == int(contexts.is_kept.sum())


def test_a_transcoder_is_changed_where_it_writes(lm, contexts):
    cfg = CoderConfig(d_sae=64, k=8, site="transcoder")
    coder = SparseCoder.create(32, cfg, sites=Sites.of(cfg, (32, 32)))
    found = evaluate(
        coder,
        [contexts],
        lm=lm,
        hookpoint="model.layers.1.mlp:in",
        target="model.layers.1.mlp",
        names=["interventions"],
        n_resamples=20,
        settings=EvalConfig(intervention_latents=3),
    )
    assert found.metrics["steering_gain"] is not None
