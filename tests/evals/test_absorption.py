"""Absorption, splitting, hedging: seen where they are planted, undefined where nothing is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from defects import PAIRS, FiniteWorld, Planted, absorption, identity, oracle, random, splitting
from toy_worlds import gaussian, unit

from sae.coder.latents import from_dense
from sae.config import EvalConfig
from sae.evals import evaluate_on_world
from sae.evals.absorption.concepts import main_latents
from sae.evals.absorption.wordnet import NounClasses
from sae.evals.absorption.words import AbsorptionWords, words_at
from sae.evals.evaluable import Evaluable
from sae.evals.interface import ContextBatch, EvalSetup, Undefined, Value
from sae.stream.contexts import CapturedContexts
from sae.stream.language_model import LanguageModel
from sae.stream.vocabulary import token_texts

PREFIX = "absorption"


@pytest.fixture(scope="module")
def world() -> FiniteWorld:
    return FiniteWorld()


def measured(coder: object, world: FiniteWorld) -> Mapping[str, float | None]:
    found = evaluate_on_world(
        coder,
        world,  # type: ignore[arg-type]
        4096,
        names=["absorption"],
        pairs=PAIRS,
        n_resamples=20,
    )
    assert set(found.evals) == {"absorption_features"}
    return {name.removeprefix(f"{PREFIX}_"): value for name, value in found.metrics.items()}


def test_main_latents_are_added_while_their_union_tells_more() -> None:
    on = torch.arange(200) % 2 == 0
    dense = torch.zeros(200, 5)
    dense[0:120:2, 3] = 1
    dense[120:180:2, 1] = 1
    dense[180:184:2, 4] = 1
    dense[::3, 2] = 1
    code = from_dense(dense)
    assert main_latents(code, on, 5) == [3, 1]
    assert main_latents(code, on, 5, most=1) == [3]
    assert main_latents(code, torch.zeros(200, dtype=torch.bool), 5) == []
    assert main_latents(from_dense(torch.zeros(200, 5)), on, 5) == []


def test_the_truth_is_detected_whole_and_undivided(world: FiniteWorld) -> None:
    found = measured(oracle(world), world)
    assert found["detected"] == found["recall_child_off"] == found["recall_child_on"] == 1
    assert found["full"] == found["drop"] == 0
    assert found["latents_per_concept"] == 1
    assert found["encoder_hole"] is None


def test_absorbed_parents_are_seen_and_counted(world: FiniteWorld) -> None:
    found, truth = measured(absorption(world), world), measured(oracle(world), world)
    assert found["detected"] == 1
    assert found["recall_child_on"] == 0
    assert found["drop"] == 1
    assert found["full"] > truth["full"] == 0  # type: ignore[operator]
    assert found["latents_per_concept"] == 1
    assert found["decoder_leak"] > truth["decoder_leak"] + 0.3  # type: ignore[operator]


def test_the_rows_that_another_latent_took_are_the_share_absorbed(world: FiniteWorld) -> None:
    found = evaluate_on_world(
        absorption(world),
        world,  # type: ignore[arg-type]
        4096,
        names=["absorption"],
        pairs=PAIRS,
    ).arrays
    features = found["absorption_features/features"].tolist()
    for parent, children in ((0, [2, 3]), (1, [4, 5])):
        on = world.codes[:, parent] > 0
        share = float((world.codes[on][:, children] > 0).any(1).double().mean())
        full = float(found["absorption_features/full"][features.index(parent)])
        assert full == pytest.approx(share, abs=0.07)


def oracle_features(world: FiniteWorld) -> list[int]:
    return (world.codes > 0).sum(0).argsort(descending=True, stable=True)[:24].tolist()


def test_a_split_concept_has_two_latents(world: FiniteWorld) -> None:
    found = measured(splitting(world), world)
    assert found["latents_per_concept"] > 1.5  # type: ignore[operator]
    assert found["recall_child_on"] == 1


def test_what_finds_nothing_gets_no_value(world: FiniteWorld) -> None:
    for coder in (random(world), identity(world)):
        found = measured(coder, world)
        assert found["detected"] == 0
        for name in ("drop", "full", "decoder_leak", "hedging", "recall_child_on"):
            assert found[name] is None, name


def test_latents_that_always_fire_detect_nothing(world: FiniteWorld) -> None:
    whole = oracle(world)
    always = Planted(world, whole.table.abs() + 0.1, whole.W_dec)
    found = measured(always, world)
    assert found["recall_child_off"] == 1
    assert found["detected"] == 0
    assert found["drop"] is None


def test_a_parent_told_to_be_silent_for_its_child_has_a_hole(world: FiniteWorld) -> None:
    whole = oracle(world)
    whole.W_enc = whole.W_dec.clone()  # type: ignore[attr-defined]
    level = measured(whole, world)["encoder_hole"]
    order = oracle_features(world)
    for parent, child in PAIRS.tolist():
        whole.W_enc[order.index(parent)] -= world.directions[child]  # type: ignore[attr-defined]
    assert measured(whole, world)["encoder_hole"] < level - 0.3  # type: ignore[operator]


def test_a_parent_that_writes_its_children_hedges(world: FiniteWorld) -> None:
    whole, order = oracle(world), oracle_features(world)
    level = measured(whole, world)["hedging"]
    rows = whole.W_dec.clone()
    for parent, child in PAIRS.tolist():
        rows[order.index(parent)] += world.directions[child]
    found = measured(replace(whole, W_dec=rows), world)
    assert found["hedging"] > level + 0.3  # type: ignore[operator]
    assert found["drop"] == 0


def test_words_end_where_another_begins() -> None:
    texts = dict(enumerate([" Do", "g", " ran", ",", " 3rd", " cat", "s", "Up"]))
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 2], [2, 0, 2, 2, 7, 3, 5, 6]])
    documents = torch.zeros_like(tokens)
    documents[1, 2:] = 1
    assert words_at(tokens, documents, texts) == {
        1: "dog",
        2: "ran",
        6: "cats",
        8: "ran",
        10: "ran",
        12: "ranup",
    }


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    """Three animals, two foods and a word that is a verb too, in WordNet's form."""
    data = [
        ("05", "dog"),
        ("05", "cat"),
        ("05", "cow"),
        ("13", "bread"),
        ("13", "soup"),
        ("04", "run"),
    ]
    body, index = "  1 This stands where the licence stands.\n", "  1 The licence.\n"
    for number, word in data:
        place = len(body)
        body += f"{place:08d} {number} n 01 {word} 0 000 | a {word}\n"
        tagged = 0 if word == "cow" else 1
        index += f"{word} n 2 1 @ 2 {tagged} {place:08d} {0:08d}  \n"
    (tmp_path / "data.noun").write_text(body)
    (tmp_path / "index.noun").write_text(index)
    (tmp_path / "index.verb").write_text("run v 1 1 @ 1 1 00000000  \n")
    return tmp_path


def test_nouns_have_the_class_of_their_first_sense(wordnet: Path) -> None:
    classes = NounClasses(str(wordnet))
    assert {word: classes(word) for word in ("dog", "dogs", "bread")} == {
        "dog": 2,
        "dogs": 2,
        "bread": 10,
    }
    assert [classes(word) for word in ("run", "cow", "tree")] == [None, None, None]


def test_missing_files_say_what_installs_them(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="apt-get install wordnet-base"):
        NounClasses(str(tmp_path))


WORDS = ("dog", "door", "dust", "cat", "cup", "car", "soup", "sun", "sea", "bread", "bone", "boat")


@pytest.fixture(scope="module")
def text(lm: LanguageModel) -> CapturedContexts:
    """Sixty documents of common words and rare ones, whose activations are by first letter."""
    generator = torch.Generator().manual_seed(0)
    tails = [
        a + b for a in ("im", "ane", "ort", "ulk", "e", "ya") for b in ("ol", "ak", "ume", "i")
    ]
    rare = [letter + tail for letter in "dcsb" for tail in tails]
    rows = []
    for _ in range(60):
        common = torch.randint(len(WORDS), (12,), generator=generator).tolist()
        others = torch.randint(len(rare), (6,), generator=generator).tolist()
        said = [w for pair in zip(common[::2], common[1::2], others, strict=True) for w in pair]
        names = [(WORDS if i % 3 < 2 else rare)[n] for i, n in enumerate(said)]
        rows.append(lm.tokenizer("".join(f" {name}" for name in names) + " .")["input_ids"])
    t = max(map(len, rows))
    tokens = torch.tensor([row + [row[-1]] * (t - len(row)) for row in rows])
    documents = torch.arange(60)[:, None].expand_as(tokens).contiguous()
    return CapturedContexts(
        tokens, documents, torch.ones_like(tokens, dtype=torch.bool), gaussian(60, t, 8, seed=1)
    )


def batch_of(text: CapturedContexts, lm: LanguageModel, absorbed: str) -> ContextBatch:
    """Latents 0 to 3 fire for words in d, c, s, b, but for `absorbed`, which is latent 4's."""
    ids = text.tokens.unique().tolist()
    texts = dict(zip(ids, token_texts(lm.tokenizer, ids), strict=True))
    dense, x = torch.zeros(text.tokens.numel(), 6), 0.05 * text.activations.flatten(0, 1)
    for place, word in words_at(text.tokens, text.document_ids, texts).items():
        letter = "dcsb".index(word[0])
        x[place, letter] += 1
        x[place, 5] += word == absorbed
        dense[place, 4 if word == absorbed else letter] = 1
    activations = x.view(*text.tokens.shape, 8)
    captured = CapturedContexts(text.tokens, text.document_ids, text.is_kept, activations)
    return ContextBatch(captured, from_dense(dense), torch.arange(len(x)), lm)


class Letters:
    """Latents that write the letters; the fifth writes d and the word's own direction."""

    def __init__(self) -> None:
        self.W_dec = torch.eye(8)[:6]
        self.W_dec[4] = unit(torch.eye(8)[[0]] + torch.eye(8)[[5]])[0]
        self.W_enc = self.W_dec.clone()
        self.W_enc[0, 5] = -1
        self.d_sae, self.d_in = 6, 8

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W_enc.T

    def decode(self, dense: torch.Tensor) -> torch.Tensor:
        return dense @ self.W_dec


def setup_of(wordnet: Path | None) -> EvalSetup:
    settings = EvalConfig(wordnet=str(wordnet))
    return EvalSetup(8, 6, n_resamples=20, coder=Evaluable(Letters(), 8), settings=settings)


def test_a_word_taken_from_its_letter_is_absorbed(
    text: CapturedContexts, lm: LanguageModel, wordnet: Path
) -> None:
    found: dict[str, dict[str, Value]] = {}
    for absorbed in ("dog", "none"):
        accumulator = AbsorptionWords(setup_of(wordnet))
        accumulator.update(batch_of(text, lm, absorbed))
        found[absorbed] = accumulator.compute()
        columns = accumulator.arrays()
        assert len(columns["letter_absorption/full"]) == 26
    taken, whole = found["dog"], found["none"]
    assert taken["letter_absorption_detected"] == whole["letter_absorption_detected"] == 1
    assert whole["letter_absorption_drop"] == whole["letter_absorption_full"] == 0
    assert taken["letter_absorption_drop"] == pytest.approx(1 / 12, abs=0.01)
    assert 0.02 < taken["letter_absorption_full"] < 0.12  # type: ignore[operator]
    assert taken["letter_absorption_decoder_leak"] == pytest.approx(0.5**0.5, abs=0.1)
    assert isinstance(whole["letter_absorption_decoder_leak"], Undefined)
    assert taken["noun_absorption_detected"] is not None


def test_text_in_any_order_and_halves_is_the_same(
    text: CapturedContexts, lm: LanguageModel, wordnet: Path
) -> None:
    whole = batch_of(text, lm, "dog")
    once, one, other = (AbsorptionWords(setup_of(wordnet)) for _ in range(3))
    once.update(whole)
    t = text.tokens.shape[1]
    for accumulator, rows in ((one, slice(20, 60)), (other, slice(0, 20))):
        captured = CapturedContexts(
            *(
                getattr(whole.contexts, name)[rows]
                for name in ("tokens", "document_ids", "is_kept", "activations")
            )
        )
        latents = type(whole.latents)(*(p[rows.start * t : rows.stop * t] for p in whole.latents))
        kept = torch.arange(captured.tokens.numel())
        accumulator.update(ContextBatch(captured, latents, kept, lm))
    one.merge(other)
    assert one.compute() == once.compute()


def test_without_wordnet_or_text_it_says_so(
    text: CapturedContexts, lm: LanguageModel, tmp_path: Path
) -> None:
    batch = batch_of(text, lm, "dog")
    accumulator = AbsorptionWords(setup_of(tmp_path))
    accumulator.update(ContextBatch(batch.contexts, batch.latents, batch.kept))
    for name, value in accumulator.compute().items():
        assert isinstance(value, Undefined)
        assert ("wordnet-base" if name.startswith("noun") else "no language model") in value.reason
    accumulator.update(batch)
    found = accumulator.compute()
    assert found["letter_absorption_detected"] == 1
    assert isinstance(found["noun_absorption_detected"], Undefined)
