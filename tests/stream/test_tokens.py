from __future__ import annotations

import logging
from array import array
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_stand_ins import Characters, assert_same
from stream_stand_ins import make_stream as stream
from torch import Tensor

from sae.config import DataConfig
from sae.stream import tokenizing
from sae.stream.content import Content, DocumentColumn
from sae.stream.contexts import Contexts
from sae.stream.documents import LocalDocuments, is_held_out, open_documents
from sae.stream.masks import TokenMask, find_token_ids
from sae.stream.tokens import ContextStream

BOS, PAD = 0, 2


@pytest.fixture(scope="module")
def tokenizer(tiny_lm_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_lm_folder)


@pytest.fixture(scope="module")
def documents(tiny_text_file: Path) -> LocalDocuments:
    opened = open_documents(DataConfig(source=str(tiny_text_file)))
    assert isinstance(opened, LocalDocuments)
    return opened


def text_of(tokens: list[int], document_ids: list[int], tokenizer: Any) -> dict[int, list[int]]:
    """Collect each document's tokens, without BOS."""
    texts: dict[int, list[int]] = {}
    for token, document in zip(tokens, document_ids, strict=True):
        if token != tokenizer.bos_token_id and document >= 0:
            texts.setdefault(document, []).append(token)
    return texts


def flat(batches: list[Contexts], name: str) -> list[int]:
    return [value for batch in batches for value in getattr(batch, name).flatten().tolist()]


@pytest.mark.parametrize("contexts", ["packed", "document"])
@pytest.mark.parametrize("bos", ["document", "context", "none"])
@pytest.mark.parametrize("part", ["train", "held_out"])
def test_a_pass_holds_every_token_of_its_documents_once(
    documents: LocalDocuments, tokenizer: Any, part: str, bos: str, contexts: str
) -> None:
    options = {"part": part, "bos": bos, "contexts": contexts}
    batches = list(stream(documents, tokenizer, **options).batches(7))
    found = text_of(flat(batches, "tokens"), flat(batches, "document_ids"), tokenizer)
    chosen = {
        i: text
        for i, text in enumerate(documents.contents)
        if is_held_out(text, 0.2) == (part == "held_out")
    }
    assert {i: tokenizer.decode(ids) for i, ids in found.items()} == chosen
    assert [len(batch.tokens) for batch in batches[:-1]] == [7] * (len(batches) - 1)


def test_bos_begins_contexts_and_documents_and_nothing_else(
    documents: LocalDocuments, tokenizer: Any
) -> None:
    batch = stream(documents, tokenizer).next_batch(400)
    is_start = batch.document_ids != batch.document_ids.roll(1, dims=1)
    is_start[:, 0] = True
    assert torch.equal(batch.tokens == BOS, is_start)
    assert is_start[:, 1:].any()
    assert (batch.document_ids >= 0).all()
    assert batch.tokens.dtype == batch.document_ids.dtype == torch.int64


@pytest.mark.parametrize(("bos", "is_everywhere"), [("context", True), ("none", False)])
def test_bos_at_contexts_starts_alone_or_nowhere(
    documents: LocalDocuments, tokenizer: Any, bos: str, is_everywhere: bool
) -> None:
    batch = stream(documents, tokenizer, bos=bos).next_batch(400)
    assert (batch.tokens[:, 0] == BOS).all() == is_everywhere
    assert not (batch.tokens[:, 1:] == BOS).any()


def test_contexts_of_one_document_are_padded_on_the_right(
    documents: LocalDocuments, tokenizer: Any
) -> None:
    batch = stream(documents, tokenizer, contexts="document").next_batch(400)
    ids = batch.document_ids
    is_padding = ids == -1
    assert (is_padding == (ids != ids[:, :1])).all()
    assert is_padding.any()
    assert (is_padding.long().diff(dim=1) >= 0).all()
    assert (batch.tokens[is_padding] == PAD).all()
    assert not (batch.is_kept & is_padding).any()
    assert (batch.tokens[:, 0] == BOS).all()
    assert not (batch.tokens[:, 1:] == BOS).any()


@given(
    texts=st.lists(st.text("\0abc", min_size=1, max_size=30), min_size=1, max_size=6),
    context_size=st.integers(2, 9),
    has_bos=st.booleans(),
    contexts=st.sampled_from(["packed", "document"]),
    bos=st.sampled_from(["document", "context", "none"]),
)
@settings(max_examples=150, deadline=None)
def test_packing_against_a_plain_reference(
    texts: list[str], context_size: int, has_bos: bool, contexts: str, bos: str
) -> None:
    """Token by token; the texts hold BOS tokens of their own."""
    tokenizer = Characters(bos_token_id=0 if has_bos else None)
    options = {"context_size": context_size, "held_out_fraction": 1e-9, "mask": ()}
    options |= {"contexts": contexts, "bos": bos}
    documents = LocalDocuments(texts, "t")
    batches = list(stream(documents, tokenizer, **options).batches(3))
    rows: list[list[int]] = [[]]
    for document in documents.visit(seed=0, epoch=0):
        if contexts == "document" and rows[-1]:
            rows.append([])
        for offset, character in enumerate(str(document.content)):
            if len(rows[-1]) == context_size:
                rows.append([])
            is_due = not rows[-1] or (bos == "document" and offset == 0)
            if has_bos and bos != "none" and is_due and character != "\0":
                rows[-1].append(0)
                if len(rows[-1]) == context_size:
                    rows.append([0])
            rows[-1].append(ord(character))
    n_padding = [context_size - len(row) for row in rows]
    expected = [row + [Characters.pad_token_id] * n for row, n in zip(rows, n_padding, strict=True)]
    assert [row for batch in batches for row in batch.tokens.tolist()] == expected
    kept = [row for batch in batches for row in batch.is_kept.tolist()]
    assert kept == [[True] * (context_size - n) + [False] * n for n in n_padding]


def test_epochs_differ_in_order_and_not_in_content() -> None:
    texts = LocalDocuments([f"{i:07}" for i in range(32)], "t")
    options = {"context_size": 8, "held_out_fraction": 1e-9}
    whole = stream(texts, Characters(0), **options)
    epochs = [whole.next_batch(32).tokens.tolist() for _ in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_pass_neither_uses_nor_moves_the_position(
    documents: LocalDocuments, tokenizer: Any
) -> None:
    one, other = (stream(documents, tokenizer) for _ in range(2))
    first = next(one.batches(4))
    one.next_batch(3)
    other.next_batch(3)
    assert_same(next(one.batches(4)), first)
    assert_same(one.next_batch(3), other.next_batch(3))


def mask_of(
    tokenizer: Any, *names: Any, excluded_ids: tuple[int, ...] = ()
) -> tuple[list[list[bool]], dict[str, float]]:
    mask = TokenMask.of(tokenizer, names, excluded_ids)
    tokens = torch.tensor([[BOS, 50, 1, 51], [60, BOS, 61, PAD]])
    document_ids = torch.tensor([[0, 0, 0, 0], [0, 1, 1, -1]])
    is_kept: Tensor = mask.is_kept(tokens, document_ids)
    return is_kept.tolist(), mask.shares(Contexts(tokens, document_ids, is_kept))


def test_each_mask_name_changes_what_is_kept(tokenizer: Any) -> None:
    def kept(*names: str) -> list[list[int]]:
        return [[int(is_kept) for is_kept in row] for row in mask_of(tokenizer, *names)[0]]

    assert kept() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert kept("bos") == [[0, 1, 1, 1], [1, 0, 1, 0]]
    assert kept("first") == [[0, 1, 1, 1], [0, 1, 1, 0]]
    assert kept("special") == [[1, 1, 0, 1], [1, 1, 1, 0]]


def test_masked_shares_name_each_token_once(tokenizer: Any) -> None:
    is_kept, shares = mask_of(tokenizer, "bos", "first", "special")
    assert shares == {"padding": 1 / 8, "bos": 2 / 8, "first": 1 / 8, "special": 1 / 8}
    assert sum(shares.values()) == sum(not kept for row in is_kept for kept in row) / 8
    more = mask_of(tokenizer, "bos", "first", "special", excluded_ids=(1, 61))
    assert more[1] == shares | {"excluded": 1 / 8}
    assert not more[0][1][2]


def test_the_shares_of_a_sample_add_up_and_move_nothing(
    documents: LocalDocuments, tokenizer: Any
) -> None:
    one, other = (
        stream(documents, tokenizer, contexts="document", exclude_tokens=(" the",))
        for _ in range(2)
    )
    one.next_batch(3)
    other.next_batch(3)
    shares = one.sample_shares(40)
    assert set(shares) == {"kept", "padding", "bos", "first", "special", "excluded"}
    assert sum(shares.values()) == pytest.approx(1)
    sample = next(other.batches(40))
    assert shares["kept"] == sample.is_kept.double().mean()
    the = tokenizer.convert_tokens_to_ids("Ġthe")
    assert shares["excluded"] == (sample.tokens == the).double().mean() > 0.01
    assert_same(one.next_batch(3), other.next_batch(3))


def test_excluded_tokens_are_read_and_not_kept(documents: LocalDocuments, tokenizer: Any) -> None:
    plain = next(stream(documents, tokenizer).batches(40))
    for excluded in ("Ġthe", " the", tokenizer.convert_tokens_to_ids("Ġthe")):
        batch = next(stream(documents, tokenizer, exclude_tokens=(excluded,)).batches(40))
        is_the = batch.tokens == tokenizer.convert_tokens_to_ids("Ġthe")
        assert torch.equal(batch.tokens, plain.tokens)
        assert torch.equal(batch.is_kept, plain.is_kept & ~is_the)
        assert (plain.is_kept & is_the).any()


def test_what_is_no_token_is_refused(tokenizer: Any) -> None:
    assert find_token_ids(tokenizer, ("<eos>", 7, " the", "Ġthe", "7"), 300) == tuple(
        sorted({1, 7, *tokenizer.convert_tokens_to_ids(["Ġthe", "7"])})
    )
    with pytest.raises(ValueError, match=r"' they thing' is \d+: \['Ġthe"):
        find_token_ids(tokenizer, (" they thing",), 300)
    with pytest.raises(ValueError, match="'' is 0"):
        find_token_ids(tokenizer, ("",), 300)
    for outside in (-1, 300):
        with pytest.raises(ValueError, match=rf"in \[0, 300\); got the id {outside}"):
            find_token_ids(tokenizer, (outside,), 300)


A_TEXT = LocalDocuments(["aaaaaaaaa", "aaaa", "aa"], "a's")
ALL_BUT_B = {"exclude_tokens": ("a",), "context_size": 4, "held_out_fraction": 1e-9}


def read_on(contexts: ContextStream, b: int) -> None:
    for _ in range(200):
        contexts.next_batch(b)


@pytest.mark.parametrize("b", [1, 50])
def test_text_that_keeps_no_token_is_refused_after_an_epoch(b: int) -> None:
    barren = stream(A_TEXT, Characters(0), **ALL_BUT_B)
    with pytest.raises(ValueError, match=r"`data\.exclude_tokens`.*\"a's\" kept none.*excluded"):
        read_on(barren, b)
    assert barren.epoch == 1 or b == 50


def test_an_epoch_read_in_part_is_not_judged() -> None:
    going_on = stream(A_TEXT, Characters(0), **ALL_BUT_B)
    going_on.load_state_dict(going_on.state_dict() | {"place": 1})
    with pytest.raises(ValueError, match="kept none"):
        read_on(going_on, 1)
    assert going_on.epoch == 2


def test_one_kept_token_an_epoch_is_enough() -> None:
    one_kept = LocalDocuments(["aaaaaaaaa", "aaaa", "aab", "aaaaaaaaaaaaaaa"], "t")
    rarely = stream(one_kept, Characters(0), **ALL_BUT_B)
    read_on(rarely, 1)
    assert rarely.epoch > 10


def test_padding_is_a_token_that_the_model_reads() -> None:
    options = {"held_out_fraction": 1e-9, "context_size": 4, "vocabulary_size": 1}
    (batch,) = stream(LocalDocuments(["ab"], "t"), Characters(None), **options).batches(1)
    assert batch.tokens.tolist() == [[97, 98, 0, 0]]


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('no system messages') }}{% endif %}"
    "<{{ message.role }}> {{ message.content }}{{ eos_token }}{% endfor %}"
)


def chat(*messages: tuple[str, str]) -> Content:
    rows = [{"role": role, "content": text} for role, text in messages]
    return DocumentColumn("chat").read(rows, "here")


@pytest.mark.parametrize(("bos", "n_bos"), [("document", 1), ("context", 1), ("none", 1)])
def test_conversations_are_written_out_by_the_template(
    tiny_lm_folder: Path, bos: str, n_bos: int
) -> None:
    """The template's own BOS stays, and no other is put before it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_folder)
    options = {"content": "chat", "held_out_fraction": 1e-9, "context_size": 128, "bos": bos}
    talks = [[("user", "the thing"), ("assistant", "ok")], [("user", "so?")]]
    documents = LocalDocuments([chat(*talk) for talk in talks], "talks")
    with pytest.raises(ValueError, match=r"`data\.content` chat needs .* chat template"):
        stream(documents, tokenizer, **options)
    tokenizer.chat_template = TEMPLATE
    (batch,) = stream(documents, tokenizer, **options).batches(4)
    for index, talk in enumerate(talks):
        ids = batch.tokens[batch.document_ids == index].tolist()
        text = "".join(f"<{role}> {said}<eos>" for role, said in talk)
        assert tokenizer.decode(ids) == "<bos>" + text
        assert ids.count(BOS) == n_bos
    refused = LocalDocuments([chat(("system", "be"), ("user", "hm"))], "talks")
    with pytest.raises(ValueError, match=r"refuses number 0 of 'talks', .* system, user: no sys"):
        stream(refused, tokenizer, **options).next_batch(1)


def test_token_ids_give_the_contexts_of_their_text(
    documents: LocalDocuments, tokenizer: Any
) -> None:
    ids = [
        array("i", tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in documents.contents
    ]
    options = {"held_out_fraction": 1e-9, "vocabulary_size": 300}
    text = stream(documents, tokenizer, **options)
    tokens = stream(LocalDocuments(ids, "ids"), tokenizer, content="tokens", **options)
    for _ in range(5):
        assert_same(tokens.next_batch(8), text.next_batch(8))


@pytest.mark.parametrize("wrong", [300, -1])
def test_token_ids_that_the_model_does_not_read_are_refused(tokenizer: Any, wrong: int) -> None:
    ids = [array("i", [4, 5]), array("i", [6, wrong, 7])]
    options = {"content": "tokens", "held_out_fraction": 1e-9, "vocabulary_size": 300}
    message = rf"\[0, 300\); document 1 of 'ids', counted from 0, holds {wrong}\."
    with pytest.raises(ValueError, match=message):
        stream(LocalDocuments(ids, "ids"), tokenizer, **options)
    on_disk = stream(LocalDocuments(tuple(ids), "ids"), tokenizer, **options)
    with pytest.raises(ValueError, match=message):
        on_disk.next_batch(1)


def test_padding_is_masked_by_place_and_not_by_id() -> None:
    """A text may hold the id that pads: here character 1 is PAD's id, in the text and behind it."""
    text = LocalDocuments(["ab\x01"], "t")
    options = {"mask": (), "held_out_fraction": 1e-9}
    (last,) = stream(text, Characters(bos_token_id=None), **options).batches(1)
    assert last.is_kept.tolist() == [[True] * 3 + [False] * 13]


def test_a_part_without_documents_says_what_to_change(tokenizer: Any) -> None:
    few = LocalDocuments(["a", "b", "c"], "few")
    with pytest.raises(ValueError, match=r"'few'.*held_out_fraction` 1e-06 of its 3.* 0 are held"):
        stream(few, tokenizer, part="held_out", held_out_fraction=1e-6)
    with pytest.raises(ValueError, match=r"rank 3 of 4"):
        stream(few, tokenizer, held_out_fraction=1e-6, rank=3, world_size=4)


def test_long_documents_cause_no_warning(
    tiny_lm_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    long = LocalDocuments(["word " * 400], "long")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_folder)  # a tokenizer warns only once
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        list(stream(long, tokenizer, held_out_fraction=1e-9).batches(4))
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_tokenizing_in_groups_changes_nothing(
    documents: LocalDocuments, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(islice(stream(documents, tokenizer).batches(8), 20))
    monkeypatch.setattr(tokenizing, "CHARACTERS_PER_CALL", 300)
    for a, b in zip(expected, stream(documents, tokenizer).batches(8), strict=False):
        assert_same(a, b)
