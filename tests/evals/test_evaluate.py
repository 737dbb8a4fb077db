"""`evaluate` from end to end: what it accepts, refuses, writes and shows."""

from __future__ import annotations

import json

import pytest
import torch
from eval_stand_ins import FunctionCoder, assert_same

from sae.coder import SparseCoder, with_layer_norm
from sae.config import CoderConfig
from sae.evals import (
    EVALS,
    EvalRow,
    activation_contexts,
    evaluable,
    evaluate,
    read_results,
    table_rows,
    write_results,
)
from sae.evals.inputs import limited, rows_of
from sae.evals.interface import Seen
from sae.stream.hookpoints import capture

D = 32


@pytest.fixture
def coder():
    cfg = CoderConfig(d_sae=64, k=8)
    return SparseCoder.create(D, cfg, metadata={"hook_name": "model.layers.1"})


WITHIN_MINUTES = {
    name for name, row in EVALS.items() if row.reads != "world" and row.cost != "minutes"
}


@pytest.fixture
def results(coder, lm, hookpoint, contexts):
    return evaluate(coder, [contexts], lm=lm, hookpoint=hookpoint, n_resamples=50)


def gaussian(n: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def test_all_evals_answer_with_l0_and_provenance_beside(results, contexts):
    assert set(results.evals) == WITHIN_MINUTES
    assert results.metrics["l0"] == results.provenance["l0"] == 8
    assert results.provenance["hookpoint"] == "model.layers.1"
    assert results.evals["sparsity"].n_tokens == int(contexts.is_kept.sum())
    assert results.evals["downstream"].n_tokens == 24 * 10
    assert results.evals["downstream"].n_documents == 24
    assert results.metrics["fvu/low"] < results.metrics["fvu"] < results.metrics["fvu/high"]
    assert all(record.seconds > 0 for record in results.evals.values())


def test_numbers_are_those_of_the_captured_activations(results, coder, lm, hookpoint, contexts):
    x = capture(lm.module, [hookpoint], contexts.tokens)[hookpoint][contexts.is_kept]
    with torch.no_grad():
        error = (x - coder(x)).double().pow(2).sum()
    fvu = error / (x.double() - x.double().mean(0)).pow(2).sum()
    assert results.metrics["fvu"] == pytest.approx(float(fvu), rel=1e-6)


def test_a_coder_with_a_layer_norm_is_evaluated_in_raw_units(coder, lm, hookpoint, contexts):
    """Its fvu and what is spliced are those of coder(x): a code alone does not say them."""
    normed = with_layer_norm(coder)
    names, place = ["reconstruction", "downstream"], {"lm": lm, "hookpoint": hookpoint}
    found = evaluate(normed, [contexts], names=names, n_resamples=2, **place)
    x = capture(lm.module, [hookpoint], contexts.tokens)[hookpoint][contexts.is_kept]
    with torch.no_grad():
        error = (x - normed(x)).double().pow(2).sum()
    fvu = error / (x.double() - x.double().mean(0)).pow(2).sum()
    assert found.metrics["fvu"] == pytest.approx(float(fvu), rel=1e-6)
    by_call = FunctionCoder(lambda rows: normed(rows))
    same = evaluate(by_call, [contexts], names=names, n_resamples=2, **place)
    for name in ("fvu", "ce_spliced", "kl"):
        assert found.metrics[name] == pytest.approx(same.metrics[name], rel=1e-5)


def test_batch_size_changes_nothing(results, coder, lm, contexts):
    batches = [rows_of(contexts, slice(start, start + 5)) for start in (0, 5, 10)]
    other = evaluate(coder, batches, lm=lm, hookpoint="model.layers.1", n_resamples=50)
    assert other.undefined == results.undefined
    defined = {n: v for n, v in results.metrics.items() if v is not None}
    assert_same({n: other.metrics[n] for n in defined}, defined, rel=1e-4)


def test_mean_ablation_writes_the_mean_of_the_evaluated_activations(
    results, lm, hookpoint, contexts
):
    x = capture(lm.module, [hookpoint], contexts.tokens)[hookpoint][contexts.is_kept]
    to_mean = FunctionCoder(x.double().mean(0).float().expand_as)
    found = evaluate(to_mean, [contexts], lm=lm, hookpoint=hookpoint, names=["downstream"])
    expected = found.metrics["ce_spliced"]
    assert results.metrics["ce_ablated_mean"] == pytest.approx(expected, rel=1e-7)
    assert results.metrics["ce_ablated_mean"] != results.metrics["ce_ablated_zero"]


def test_token_limits_hold_whatever_the_batch_size(contexts):
    for size in (1, 5, 12):
        batches = [rows_of(contexts, slice(i, i + size)) for i in range(0, 12, size)]
        for wanted, n_rows in ((1, 1), (44, 2), (45, 3), (10**6, 12), (None, 12)):
            parts = list(limited(batches, wanted))
            assert sum(len(part.tokens) for part in parts) == n_rows
    assert list(limited([contexts], 0)) == []


def test_downstream_tokens_bounds_only_the_model(coder, lm, hookpoint, contexts):
    found = evaluate(
        coder, [contexts], lm=lm, hookpoint=hookpoint, tokens=110, downstream_tokens=40
    )
    assert found.evals["reconstruction"].n_tokens == 110
    assert found.evals["downstream"].n_tokens == 40
    alone = evaluate(
        coder, [contexts], lm=lm, hookpoint=hookpoint, names=["downstream"], downstream_tokens=40
    )
    assert alone.provenance["n_tokens"] == 44
    assert set(alone.evals) == {"downstream"}


def test_progress_is_told(coder, lm, hookpoint, contexts):
    told = []
    batches = [rows_of(contexts, slice(0, 6)), rows_of(contexts, slice(6, 12))]
    evaluate(
        coder, batches, lm=lm, hookpoint=hookpoint, tell=lambda *args: told.append(args), tokens=264
    )
    assert told == [
        ("activations", 132, 264),
        ("activations", 264, 264),
        ("downstream", 132, 264),
        ("downstream", 264, 264),
    ]


def test_activations_without_a_language_model(coder):
    x = gaussian()
    found = evaluate(coder, activation_contexts([x[:100], x[100:]]))
    without_model = {name for name, row in EVALS.items() if row.reads in ("weights", "activations")}
    assert set(found.evals) == without_model
    assert found.evals["reconstruction"].n_documents == 300
    ids = [torch.zeros(100, dtype=torch.long), torch.ones(200, dtype=torch.long)]
    grouped = evaluate(coder, activation_contexts([x[:100], x[100:]], ids))
    assert grouped.evals["reconstruction"].n_documents == 2
    assert grouped.metrics["fvu/low"] is None
    assert "8 documents" in grouped.undefined["fvu/low"]


def test_max_norm_leaves_tokens_out(coder):
    x = gaussian()
    x[::3] *= 100
    found = evaluate(coder, activation_contexts([x]), max_norm=50.0)
    assert found.provenance["n_tokens"] == 200


def test_anything_with_encode_and_decode(contexts, lm, hookpoint):
    found = evaluate(FunctionCoder(lambda x: x), [contexts], lm=lm, hookpoint=hookpoint)
    assert found.metrics["fvu"] == 0
    assert found.metrics["delta_ce"] == 0
    assert found.provenance["d_sae"] == D
    with pytest.raises(TypeError, match="encode"):
        evaluate(object(), activation_contexts([gaussian()]))


def test_wrong_width_is_refused_before_any_batch(lm, hookpoint, contexts):
    wrong = SparseCoder.create(16, CoderConfig(d_sae=32, k=4), metadata={"hook_name": "there"})

    def batches():
        yield contexts
        raise AssertionError("a second batch was read")

    with pytest.raises(ValueError, match=r"model\.layers\.1.*d_in=16, width 32.*there"):
        evaluate(wrong, batches(), lm=lm, hookpoint=hookpoint)


def test_typo_suggests_the_near_eval(coder):
    with pytest.raises(ValueError, match=r"got 'sparcity'. Did you mean 'sparsity'\?"):
        evaluate(coder, activation_contexts([gaussian()]), names=["sparcity"])
    with pytest.raises(ValueError, match="at least one"):
        evaluate(coder, activation_contexts([gaussian()]), names=[])


def test_model_evals_ask_for_a_model(coder, lm, contexts):
    with pytest.raises(ValueError, match="'downstream' runs the language model"):
        evaluate(coder, activation_contexts([gaussian()]), names=["downstream"])
    with pytest.raises(ValueError, match="bring their activations"):
        evaluate(coder, [contexts])
    with pytest.raises(ValueError, match="`hookpoint` must say"):
        evaluate(coder, [contexts], lm=lm)


def test_no_tokens_is_an_error(coder, lm, hookpoint, contexts):
    with pytest.raises(ValueError, match="there were none"):
        evaluate(coder, [], lm=lm, hookpoint=hookpoint)
    masked = rows_of(contexts, slice(0, 1))
    masked.is_kept.zero_()
    try:
        with pytest.raises(ValueError, match="not masked"):
            evaluate(coder, [masked], lm=lm, hookpoint=hookpoint)
    finally:
        masked.is_kept.copy_(masked.tokens != 0)


def test_nan_is_an_error_that_names_its_place(coder):
    x = gaussian()
    x[7, 3] = torch.nan
    with pytest.raises(ValueError, match=r"the given batches.*1 of 300"):
        evaluate(coder, activation_contexts([x]))
    broken = FunctionCoder(lambda x: x / 0)
    with pytest.raises(ValueError, match="reconstructions must be finite"):
        evaluate(broken, activation_contexts([gaussian()]))


def test_dead_dictionary_has_no_nan(coder, lm, hookpoint, contexts, tmp_path):
    with torch.no_grad():
        coder.b_enc.fill_(-1e6)
    found = evaluate(coder, [contexts], lm=lm, hookpoint=hookpoint)
    assert found.metrics["dead"] == 1
    write_results(found, tmp_path / "results.json")


def test_results_survive_the_file(results, tmp_path):
    path = tmp_path / "run" / "results.json"
    write_results(results, path)
    again = read_results(path)
    assert again.metrics == results.metrics
    assert again.undefined == results.undefined
    assert again.evals == results.evals
    assert again.provenance == results.provenance
    assert again.arrays.keys() == results.arrays.keys()
    for name, array in results.arrays.items():
        torch.testing.assert_close(again.arrays[name], array, rtol=0, atol=0, equal_nan=True)
    assert again.explanations == results.explanations
    assert {p.name for p in path.parent.iterdir()} == {"results.json", "results.safetensors"}
    text = path.read_text()
    assert "NaN" not in text
    assert json.loads(text)["schema"] == "sae.evals/1"


def test_other_files_are_no_results(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="schema"):
        read_results(path)


def test_every_metric_is_in_the_table_in_units_for_people(results):
    rows = {row.metric: row for row in table_rows(results)}
    assert set(rows) == {name for name in results.metrics if "/" not in name}
    assert rows["dead"].value.endswith("%")
    assert rows["ce_clean"].value.endswith(" nats")
    assert "…" in rows["fvu"].interval
    assert rows["rate_under_1e-5"].value == "–"
    assert "300,000 tokens" in rows["rate_under_1e-5"].interval


@pytest.mark.parametrize("name", sorted(WITHIN_MINUTES))
def test_every_eval_labels_every_metric(name, results):
    own = {metric for metric in results.evals[name].metrics if "/" not in metric}
    assert own == set(EVALS[name].labels)


class Keeper:
    """An eval that keeps what it is given."""

    def __init__(self, setup):
        self.setup, self.seen, self.batches = setup, Seen(), []

    def update(self, batch):
        self.batches.append(batch)

    def compute(self):
        return {"kept_batches": len(self.batches)}

    def arrays(self):
        return {}


def test_contexts_come_whole_with_the_code_of_their_tokens(
    monkeypatch, coder, lm, hookpoint, contexts
):
    made = []

    def make(setup):
        made.append(Keeper(setup))
        return made[-1]

    monkeypatch.setitem(EVALS, "sparsity", EvalRow(make, "contexts", {}))
    monkeypatch.setattr(evaluable, "DENSE_ELEMENTS", 64 * 16)  # 16 tokens a chunk
    found = evaluate(coder, [contexts], lm=lm, hookpoint=hookpoint, names=["sparsity"])
    (batch,) = made[0].batches
    flat = batch.contexts.activations.flatten(0, 1)
    assert found.metrics["kept_batches"] == 1
    assert torch.equal(batch.kept, batch.contexts.is_kept.flatten().nonzero()[:, 0])
    assert len(batch.kept) > 32
    expected = coder.encode(flat[batch.kept].float())
    torch.testing.assert_close(batch.latents.to_dense(64), expected)
    assert batch.lm is lm
    assert made[0].setup.coder.coder is coder


def test_evals_of_weights_need_no_batch(monkeypatch, coder):
    monkeypatch.setitem(EVALS, "sparsity", EvalRow(Keeper, "weights", {}))
    found = evaluate(coder, activation_contexts([gaussian()]), n_resamples=9)
    assert found.metrics["kept_batches"] == 0
