"""A dictionary's folder: what is written is what is read, by us and by SAELens."""

from __future__ import annotations

import importlib.util
import json
import pickle
from pathlib import Path

import pytest
import torch
from coder_variants import OPEN_TO_SAELENS, VARIANTS, make_variant
from safetensors.torch import load_file, save_file

import sae
from sae.coder import SparseCoder, load_dictionary, save_dictionary

D_IN, D_SAE = 10, 24


def make_coder(name: str = "topk") -> SparseCoder:
    return make_variant(name, d_in=D_IN, d_sae=D_SAE, k=4)


def inputs() -> torch.Tensor:
    return torch.randn(9, D_IN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("activation", VARIANTS)
def test_round_trip(activation: str, tmp_path: Path):
    coder = make_coder(activation)
    save_dictionary(coder, tmp_path / "d")
    again = sae.load(tmp_path / "d")
    assert again.cfg == coder.cfg
    assert again.metadata == coder.metadata
    assert torch.equal(again(inputs()), coder(inputs()))


@pytest.mark.parametrize("activation", VARIANTS)
def test_layout_is_saelens_v6(activation: str, tmp_path: Path):
    coder = make_coder(activation)
    coder.save(str(tmp_path / "d"))
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]
    config = json.loads((tmp_path / "d/cfg.json").read_text())
    tensors = load_file(tmp_path / "d/sae_weights.safetensors")
    assert config["architecture"] == ARCHITECTURES[activation]
    assert config["normalize_activations"] == "none"
    assert config["apply_b_dec_to_input"] is True
    of_latents = {name: (D_SAE,) for name in OWN_TENSORS.get(config["architecture"], ["b_enc"])}
    expected = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,), **of_latents}
    if coder.is_tied:
        expected = {name: expected[name] for name in ("W_dec", "b_dec")}
    assert {k: tuple(v.shape) for k, v in tensors.items()} == expected


ARCHITECTURES = {
    "topk": "topk",
    "signed": "sae_signed_topk",
    "multi_topk": "topk",
    "refined_topk": "sae_refined_topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "refined": "sae_refined_jumprelu",
    "jumprelu": "jumprelu",
    "jumprelu_tanh": "jumprelu",
    "jumprelu_quadratic": "jumprelu",
    "relu": "standard",
    "relu_p_norm": "standard",
    "relu_tanh": "sae_refined_standard",
    "gated": "gated",
    "matryoshka_gated": "gated",
    "matching_pursuit": "matching_pursuit",
    "matryoshka_pursuit": "matching_pursuit",
}
OWN_TENSORS = {
    "jumprelu": ["b_enc", "threshold"],
    "sae_refined_jumprelu": ["b_enc", "threshold", "first_threshold"],
    "gated": ["b_gate", "r_mag", "b_mag"],
}


@pytest.mark.parametrize("activation", OPEN_TO_SAELENS)
def test_a_saelens_config_without_ours_means_the_same(activation: str, tmp_path: Path):
    coder = make_coder(activation)
    save_dictionary(coder, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    del config["metadata"]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    torch.testing.assert_close(load_dictionary(tmp_path)(inputs()), coder(inputs()))


def test_foreign_options_are_folded(tmp_path: Path):
    """No b_dec in the encoder, and acts scaled by decoder norms: computed as SAELens defines it."""
    coder, x = make_coder(), inputs()
    with torch.no_grad():
        coder.W_dec.mul_(torch.rand(D_SAE, 1, generator=torch.Generator().manual_seed(4)) + 0.5)
    norms = coder.W_dec.norm(dim=1)
    pre_acts = (x @ coder.W_enc.T + coder.b_enc) * norms
    latents = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(4).indices, 1) * pre_acts.relu()
    expected = latents / norms @ coder.W_dec + coder.b_dec
    save_dictionary(coder, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    config |= {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True, "metadata": {}}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    torch.testing.assert_close(load_dictionary(tmp_path)(x), expected, rtol=1e-5, atol=1e-5)


def test_damaged_files_are_named(tmp_path: Path):
    coder = make_coder()
    save_dictionary(coder, tmp_path / "d")
    weights = tmp_path / "d/sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors.*truncated or damaged"):
        sae.load(tmp_path / "d")
    save_file({**load_or(whole, tmp_path), "b_dec": torch.zeros(3)}, weights)
    with pytest.raises(ValueError, match=r"`b_dec`.*must have shape \(10,\).*got \(3,\)"):
        sae.load(tmp_path / "d")
    (tmp_path / "d/cfg.json").write_text("{")
    with pytest.raises(ValueError, match=r"cfg\.json.*must be JSON"):
        sae.load(tmp_path / "d")


def load_or(whole: bytes, tmp_path: Path) -> dict[str, torch.Tensor]:
    (tmp_path / "whole.safetensors").write_bytes(whole)
    return load_file(tmp_path / "whole.safetensors")


def test_saving_never_replaces_other_files(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="must be empty or hold a dictionary"):
        save_dictionary(make_coder(), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_load_says_what_it_found(tmp_path: Path):
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(ValueError, match=r"must hold a dictionary.*other\.txt"):
        sae.load(tmp_path)
    with pytest.raises(ValueError, match="must exist or be a hub id"):
        sae.load(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="Did you mean 'saelens'"):
        sae.load(tmp_path, format="saelense")


class Bomb:
    """A pickle that runs code when it is opened."""

    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


def test_pickled_code_is_refused_unless_asked_for(tmp_path: Path):
    coder, marker = make_coder(), tmp_path / "ran"
    save_dictionary(coder, tmp_path / "d")
    file = tmp_path / "d/weights.pt"
    state = {**coder.state_dict(), "bomb": Bomb(str(marker))}
    file.write_bytes(pickle.dumps(state))
    torch.save(state, file)
    with pytest.raises(ValueError, match="carries pickled code"):
        sae.load(file)
    assert not marker.exists()
    assert torch.equal(sae.load(file, allow_pickle=True)(inputs()), coder(inputs()))
    assert marker.exists()


def test_a_plain_state_dict_loads_without_asking(tmp_path: Path):
    coder = make_coder()
    save_dictionary(coder, tmp_path / "d")
    torch.save(coder.state_dict(), tmp_path / "d/weights.pt")
    assert torch.equal(sae.load(tmp_path / "d/weights.pt")(inputs()), coder(inputs()))


@pytest.mark.sae_lens
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="sae-lens not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", OPEN_TO_SAELENS)
def test_saelens_opens_our_folder(activation: str, tmp_path: Path):
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    coder, x = make_coder(activation), inputs()
    save_dictionary(coder, tmp_path)
    theirs = SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(theirs.encode(x), coder.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs(x), coder(x), rtol=1e-5, atol=1e-6)
