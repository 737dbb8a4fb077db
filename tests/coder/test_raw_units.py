"""Coders taken from training units to raw ones, and coders that norm their tokens themselves."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from coder_variants import OPEN_TO_SAELENS, VARIANTS, make_variant
from torch import Tensor

import sae
from sae.coder import SparseCoder, fold_affine, save_dictionary, with_layer_norm
from sae.coder.layer_norm import layer_norm

D_IN, D_SAE = 10, 24


def make_coder(name: str = "topk") -> SparseCoder:
    return make_variant(name, d_in=D_IN, d_sae=D_SAE, k=4)


def inputs(n: int = 30) -> Tensor:
    return 3 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(2)) + 4


def affine(shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """A large shift, and a factor with its inverse: one a dimension, or a symmetric matrix."""
    generator = torch.Generator().manual_seed(5)
    shift = 1000 * torch.randn(D_IN, generator=generator)
    sizes = torch.logspace(-1, 1, D_IN).double()
    if shape == "diagonal":
        return shift, sizes.float(), (1 / sizes).float()
    turn = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=generator).double()).Q
    return shift, *(((turn * s) @ turn.T).float() for s in (sizes, 1 / sizes))


@pytest.mark.parametrize("activation", [name for name in VARIANTS if "pursuit" not in name])
@pytest.mark.parametrize("shape", ["diagonal", "matrix"])
@torch.no_grad()
def test_an_affine_map_is_folded(activation: str, shape: str):
    """The shift is a thousand times what varies: float32 alone would lose four digits of it."""
    coder, (shift, factor, inverse) = make_coder(activation), affine(shape)
    x = inputs(200) + shift
    trained = (x.double() - shift.double()) @ (
        factor.double().diag() if shape == "diagonal" else factor.double()
    )
    raw = fold_affine(coder, shift, factor, inverse)
    exact = make_coder(activation).double()
    code = exact.encode(trained)
    torch.testing.assert_close(
        raw.encode(x).double(), code, rtol=1e-5, atol=1e-5 * float(code.max())
    )
    undone = torch.linalg.inv(factor.double().diag() if shape == "diagonal" else factor.double())
    expected = exact(trained) @ undone + shift
    # A refinement reconstructs in raw units on the way: rounded at the shift's size, once more.
    rtol = 5e-6 if coder.cfg.refine_step else 1e-6
    torch.testing.assert_close(raw(x).double(), expected, rtol=rtol, atol=1e-4)
    assert not torch.allclose(raw.W_dec.norm(dim=1), coder.W_dec.norm(dim=1))


@pytest.mark.parametrize("activation", VARIANTS)
@torch.no_grad()
def test_a_coder_with_a_layer_norm_norms_and_undoes_it(activation: str):
    coder = make_coder(activation)
    raw = with_layer_norm(coder)
    assert not coder.has_layer_norm
    x = inputs().reshape(5, 6, D_IN)
    mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    normed = layer_norm(x)
    assert torch.equal(raw.encode(x), coder.encode(normed))
    assert torch.equal(raw.encode_sparse(x).values, coder.encode_sparse(normed).values)
    expected = coder(normed) * deviation + mean
    torch.testing.assert_close(raw(x), expected)
    torch.testing.assert_close(raw.decode(raw.encode(x)), coder(normed))
    torch.testing.assert_close(raw.decode_for(raw.encode(x), x), expected)
    rows = x.reshape(-1, D_IN)
    torch.testing.assert_close(
        raw.decode_for(raw.encode_sparse(rows), rows), expected.reshape(-1, D_IN)
    )
    torch.testing.assert_close(raw.direction_for(3, x), coder.W_dec[3] * deviation)
    assert torch.equal(coder.direction_for(3, x), coder.W_dec[3])
    assert torch.equal(coder.decode_for(coder.encode(x), x), coder.decode(coder.encode(x)))


@torch.no_grad()
def test_a_layer_norm_of_16_bit_tokens_is_taken_in_float32():
    raw = with_layer_norm(make_coder())
    x = (inputs() + 200).bfloat16()
    assert torch.equal(raw.encode(x), raw.encode(x.float()))
    in_16_bits, x = raw.bfloat16(), inputs() + 200
    normed = layer_norm(x).bfloat16()
    assert torch.equal(in_16_bits.encode(x), make_coder().bfloat16().encode(normed))
    assert in_16_bits(x.bfloat16()).dtype == torch.bfloat16


def test_a_layer_norm_goes_to_the_folder_and_back_in_saelens_words(tmp_path: Path):
    raw = with_layer_norm(make_coder())
    save_dictionary(raw, tmp_path / "d")
    path = tmp_path / "d/cfg.json"
    config = json.loads(path.read_text())
    assert config["normalize_activations"] == "layer_norm"
    torch.save(raw.state_dict(), tmp_path / "d/weights.pt")
    for again in (sae.load(tmp_path / "d"), sae.load(tmp_path / "d/weights.pt")):
        assert again.has_layer_norm
        assert torch.equal(again(inputs()), raw(inputs()))
    path.write_text(json.dumps({**config, "metadata": {}}))  # as SAELens itself writes it
    foreign = sae.load(tmp_path / "d")
    torch.testing.assert_close(foreign(inputs()), raw(inputs()))
    for metadata in ({}, config["metadata"]):
        strange = {**config, "normalize_activations": "constant_norm_rescale", "metadata": metadata}
        path.write_text(json.dumps(strange))
        with pytest.raises(ValueError, match="must be none or layer_norm; got 'constant_norm"):
            sae.load(tmp_path / "d")


@pytest.mark.sae_lens
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="sae-lens not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", OPEN_TO_SAELENS)
@pytest.mark.parametrize("kind", ["folded", "layer_norm"])
def test_saelens_opens_what_was_normalised(activation: str, kind: str, tmp_path: Path):
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    coder, x = make_coder(activation), inputs()
    if coder.is_tied and kind == "folded":
        return  # one matrix cannot take an affine map
    raw = with_layer_norm(coder) if kind == "layer_norm" else fold_affine(coder, *affine("matrix"))
    x = x if kind == "layer_norm" else x + affine("matrix")[0]
    save_dictionary(raw, tmp_path)
    theirs = SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(theirs.encode(x), raw.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(x), raw(x), rtol=1e-5, atol=1e-4)
