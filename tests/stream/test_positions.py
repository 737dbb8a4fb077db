"""Going on from any position, and the share of each rank: nothing twice, nothing lost."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_stand_ins import Characters, HubRows, assert_same, make_stream

from sae.stream.content import DocumentColumn
from sae.stream.documents import LocalDocuments, StreamedDocuments, is_held_out, visit_part
from sae.stream.tokens import ContextStream

BOS_POLICIES = ("document", "context", "none")
CONTEXT_KINDS = ("packed", "document")
TEXTS = ["abc", "de", "f", "ghijklmnopqrstu", "vw", "xyz", "0123456", "78", "9"]
TALKS = [[{"role": "user", "content": text}] for text in TEXTS]
CHATS = [DocumentColumn("chat").read(talk, "here") for talk in TALKS]
# Every third begins with a BOS of its own.
IDS = [array("i", [0] * (i % 3 == 0) + [ord(c) for c in text]) for i, text in enumerate(TEXTS)]
SOURCES: dict[str, tuple[str, Any]] = {
    "text": ("text", LocalDocuments(TEXTS, "t")),
    "chat": ("chat", LocalDocuments(CHATS, "t")),
    "tokens": ("tokens", LocalDocuments(IDS, "t")),
    "streamed text": ("text", StreamedDocuments(HubRows([TEXTS[:4], TEXTS[4:]]), "content", "t")),
    "streamed chat": (
        "chat",
        StreamedDocuments(HubRows([TALKS[:4], TALKS[4:]]), "content", "t", "chat"),
    ),
    "streamed tokens": (
        "tokens",
        StreamedDocuments(HubRows([list(map(list, IDS))]), "content", "t", "tokens"),
    ),
}


def walked(stream: ContextStream, n: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return the position before each of n contexts, as JSON gives it back, and the contexts."""
    states, contexts = [], []
    for _ in range(n):
        states.append(json.loads(json.dumps(stream.state_dict())))
        contexts.append(stream.next_batch(1))
    return states, contexts


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("bos", BOS_POLICIES)
@pytest.mark.parametrize("contexts", CONTEXT_KINDS)
def test_going_on_from_every_context_gives_the_same(contexts: str, bos: str, source: str) -> None:
    content, documents = SOURCES[source]
    options = {"content": content, "contexts": contexts, "bos": bos, "context_size": 5, "seed": 3}

    def make() -> ContextStream:
        return make_stream(documents, Characters(0), held_out_fraction=1e-9, **options)

    n = 1 + max(3 * len(list(make().batches(1))), 30)
    states, expected = walked(make(), n)
    for i in range(n - 3):
        resumed = make()
        resumed.next_batch(2)
        resumed.load_state_dict(states[i])
        for batch in expected[i : i + 3]:
            assert_same(resumed.next_batch(1), batch)
        assert resumed.state_dict() == states[i + 3]

    # The positions tried lie on both sides of epochs' edges and in the middle of documents.
    assert {0, 1, 2} <= {state["epoch"] for state in states}
    firsts = [int(batch.document_ids[0, 0]) for batch in expected]
    goes_on = [a == b for a, b in pairwise(firsts)]
    assert any(state["offset"] > 0 for state, b in zip(states[1:], goes_on, strict=True) if b)


@given(
    size=st.integers(2, 12),
    b=st.integers(1, 4),
    n=st.integers(0, 20),
    contexts=st.sampled_from(CONTEXT_KINDS),
    bos=st.sampled_from(BOS_POLICIES),
    source=st.sampled_from(sorted(SOURCES)),
    has_bos=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_batch_edge_can_be_resumed(
    size: int, b: int, n: int, contexts: str, bos: str, source: str, has_bos: bool
) -> None:
    content, documents = SOURCES[source]
    options = {"content": content, "contexts": contexts, "bos": bos, "context_size": size}
    options |= {"held_out_fraction": 1e-9}
    tokenizer = Characters(0 if has_bos else None)
    whole, resumed = (make_stream(documents, tokenizer, **options) for _ in range(2))
    for _ in range(n):
        whole.next_batch(b)
    resumed.load_state_dict(whole.state_dict())
    for _ in range(2):
        assert_same(resumed.next_batch(b), whole.next_batch(b))


def characters(contexts: Any) -> Counter[str]:
    """Count the tokens of documents, each of which is a character above U+00FF."""
    return Counter(chr(token) for token in contexts.tokens.flatten().tolist() if token > 0xFF)


@given(
    n=st.integers(1, 25),
    world_size=st.integers(1, 5),
    contexts=st.sampled_from(CONTEXT_KINDS),
    bos=st.sampled_from(BOS_POLICIES),
)
@settings(max_examples=40, deadline=None)
def test_ranks_read_every_training_document_once(
    n: int, world_size: int, contexts: str, bos: str
) -> None:
    texts = [chr(0x100 + i) * (1 + i % 7) for i in range(n)]
    train = [text for text in texts if not is_held_out(text, 0.3)]
    documents = LocalDocuments(texts, "t")
    found: Counter[str] = Counter()
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size}
        options = {"contexts": contexts, "bos": bos, "context_size": 4, "held_out_fraction": 0.3}
        if next(visit_part(documents, "train", 0.3, seed=0, epoch=0, **place), None) is None:
            continue
        for batch in make_stream(documents, Characters(0), **options, **place).batches(3):
            found += characters(batch)
    assert found == Counter("".join(train))


@given(n=st.integers(5, 25), world_size=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_ranks_read_every_document_once_in_each_epoch(n: int, world_size: int) -> None:
    """In contexts of one document each belongs to one epoch, so epochs can be told apart."""
    texts = [chr(0x100 + i) * (1 + i % 7) for i in range(n)]
    found: list[Counter[str]] = [Counter() for _ in range(3)]
    for rank in range(world_size):
        stream = make_stream(
            LocalDocuments(texts, "t"),
            Characters(0),
            contexts="document",
            context_size=4,
            held_out_fraction=1e-9,
            rank=rank,
            world_size=world_size,
        )
        while True:
            batch = stream.next_batch(1)
            if stream.epoch == len(found):
                break
            found[stream.epoch] += characters(batch)
    assert found == [Counter("".join(texts))] * len(found)


def test_a_position_of_another_stream_is_refused() -> None:
    def make(documents: Any = SOURCES["text"][1], **options: Any) -> ContextStream:
        return make_stream(documents, Characters(0), **{"held_out_fraction": 1e-9, **options})

    state = make().state_dict()
    for change in (
        {"seed": 1},
        {"world_size": 2},
        {"part": "held_out", "held_out_fraction": 0.9},
        {"content": "chat"},
        {"context_size": 8},
        {"contexts": "document"},
        {"bos": "none"},
    ):
        with pytest.raises(ValueError, match=f"the same {next(iter(change))}"):
            make(**change).load_state_dict(state)
    with pytest.raises(ValueError, match="n_documents"):
        make(LocalDocuments(TEXTS[:-1], "t")).load_state_dict(state)
