from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae.stream.hookpoints import (
    Hookpoint,
    capture,
    edit,
    find_hookpoint,
    find_hookpoints,
    find_hookpoints_of,
    width,
)


@pytest.fixture(scope="module")
def lm(tiny_lm_folder: Path) -> Any:
    from sae.stream.quiet import quiet_transformers

    with quiet_transformers():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny_lm_folder)
    return model.eval().requires_grad_(False)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))


@contextmanager
def counting_runs(model: nn.Module) -> Iterator[list[str]]:
    """Collect the paths of the modules whose forward begins."""
    ran: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _m, _a, path=path: ran.append(path))
        for path, module in model.named_modules()
    ]
    yield ran
    for handle in handles:
        handle.remove()


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.layers.2", ["model.layers.2"]),
        ("layers.2", ["model.layers.2"]),
        ("layers.2:in", ["model.layers.2:in"]),
        ("model.layers.2:out", ["model.layers.2"]),
        ("model.layers.*", [f"model.layers.{i}" for i in range(4)]),
        ("layers.[13].mlp", ["model.layers.1.mlp", "model.layers.3.mlp"]),
        ("**.q_proj", [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_patterns(lm: nn.Module, pattern: str, expected: list[str]) -> None:
    assert [str(hookpoint) for hookpoint in find_hookpoints(lm, pattern)] == expected


def test_commas_separate_patterns_and_nothing_comes_twice(lm: nn.Module) -> None:
    found = find_hookpoints_of(lm, "layers.2:in, layers.[12],layers.2")
    assert [str(h) for h in found] == ["model.layers.2:in", "model.layers.1", "model.layers.2"]
    with pytest.raises(ValueError, match=r"'layers.9'.*matches none"):
        find_hookpoints_of(lm, "layers.1, layers.9")


class _Heads(nn.Module):
    """Attention whose heads go through a module of their own, (b, t, heads, d_head)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.heads = nn.Embedding(9, 6), nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.heads(self.mix(tokens).unflatten(-1, (3, 2))).flatten(-2)


def test_heads_come_concatenated() -> None:
    model, tokens = _Heads(), torch.arange(6).view(2, 3)
    captured = capture(model, [Hookpoint("heads")], tokens)[Hookpoint("heads")]
    torch.testing.assert_close(captured, model(tokens))
    with edit(model, Hookpoint("heads"), lambda x: x * torch.tensor([0.0, 1, 1])[:, None]):
        edited = model(tokens)
    assert (edited[..., :2] == 0).all()
    assert (edited[..., 2:] == captured[..., 2:]).all()


def test_no_match_lists_near_paths(lm: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"'model\.layer\.2'.*model\.layers\.2.*layers\.\*\.mlp"):
        find_hookpoint(lm, "model.layer.2")


def test_several_matches_are_listed(lm: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"exactly one.*4: model\.layers\.0, model\.layers\.1"):
        find_hookpoint(lm, "layers.*")


@pytest.mark.parametrize("pattern", ["model.norm:inside", "", ":in"])
def test_malformed_patterns(lm: nn.Module, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"side|empty"):
        find_hookpoint(lm, pattern)


def test_capture_equals_hidden_states(lm: Any, tokens: Tensor) -> None:
    found = [*find_hookpoints(lm, "layers.[012]"), Hookpoint("model.layers.1", "in")]
    captured = capture(lm, found, tokens)
    states = lm(tokens, output_hidden_states=True).hidden_states
    for hookpoint in found:
        layer = int(hookpoint.path[-1])
        expected = states[layer + (hookpoint.side == "out")]
        torch.testing.assert_close(captured[hookpoint], expected, rtol=0, atol=0)


def test_capture_keeps_bfloat16(lm: Any, tokens: Tensor) -> None:
    import copy

    half = copy.deepcopy(lm).to(torch.bfloat16)
    assert capture(half, [Hookpoint("model.layers.0")], tokens).popitem()[1].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("pattern", "last"),
    [("layers.1", "model.layers.1.mlp.act_fn"), ("layers.1:in", "model.layers.1")],
)
def test_forward_stops_after_the_last_hookpoint(
    lm: nn.Module, tokens: Tensor, pattern: str, last: str
) -> None:
    with counting_runs(lm) as ran:
        capture(lm, [Hookpoint("model.layers.0"), find_hookpoint(lm, pattern)], tokens)
    assert last in ran
    assert not [path for path in ran if path.startswith(("model.layers.2", "lm_head"))]
    assert pattern == "layers.1" or not [path for path in ran if path.startswith("model.layers.1.")]


def test_capture_leaves_nothing_behind(lm: Any, tokens: Tensor) -> None:
    before, clean = n_hooks(lm), lm(tokens).logits
    capture(lm, [Hookpoint("model.layers.0")], tokens)
    with pytest.raises(ValueError, match=r"\(b, t, d\)"):
        capture(lm, [Hookpoint("model.rotary_emb")], tokens)
    with pytest.raises(IndexError):
        capture(lm, [Hookpoint("model.layers.0")], tokens + 10_000)
    assert n_hooks(lm) == before
    torch.testing.assert_close(lm(tokens).logits, clean, rtol=0, atol=0)


def test_captured_activations_can_train_a_coder(lm: nn.Module, tokens: Tensor) -> None:
    x = capture(lm, [Hookpoint("model.layers.0")], tokens).popitem()[1]
    weight = torch.ones(32, 3, requires_grad=True)
    (x @ weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, other: Tensor | None = None, *, hidden_states: Tensor) -> tuple:
        del other
        return self.linear(hidden_states), "cache"


class _Toy(nn.Module):
    """Tuples out, keywords in, flattened tokens inside, and a module that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.block = _Block()
        self.flat = nn.Linear(4, 5)
        self.unused = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.block(hidden_states=self.embed(tokens))
        return self.flat(x.view(-1, 4)).view(*tokens.shape, 5)


def test_tuples_keywords_and_flattened_tokens() -> None:
    toy, tokens = _Toy(), torch.arange(6).view(2, 3)
    points = [Hookpoint("block"), Hookpoint("block", "in"), Hookpoint("flat")]
    captured = capture(toy, points, tokens)
    embedded = toy.embed(tokens)
    torch.testing.assert_close(captured[points[0]], toy.block.linear(embedded))
    torch.testing.assert_close(captured[points[1]], embedded)
    torch.testing.assert_close(captured[points[2]], toy(tokens))


def test_edit_of_keyword_inputs_and_tuple_outputs() -> None:
    toy, tokens = _Toy(), torch.arange(6).view(2, 3)
    for side in ("in", "out"):
        with edit(toy, Hookpoint("block", side), torch.zeros_like):
            edited = toy(tokens)
        zeros = torch.zeros(2, 3, 4)
        inside = toy.block.linear(zeros) if side == "in" else zeros
        torch.testing.assert_close(edited, toy.flat(inside))


def test_a_module_that_never_runs_is_named() -> None:
    with pytest.raises(RuntimeError, match="unused did not"):
        capture(_Toy(), [Hookpoint("embed"), Hookpoint("unused")], torch.zeros(1, 2).long())


@pytest.mark.parametrize("side", ["in", "out"])
def test_edit_by_identity_changes_nothing(lm: Any, tokens: Tensor, side: Any) -> None:
    clean = lm(tokens).logits
    with edit(lm, Hookpoint("model.layers.1", side), lambda x: x.double().clone()):
        torch.testing.assert_close(lm(tokens).logits, clean, rtol=0, atol=0)


def test_edit_of_one_side_is_seen_from_the_other(lm: Any, tokens: Tensor) -> None:
    point = Hookpoint("model.layers.2", "in")
    with edit(lm, Hookpoint("model.layers.1"), lambda x: 2 * x):
        seen = capture(lm, [point], tokens)[point]
    torch.testing.assert_close(seen, 2 * capture(lm, [point], tokens)[point])


def test_edit_works_while_generating(lm: Any, tokens: Tensor) -> None:
    lengths: list[int] = []

    def steer(x: Tensor) -> Tensor:
        lengths.append(x.shape[1])
        return x + 50 * torch.linspace(-1, 1, x.shape[-1])

    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    mask = torch.ones_like(tokens)
    clean = lm.generate(tokens, attention_mask=mask, **options)
    with edit(lm, Hookpoint("model.layers.1"), steer):
        steered = lm.generate(tokens, attention_mask=mask, **options)
    assert lengths == [7, 1, 1, 1, 1]
    assert not torch.equal(clean, steered)
    assert torch.equal(clean, lm.generate(tokens, attention_mask=mask, **options))


def test_edit_must_keep_the_shape_and_leaves_no_hook(lm: Any, tokens: Tensor) -> None:
    before = n_hooks(lm)
    with (
        pytest.raises(ValueError, match=r"model\.layers\.1.*\(2, 7, 32\).*\(2, 7, 31\)"),
        edit(lm, Hookpoint("model.layers.1"), lambda x: x[..., 1:]),
    ):
        lm(tokens)
    assert n_hooks(lm) == before


def test_edit_passes_gradients(lm: Any, tokens: Tensor) -> None:
    direction = torch.zeros(32, requires_grad=True)
    with edit(lm, Hookpoint("model.layers.1"), lambda x: x + direction):
        lm(tokens).logits.square().sum().backward()
    assert direction.grad is not None
    assert direction.grad.abs().sum() > 0


def test_width(lm: nn.Module) -> None:
    assert width(lm, Hookpoint("model.layers.0"), "cpu") == 32
    assert width(lm, Hookpoint("model.layers.0.mlp.down_proj", "in"), "cpu") == 64


@pytest.mark.parametrize("side", ["in", "out"])
def test_threads_read_one_model_without_seeing_each_other(lm: nn.Module, tokens: Tensor, side: Any):
    """Both forwards are inside the first layer, with both hooks set, before either goes on."""
    hookpoint = Hookpoint("model.layers.1", side)
    inputs = (tokens, tokens.flip(0))
    alone = [capture(lm, [hookpoint], x)[hookpoint] for x in inputs]
    both = threading.Barrier(2, timeout=30)

    def wait(*_: Any) -> None:
        both.wait()

    handle = lm.get_submodule("model.layers.0").register_forward_pre_hook(wait)
    try:
        with ThreadPoolExecutor(2) as pool:
            read = list(pool.map(lambda x: capture(lm, [hookpoint], x)[hookpoint], inputs))
    finally:
        handle.remove()
    for one, other in zip(read, alone, strict=True):
        assert torch.equal(one, other)
