"""Downstream: what identity and ablation must score, which positions count, equal masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from eval_stand_ins import FunctionCoder, assert_same

from sae.evals import downstream
from sae.evals.downstream import Downstream, counted_positions, position_losses
from sae.evals.evaluable import Evaluable
from sae.evals.inputs import rows_of
from sae.evals.interface import EvalSetup, ModelBatch, Undefined
from sae.evals.replacing import Places
from sae.stream.contexts import Contexts
from sae.stream.hookpoints import capture, edit

D = 32
SETUP = EvalSetup(D, D, n_resamples=50)


@pytest.fixture
def activations(lm, hookpoint, contexts):
    return capture(lm.module, [hookpoint], contexts.tokens)[hookpoint]


@pytest.fixture
def batch_with(lm, hookpoint, contexts, activations):
    """Makes the ModelBatch of a coder that reconstructs by a function."""
    mean = activations[contexts.is_kept].mean(0)

    def make(reconstruct, **changes) -> ModelBatch:
        coder = Evaluable(FunctionCoder(reconstruct), D)
        return replace(ModelBatch(coder, lm, Places((hookpoint,)), contexts, mean), **changes)

    return make


def computed(batch: ModelBatch) -> dict:
    accumulator = Downstream(SETUP)
    accumulator.update(batch)
    return accumulator.compute()


def test_identity_loses_nothing(batch_with):
    found = computed(batch_with(lambda x: x))
    assert found["delta_ce"] == 0
    assert found["delta_ce_p99"] == 0
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["top1_agreement"] == 1
    # Ablating a random model may or may not hurt; where it does, identity recovers all of it.
    for name in ("loss_recovered_zero", "loss_recovered_mean"):
        assert found[name] == 1 or isinstance(found[name], Undefined)


def with_guessed_targets(lm, contexts: Contexts) -> Contexts:
    """Contexts whose every next token is the model's own guess, so that any change costs loss."""
    tokens = contexts.tokens.clone()
    with torch.no_grad():
        for position in range(1, tokens.shape[1]):
            guess = lm.module(tokens[:, :position]).logits[:, -1].argmax(-1)
            is_bos = ~contexts.is_kept[:, position]
            tokens[:, position] = torch.where(is_bos, tokens[:, position], guess)
    return Contexts(tokens, contexts.document_ids, contexts.is_kept)


def test_ablation_as_reconstruction_recovers_exactly_nothing(batch_with, lm, contexts):
    changes = {"contexts": with_guessed_targets(lm, contexts)}
    identity = computed(batch_with(lambda x: x, **changes))
    assert identity["loss_recovered_zero"] == identity["loss_recovered_mean"] == 1
    zero = computed(batch_with(torch.zeros_like, **changes))
    assert zero["loss_recovered_zero"] == 0
    mean = batch_with(lambda x: x).mean
    assert computed(batch_with(mean.expand_as, **changes))["loss_recovered_mean"] == 0


def test_harmless_ablation_leaves_recovery_undefined(batch_with, lm, hookpoint, contexts):
    def ablate(activation):
        padded = torch.zeros(*contexts.tokens.shape, D)
        padded[:, : activation.shape[1]] = activation
        padded[contexts.is_kept] = 0
        return padded[:, : activation.shape[1]]

    with edit(lm.module, hookpoint, ablate):
        guessed = with_guessed_targets(lm, contexts)
    found = computed(batch_with(lambda x: x, contexts=guessed))
    assert found["ce_ablated_zero"] < found["ce_clean"]
    assert "does not raise the loss" in found["loss_recovered_zero"].reason


def test_equals_a_reference_that_edits_by_hand(batch_with, lm, contexts):
    """Losses from an independent splice into the second layer's output."""
    batch = batch_with(lambda x: 0.5 * x)
    is_kept = contexts.is_kept

    def splice(_module, _args, output):
        return torch.where(is_kept[..., None], 0.5 * output, output)

    logits = {"clean": lm.module(contexts.tokens).logits}
    handle = lm.module.get_submodule("model.layers.1").register_forward_hook(splice)
    try:
        logits["spliced"] = lm.module(contexts.tokens).logits
    finally:
        handle.remove()
    log_p, log_q = (logits[name][:, :-1].double().log_softmax(-1) for name in logits)
    counts = is_kept[:, :-1] & is_kept[:, 1:]
    targets = contexts.tokens[:, 1:][counts]
    found = computed(batch)
    assert found["ce_clean"] == pytest.approx(float(F.nll_loss(log_p[counts], targets)), rel=1e-6)
    assert found["ce_spliced"] == pytest.approx(float(F.nll_loss(log_q[counts], targets)), rel=1e-6)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[counts].mean()
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4)


def test_positions_count_only_within_a_document_and_outside_the_mask():
    document_ids = torch.tensor([[4, 4, 4, 5, 5, 5, 6, -1]])
    is_kept = torch.tensor([[False, True, True, False, True, True, True, False]])
    contexts = Contexts(torch.arange(8)[None], document_ids, is_kept)
    assert counted_positions(contexts, is_kept.flatten()).tolist() == [1, 4]
    outlier = is_kept.flatten() & (torch.arange(8) != 2)
    assert counted_positions(contexts, outlier).tolist() == [1, 4]
    outlier = is_kept.flatten() & (torch.arange(8) != 1)
    assert counted_positions(contexts, outlier).tolist() == [4]
    is_kept[0, 5] = False
    assert counted_positions(contexts, is_kept.flatten()).tolist() == [1]


def test_masked_tokens_keep_their_activation_in_every_pass(batch_with, contexts):
    nothing_kept_but_last = torch.zeros_like(contexts.is_kept)
    nothing_kept_but_last[:, -1] = True
    unmasked_targets = replace(contexts, is_kept=nothing_kept_but_last)
    losses = position_losses(batch_with(torch.zeros_like), unmasked_targets)
    assert len(losses["n"]) == 0

    late = contexts.is_kept & (torch.arange(24) >= 14)
    clean_before = replace(contexts, is_kept=late)
    found = position_losses(batch_with(torch.zeros_like), clean_before)
    full = position_losses(batch_with(torch.zeros_like), contexts)
    is_late = counted_positions(contexts, contexts.is_kept.flatten()) % 24 >= 14
    torch.testing.assert_close(found["clean"], full["clean"][is_late])
    assert not torch.allclose(found["zero"], full["zero"][is_late])


def test_norm_outliers_are_masked_alike(batch_with, activations, contexts):
    largest = float(activations[contexts.is_kept].norm(dim=-1).max())
    all_kept = computed(batch_with(torch.zeros_like, max_norm=2 * largest))
    assert_same(all_kept, computed(batch_with(torch.zeros_like)), rel=0)
    accumulator = Downstream(SETUP)
    accumulator.update(batch_with(torch.zeros_like, max_norm=0.999 * largest))
    assert 0 < accumulator.seen.n_tokens < 12 * 20


def test_nothing_to_count_is_undefined(batch_with, contexts):
    masked = replace(contexts, is_kept=torch.zeros_like(contexts.is_kept))
    found = computed(batch_with(lambda x: x, contexts=masked))
    assert isinstance(found["ce_clean"], Undefined)
    assert isinstance(found["delta_ce_p50"], Undefined)


def test_split_merge_and_memory_bound_do_not_matter(batch_with, contexts, monkeypatch):
    whole = computed(batch_with(lambda x: 0.5 * x))
    one, other = Downstream(SETUP), Downstream(SETUP)
    for accumulator, rows in ((one, slice(5, 12)), (other, slice(0, 5))):
        part = rows_of(contexts, rows)
        accumulator.update(batch_with(lambda x: 0.5 * x, contexts=part))
    one.merge(other)
    assert_same(one.compute(), whole, rel=1e-5)
    assert one.seen.n_documents == 24

    monkeypatch.setattr(downstream, "LOGIT_ELEMENTS", 1)
    monkeypatch.setattr(downstream, "CHUNK_ELEMENTS", 1000)
    assert_same(computed(batch_with(lambda x: 0.5 * x)), whole, rel=1e-5)


def test_percentiles_are_right_to_half_a_bin(batch_with):
    batch = batch_with(lambda x: 0.2 * x)
    losses = position_losses(batch, batch.contexts)
    delta = losses["spliced"] - losses["clean"]
    found = computed(batch)
    for p in (50, 95, 99):
        # The smallest loss that at least p% of the tokens do not exceed.
        expected = delta.sort().values[-(-len(delta) * p // 100) - 1]
        assert found[f"delta_ce_p{p}"] == pytest.approx(float(expected), abs=0.00051)
