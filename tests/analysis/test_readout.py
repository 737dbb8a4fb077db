"""The read-out of other model families: norms of other kinds, in other places, with other names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sae.evals.readout import find_final_norm, find_readout, probe_norm

D, VOCABULARY = 24, 40
SMALL: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": D, "n_layer": 1, "n_head": 2, "n_positions": 16},
    "GPTNeoX": {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2},
    "Gemma": {
        "hidden_size": D,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "intermediate_size": 32,
    },
    "OPT": {
        "hidden_size": D,
        "word_embed_proj_dim": D,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}
FINAL_NORM = {
    "GPT2": "transformer.ln_f",
    "GPTNeoX": "gpt_neox.final_layer_norm",
    "Gemma": "model.norm",
    "OPT": "model.decoder.final_layer_norm",
}


def make_model(family: str) -> nn.Module:
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, **SMALL[family], **special
    )
    kind = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, kind)(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * 0.5)
    return model


@pytest.mark.parametrize("family", SMALL)
def test_effects_are_the_derivative_of_the_logits(family: str):
    """Where h is orthogonal to C d, d logits(h + s d) / ds is e_k / rms(C h) exactly."""
    model = make_model(family)
    norm = model.get_submodule(FINAL_NORM[family])
    assert find_final_norm(model) is norm
    readout, note = find_readout(model, D)
    assert readout is not None, note
    head = model.get_output_embeddings()

    generator = torch.Generator().manual_seed(1)
    h, d = torch.randn(2, 1, 1, D, generator=generator, dtype=torch.float64) * 3
    centred = d - d.mean() if readout.is_centred else d
    h = h - (h * centred).sum() / centred.square().sum() * centred
    _, moved = torch.autograd.functional.jvp(lambda x: head(norm(x)), h, d)
    said = readout.logits(d[0].float())[0].double()
    ratio = (said @ moved[0, 0]) / moved.square().sum()
    assert ratio > 0
    torch.testing.assert_close(said, ratio * moved[0, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("d", [7, 8])
def test_a_norm_is_read_off_its_answers(d: int):
    weight = torch.linspace(0.5, 2, d)
    for norm, is_centred in ((nn.LayerNorm(d), True), (nn.RMSNorm(d), False)):
        with torch.no_grad():
            norm.weight.copy_(weight)
        found, centred = probe_norm(norm, d, torch.zeros(1))
        torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-5)
        assert centred == is_centred


def test_a_model_without_a_final_norm_says_so():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(D, VOCABULARY)

        def get_output_embeddings(self):
            return self.head

    readout, note = find_readout(Bare(), D)
    assert readout is None
    assert "final norm" in note
