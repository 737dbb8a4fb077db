from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.config import DataConfig
from sae.stream import tokens as tokens_module
from sae.stream.contexts import Contexts
from sae.stream.documents import LocalDocuments, is_held_out, open_documents
from sae.stream.masks import TokenMask
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


def stream(documents: Any, tokenizer: Any, **options: Any) -> ContextStream:
    names = ("part", "seed", "rank", "world_size")
    place = {name: options.pop(name) for name in names if name in options}
    cfg = DataConfig(**{"context_size": 16, "held_out_fraction": 0.2, **options})
    return ContextStream(documents, tokenizer, cfg, **{"part": "train", **place})


def text_of(tokens: list[int], document_ids: list[int], tokenizer: Any) -> dict[int, list[int]]:
    """Collect each document's tokens, without BOS."""
    texts: dict[int, list[int]] = {}
    for token, document in zip(tokens, document_ids, strict=True):
        if token != tokenizer.bos_token_id and document >= 0:
            texts.setdefault(document, []).append(token)
    return texts


def flat(batches: list[Contexts], name: str) -> list[int]:
    return [value for batch in batches for value in getattr(batch, name).flatten().tolist()]


def assert_same(a: Contexts, b: Contexts) -> None:
    for name in ("tokens", "document_ids", "is_kept"):
        assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("part", ["train", "held_out"])
def test_a_pass_holds_every_token_of_its_documents_once(
    documents: LocalDocuments, tokenizer: Any, part: str, prepend_bos: bool
) -> None:
    batches = list(stream(documents, tokenizer, part=part, prepend_bos=prepend_bos).batches(7))
    found = text_of(flat(batches, "tokens"), flat(batches, "document_ids"), tokenizer)
    chosen = {
        i: text
        for i, text in enumerate(documents.texts)
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


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    context_size=st.integers(2, 9),
    has_bos=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_packing_against_a_plain_reference(
    lengths: list[int], context_size: int, has_bos: bool
) -> None:
    texts = [chr(97 + i) * length for i, length in enumerate(lengths)]
    tokenizer = _Characters(bos_token_id=0 if has_bos else None)
    options = {"context_size": context_size, "held_out_fraction": 1e-9, "mask": ()}
    batches = list(stream(LocalDocuments(texts, "t"), tokenizer, **options).batches(3))
    rows: list[list[int]] = [[]]
    for document in LocalDocuments(texts, "t").visit(seed=0, epoch=0):
        is_new = True
        for character in document.text:
            if len(rows[-1]) == context_size:
                rows.append([])
            if has_bos and (is_new or not rows[-1]):
                rows[-1].append(0)
                if len(rows[-1]) == context_size:
                    rows.append([0])
            rows[-1].append(ord(character))
            is_new = False
    padding = context_size - len(rows[-1])
    rows[-1] += [_Characters.pad_token_id] * padding
    assert [row for batch in batches for row in batch.tokens.tolist()] == rows
    assert (~batches[-1].is_kept).sum() == padding


class _Characters:
    """A tokenizer whose tokens are characters."""

    eos_token_id = None
    pad_token_id = 1

    def __init__(self, bos_token_id: int | None) -> None:
        self.bos_token_id = bos_token_id
        self.all_special_ids = [] if bos_token_id is None else [bos_token_id]

    def __call__(self, texts: list[str], **_options: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


def test_resuming_gives_the_same_batches(documents: LocalDocuments, tokenizer: Any) -> None:
    """At the start, inside documents, around the first epoch's edge, in the third epoch."""
    whole = stream(documents, tokenizer, seed=1)
    edge = len(list(whole.batches(11)))
    checks = {0, 1, 3, edge - 2, edge - 1, edge, edge + 1, 2 * edge + 5}
    epochs = set()
    for n_before in range(max(checks) + 1):
        if n_before in checks:
            epochs.add(whole.epoch)
            _check_resume(documents, tokenizer, json.loads(json.dumps(whole.state_dict())))
        whole.next_batch(11)
    assert epochs == {0, 1, 2}


def _check_resume(documents: LocalDocuments, tokenizer: Any, state: dict[str, Any]) -> None:
    """Continue twice from `state`, once after other batches, once to what an unbroken run gives."""
    resumed, whole = (stream(documents, tokenizer, seed=1) for _ in range(2))
    resumed.next_batch(2)
    resumed.load_state_dict(state)
    while whole.state_dict() != state:
        whole.next_batch(11)
    assert resumed.epoch == whole.epoch
    for _ in range(3):
        assert_same(resumed.next_batch(11), whole.next_batch(11))
        assert resumed.state_dict() == whole.state_dict()


@given(size=st.integers(2, 12), n=st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_every_context_edge_can_be_resumed(size: int, n: int) -> None:
    texts = LocalDocuments(["abc", "de", "f", "ghijklmno", "pq"], "t")
    options = {"context_size": size, "held_out_fraction": 1e-9}
    whole, resumed = (stream(texts, _Characters(0), **options) for _ in range(2))
    for _ in range(n):
        whole.next_batch(1)
    resumed.load_state_dict(whole.state_dict())
    assert_same(resumed.next_batch(4), whole.next_batch(4))


def test_epochs_differ_in_order_and_not_in_content() -> None:
    texts = LocalDocuments([f"{i:07}" for i in range(32)], "t")
    options = {"context_size": 8, "held_out_fraction": 1e-9}
    whole = stream(texts, _Characters(0), **options)
    epochs = [whole.next_batch(32).tokens.tolist() for _ in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def test_ranks_read_different_documents(documents: LocalDocuments, tokenizer: Any) -> None:
    seen = []
    for rank in range(3):
        batches = stream(documents, tokenizer, rank=rank, world_size=3).batches(8)
        seen.append({i for batch in batches for i in batch.document_ids.flatten().tolist()} - {-1})
    train = {i for i, text in enumerate(documents.texts) if not is_held_out(text, 0.2)}
    assert seen[0] | seen[1] | seen[2] == train
    assert sum(map(len, seen)) == len(train)


def test_a_pass_neither_uses_nor_moves_the_position(
    documents: LocalDocuments, tokenizer: Any
) -> None:
    one, other = (stream(documents, tokenizer) for _ in range(2))
    first = next(one.batches(4))
    one.next_batch(3)
    other.next_batch(3)
    assert_same(next(one.batches(4)), first)
    assert_same(one.next_batch(3), other.next_batch(3))


def test_a_position_of_another_stream_is_refused(documents: LocalDocuments, tokenizer: Any) -> None:
    state = stream(documents, tokenizer).state_dict()
    for change in ({"seed": 1}, {"world_size": 2}, {"context_size": 8}, {"part": "held_out"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            stream(documents, tokenizer, **change).load_state_dict(state)
    with pytest.raises(ValueError, match="n_documents"):
        stream(LocalDocuments(documents.texts[:-1], "t"), tokenizer).load_state_dict(state)


def mask_of(tokenizer: Any, *names: Any) -> tuple[list[list[bool]], dict[str, float]]:
    mask = TokenMask.of(tokenizer, names)
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


def test_padding_is_masked_by_place_and_not_by_id() -> None:
    """A text may hold the id that pads: here character 1 is PAD's id, in the text and behind it."""
    text = LocalDocuments(["ab\x01"], "t")
    options = {"mask": (), "held_out_fraction": 1e-9}
    (last,) = stream(text, _Characters(bos_token_id=None), **options).batches(1)
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
    monkeypatch.setattr(tokens_module, "CHARACTERS_PER_CALL", 300)
    for a, b in zip(expected, stream(documents, tokenizer).batches(8), strict=False):
        assert_same(a, b)
