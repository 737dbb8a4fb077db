"""Sparse probing: rows drawn the same whatever the order, probes that score rows they never saw."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_worlds import Linear, ToyWorld, gaussian, unit

from sae.coder.latents import Latents, from_dense
from sae.config import EvalConfig
from sae.evals import evaluate_on_world
from sae.evals.evaluable import Evaluable
from sae.evals.interface import ContextBatch, EvalSetup, Undefined
from sae.evals.nulls import RandomDirections, ShuffledCodes, TrueDictionary
from sae.evals.numbers import numbers_of
from sae.evals.on_world import frequent_features
from sae.evals.probing.labelled import LabelledTexts
from sae.evals.probing.probes import (
    Part,
    _fit_and_score,
    contrasts,
    probe_columns,
    probe_latents,
    probe_whole,
    quick_fits,
    shuffled_auroc,
)
from sae.evals.probing.reading import labelled_batches
from sae.evals.probing.sample import RowSample
from sae.evals.probing.tasks import COLUMNS, ConceptRows, ConceptSample
from sae.evals.probing.texts import probing_texts
from sae.evals.probing.tokens import probing_tokens
from sae.evals.registry import EVALS, chosen_names
from sae.stream.contexts import CapturedContexts
from sae.stream.hookpoints import find_hookpoint
from sae.stream.language_model import LanguageModel
from sae.stream.reader import Reader
from sae.stream.vocabulary import token_texts


@pytest.fixture(autouse=True)
def _quick():
    with quick_fits():
        yield


QUICK = EvalConfig(probe_examples=32, probe_features=8)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_lowest_rows_of_each_group_are_kept(data: st.DataObject) -> None:
    n, size = 40, 5
    numbers = numbers_of(torch.arange(n), 0)
    is_in = torch.rand(n, 3, generator=torch.Generator().manual_seed(1)) < 0.4
    x, dense = gaussian(n, 2, seed=2), gaussian(n, 6, seed=3).relu()
    order = torch.tensor(data.draw(st.permutations(range(n))))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    samples = [RowSample(3, size), RowSample(3, size)]
    for i, (start, end) in enumerate(zip([0, *cuts], [*cuts, n], strict=True)):
        rows = order[start:end]
        code = from_dense(dense[rows])
        samples[i % 2].update(numbers[rows], is_in[rows], x[rows], code, tags=rows)
    samples[0].merge(samples[1])
    assert samples[0].counts.tolist() == is_in.sum(0).tolist()
    for group in range(3):
        mine = is_in[:, group].nonzero()[:, 0]
        lowest = mine[numbers[mine].argsort()][:size]
        assert samples[0].tags[group].tolist() == lowest.tolist()
        assert torch.equal(samples[0].x[group], x[lowest])
        code = Latents(samples[0].values[group], samples[0].indices[group])
        assert torch.equal(code.to_dense(6), dense[lowest])


def part(dense: torch.Tensor, on: torch.Tensor, x: torch.Tensor | None = None) -> Part:
    return Part(dense if x is None else x, from_dense(dense), on)


def labels(n: int) -> torch.Tensor:
    return torch.arange(n) >= n // 2


def test_contrast_is_the_difference_of_means_over_the_mean_size() -> None:
    dense, on = gaussian(60, 5, seed=0).relu(), labels(60)
    dense[:, 3] = 0
    difference = (dense[on].mean(0) - dense[~on].mean(0)).abs()
    size = dense.sum(0) / (dense != 0).sum(0).clamp_min(1)
    expected = torch.where(size > 0, difference / size.clamp_min(1e-12), 0.0)
    assert torch.allclose(contrasts(from_dense(dense), on, 5), expected.double(), atol=1e-6)


def test_a_latent_that_is_the_concept_scores_one_and_noise_a_half() -> None:
    on = labels(64)
    noise = gaussian(128, 20, seed=1).relu()
    told = noise.clone()
    told[:, 7] = torch.cat([on, on]) * (1 + gaussian(128, seed=2).abs())
    parts = [(part(z[:64], on), part(z[64:], on)) for z in (told, noise)]
    best, chosen = probe_latents(*parts[0], 20)
    assert chosen[0] == 7
    assert best["auroc_1"] == best["balanced_1"] == 1.0
    assert best["loss"] < 0.2 < 0.6 < probe_latents(*parts[1], 20)[0]["loss"]
    assert abs(probe_latents(*parts[1], 20)[0]["auroc_1"] - 0.5) < 0.2
    generator = torch.Generator().manual_seed(0)
    nulls = [shuffled_auroc(*parts[0], 20, generator) for _ in range(30)]
    assert sum(nulls) / 30 == pytest.approx(0.5, abs=0.06)


def test_what_chose_a_latent_does_not_score_it() -> None:
    on = labels(64)
    dense = gaussian(128, 10, seed=3).relu()
    dense[:64, 4] = on.float()
    scores, chosen = probe_latents(part(dense[:64], on), part(dense[64:], on), 10)
    assert chosen[0] == 4
    assert abs(scores["auroc_1"] - 0.5) < 0.2


def test_more_latents_tell_what_one_cannot() -> None:
    on = labels(128)
    dense = 0.2 * gaussian(256, 12, seed=4).abs()
    which = torch.arange(256) % 4
    for latent in range(4):
        dense[:, latent] += torch.cat([on, on]) * (which == latent)
    scores, _ = probe_latents(part(dense[:128], on), part(dense[128:], on), 12)
    assert scores["auroc_1"] < 0.75
    assert scores["auroc_5"] > scores["auroc_2"] > scores["auroc_1"]
    assert scores["auroc_5"] > 0.9


def test_baselines_take_the_columns_that_differ_most() -> None:
    on = labels(64)
    x = 0.1 * gaussian(128, 30, seed=5)
    x[:, 11] += 5 * torch.cat([on, on])
    x[:, 2] += 100
    assert probe_columns(x[:64], x[64:], (on, on))[1] == 1.0


def test_all_of_x_is_probed_the_same_in_the_span_of_its_rows() -> None:
    on = labels(32)
    x = gaussian(64, 100, seed=8)
    x[:, 3] += 4 * torch.cat([on, on])
    train = x[:32] - x[:32].mean(0)
    scale = train.pow(2).mean().sqrt()
    whole = [((part - x[:32].mean(0)) / scale).double().numpy() for part in (x[:32], x[32:])]
    expected = _fit_and_score(*whole, on, on, is_sparse=False)
    found = probe_whole(x[:32], x[32:], (on, on))
    assert found == pytest.approx(expected, abs=1e-3)
    assert found.auroc > 0.8


def test_tasks_are_balanced_and_say_how_rare_their_concept_was() -> None:
    sample = ConceptSample(["often", "rare", "never"], 64)
    n = 4000
    on = torch.zeros(n, 3, dtype=torch.bool)
    on[::2, 0], on[::20, 1] = True, True
    halves = (torch.arange(n) // 40) % 2
    dense = gaussian(n, 6, seed=6).relu()
    dense[:, 1] += 9 * on[:, 1]
    known = torch.ones_like(on)
    numbers = numbers_of(torch.arange(n), 0)
    sample.update(ConceptRows(numbers, halves, on, known, dense, from_dense(dense)))
    table = sample.table(6, 0)
    found = dict(zip(COLUMNS, table.values.T, strict=True))
    assert found["positive_share"][:2].tolist() == [0.5, 0.05]
    assert found["train_rows"][:2].tolist() == found["test_rows"][:2].tolist() == [32, 32]
    assert found["auroc_1"][1] > 0.95
    assert torch.isnan(table.values[2]).all()
    assert table.latents[1, 0] == 1


def on_world(coder: object, world: ToyWorld, **settings: int) -> Mapping[str, float | None]:
    found = evaluate_on_world(
        coder,
        world,  # type: ignore[arg-type]
        4000,
        names=["probing"],
        n_resamples=100,
        settings=EvalConfig(probe_examples=64, **{"probe_features": 6, **settings}),
    )
    assert set(found.evals) == {"probing_features"}
    return found.metrics


def test_truth_beats_a_noisy_reader_beats_random_beats_shuffled() -> None:
    world = ToyWorld()
    truth = TrueDictionary(world, frequent_features(world, 16))  # type: ignore[arg-type]
    rows = unit(world.directions[:16] + 0.15 * gaussian(16, 16, seed=7))
    dictionaries = {
        "truth": truth,
        "noisy": Linear(world, rows, rows, k=6),
        "random": RandomDirections(world.bias, 16, 6, seed=8),
        "shuffled": ShuffledCodes(truth, 16),
    }
    found = {name: on_world(coder, world) for name, coder in dictionaries.items()}
    scores = [metrics["probe_auroc_1"] for metrics in found.values()]
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
    assert found["truth"]["probe_auroc_1"] == 1.0
    assert found["shuffled"]["probe_auroc_1"] == pytest.approx(0.5, abs=0.06)
    assert found["truth"]["probe_gain_1"] > 0.1 > found["shuffled"]["probe_gain_1"]  # type: ignore[operator]
    for metrics in found.values():
        assert metrics["probe_auroc_shuffled"] == pytest.approx(0.5, abs=0.08)
        assert metrics["probe_x_auroc"] > 0.85  # type: ignore[operator]


def test_settings_say_how_many_concepts_and_rows() -> None:
    world = ToyWorld()
    coder = RandomDirections(world.bias, 16, 6, seed=8)
    assert on_world(coder, world, probe_features=3)["probe_tasks"] == 3
    assert on_world(coder, world, probe_features=50)["probe_tasks"] == 16


def test_sets_of_evals_are_those_that_can_be_read() -> None:
    on_text = ("weights", "activations", "contexts", "model", "labelled")
    assert chosen_names(["probing"], on_text) == ("probing_tokens", "probing_texts")
    assert set(chosen_names(["full"], on_text)) == {
        name for name, row in EVALS.items() if row.reads != "world"
    }
    assert "autointerp" not in chosen_names(["fast"], on_text)
    assert "probing_texts" not in chosen_names(None, on_text)
    assert chosen_names(["sparsity", "probing"], ("world",)) == ("sparsity", "probing_features")


TEXTS = ["In 1999 Anna said: no. ", "the dogs (all of them) ran, and ", 'he asked "Why?" twice. ']


@pytest.fixture(scope="module")
def token_batch(lm: LanguageModel) -> ContextBatch:
    """Forty documents of 60 tokens, whose activations are the token ids' bits, and their code."""
    texts = ["".join(TEXTS[(i + j) % 3] for j in range(4)) for i in range(40)]
    rows = [lm.tokenizer(text)["input_ids"][:60] for text in texts]
    tokens = torch.tensor(rows)
    x = (tokens[..., None] >> torch.arange(9)).bitwise_and(1).float()
    documents = torch.arange(40)[:, None].expand_as(tokens).contiguous()
    contexts = CapturedContexts(tokens, documents, torch.ones_like(tokens, dtype=torch.bool), x)
    is_digit = [text.strip().isdigit() for text in token_texts(lm.tokenizer, range(300))]
    dense = torch.zeros(tokens.numel(), 4)
    dense[:, 2] = torch.tensor(is_digit)[tokens.flatten()].float()
    return ContextBatch(contexts, from_dense(dense), torch.arange(tokens.numel()), lm)


def test_a_latent_of_digits_tells_digits(token_batch: ContextBatch) -> None:
    accumulator = probing_tokens(EvalSetup(9, 4, n_resamples=20, settings=QUICK))
    accumulator.update(token_batch)
    metrics, arrays = accumulator.compute(), accumulator.arrays()
    assert metrics["token_probe_tasks"] > 8  # type: ignore[operator]
    assert arrays["tasks/digit"][COLUMNS.index("auroc_1")] == 1.0
    assert arrays["chosen/digit"][0] == 2
    assert arrays["latents/token_probe_auroc"][2] == 1.0
    assert ("tokens: digit (AUROC 1.00)", "probe") in {e[1:] for e in accumulator.explanations()}


def test_halves_and_order_of_text_change_nothing(token_batch: ContextBatch) -> None:
    setup = EvalSetup(9, 4, n_resamples=20, settings=QUICK)
    once, one, other = (probing_tokens(setup) for _ in range(3))
    once.update(token_batch)
    whole = token_batch.contexts
    for accumulator, rows in ((one, slice(25, 40)), (other, slice(0, 25))):
        fields = (whole.tokens, whole.document_ids, whole.is_kept, whole.activations)
        contexts = CapturedContexts(*(field[rows] for field in fields))
        n = whole.tokens.shape[1]
        flat = slice(rows.start * n, rows.stop * n)
        latents = Latents(*(values[flat] for values in token_batch.latents))
        kept = torch.arange(contexts.tokens.numel())
        accumulator.update(ContextBatch(contexts, latents, kept, token_batch.lm))
    one.merge(other)
    assert one.compute() == once.compute()
    assert one.seen.n_documents == once.seen.n_documents == 40


def test_activations_without_text_leave_tokens_undefined(token_batch: ContextBatch) -> None:
    accumulator = probing_tokens(EvalSetup(9, 4, settings=QUICK))
    accumulator.update(ContextBatch(token_batch.contexts, token_batch.latents, token_batch.kept))
    values = accumulator.compute().values()
    assert all(
        isinstance(value, Undefined) and "no language model" in value.reason for value in values
    )
    assert not accumulator.arrays()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like sae-probes, with two binary data sets and one that is none."""
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "data" / "cleaned_data").mkdir(parents=True)

    def write(name: str, lines: list[str]) -> None:
        packed = zstandard.ZstdCompressor().compress("\n".join(lines).encode())
        (tmp_path / "data" / f"{name}.zst").write_bytes(packed)

    kinds = {
        "1_pets": "Binary Classification",
        "2_long": "Binary Classification",
        "3_size": "Continuous Data",
    }
    master = [f"cleaned_data/{name}.csv,{kind}" for name, kind in kinds.items()]
    write("probing_datasets_MASTER.csv", ["Dataset save name,Data type", *master])
    for name, text in (("1_pets", "{} number {}"), ("2_long", "a much longer one " * 9 + "{} {}")):
        lines = [f"{text.format(kind, i)},{kind}" for i in range(40) for kind in ("cat", "dog")]
        write(f"cleaned_data/{name}.csv", ["prompt,target", *lines])
    monkeypatch.setattr("sae.evals.probing.labelled.package_folder", lambda _: tmp_path)
    return tmp_path


@pytest.mark.usefixtures("package")
def test_binary_data_sets_are_drawn_evenly() -> None:
    texts = LabelledTexts(QUICK, seed=0)
    assert texts.names == ("1_pets", "2_long")
    drawn = list(texts.texts("1_pets"))
    counts = {(t.is_on, t.half): 0 for t in drawn}
    for text in drawn:
        assert ("dog" in text.text) == text.is_on
        counts[text.is_on, text.half] += 1
    assert set(counts.values()) == {8}
    assert len(counts) == 4
    others = {t.text for t in LabelledTexts(QUICK, seed=1).texts("1_pets")}
    assert others != {t.text for t in drawn}
    assert LabelledTexts(EvalConfig(probe_texts="2_*"), 0).names == ("2_long",)


@pytest.mark.usefixtures("package")
def test_a_glob_that_matches_no_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`eval.probe_texts` must match .* '9_\*'"):
        LabelledTexts(EvalConfig(probe_texts="1_*,9_*"), 0)


def test_a_missing_package_says_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.evals.probing.labelled.PACKAGE", "package:no-such-probes")
    with pytest.raises(RuntimeError, match=r"pip install --no-deps sae-probes"):
        probing_texts(EvalSetup(4, 4))


class Axes:
    """A coder of any width whose latents are the sides of the axes."""

    def __init__(self, d_in: int) -> None:
        self.d_in, self.d_sae = d_in, 2 * d_in

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, -x], -1).relu()

    def decode(self, dense: torch.Tensor) -> torch.Tensor:
        return dense[..., : self.d_in] - dense[..., self.d_in :]


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("context_tokens", [4, 128])
def test_a_text_is_read_at_its_last_token(lm: LanguageModel, context_tokens: int) -> None:
    texts, reader = (
        LabelledTexts(QUICK, 0),
        Reader(lm, [find_hookpoint(lm.module, "model.layers.1")]),
    )
    coder = Evaluable(Axes(32), 32)
    batches = list(labelled_batches(texts, reader, coder, context_tokens))
    assert sum(len(batch.x) for batch in batches) == 64
    by_number = {text.number: text for name in texts.names for text in texts.texts(name)}
    for batch in (batches[0], batches[-1]):
        text = by_number[int(batch.numbers[-1])]
        ids = lm.tokenizer(text.text)["input_ids"]
        if len(ids) > context_tokens:
            begins = ids[:1] if ids[0] in lm.tokenizer.all_special_ids else []
            ids = begins + ids[len(ids) - context_tokens + len(begins) :]
        assert len(ids) <= context_tokens
        alone = reader.read(torch.tensor([ids]))[0][0, -1]
        assert torch.allclose(batch.x[-1], alone, atol=1e-5)
        assert bool(batch.is_on[-1]) == text.is_on


@pytest.mark.usefixtures("package")
def test_texts_probed_in_any_order_score_the_same(lm: LanguageModel) -> None:
    setup = EvalSetup(32, 64, n_resamples=20, settings=QUICK)
    once, one, other = (probing_texts(setup) for _ in range(3))
    reader = Reader(lm, [find_hookpoint(lm.module, "model.layers.1")])
    batches = list(labelled_batches(once.source.texts, reader, Evaluable(Axes(32), 32), 128))
    for number, batch in enumerate(batches):
        once.update(batch)
        (one if number % 2 else other).update(batch)
    one.merge(other)
    found = one.compute()
    assert found == once.compute()
    assert found["text_probe_tasks"] == 2
    assert found["text_probe_positive_share"] == 0.5
    assert one.seen.n_documents == 64
    assert set(one.arrays()) >= {"tasks/1_pets", "chosen/2_long"}


@pytest.mark.demo
def test_the_package_has_113_binary_data_sets() -> None:
    if find_spec("sae_probes") is None:
        pytest.skip("the package sae-probes is not installed")
    texts = LabelledTexts(EvalConfig(), 0)
    assert len(texts.names) == 113
    assert len(list(texts.texts("87_glue_cola"))) == 128
