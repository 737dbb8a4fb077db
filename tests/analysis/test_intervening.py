"""Splice, ablate and steer: exactly what they say, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae.analysis import OpenedRun, ablate, splice, steer, strongest_latents
from sae.coder import with_layer_norm
from sae.coder.layer_norm import layer_norm
from sae.stream.hookpoints import capture

TOKENS = torch.tensor([[0, 5, 9, 40, 17, 88, 120, 7], [0, 61, 3, 77, 200, 14, 15, 16]])
ROOT = Path(__file__).parent.parent.parent


def logits(run: OpenedRun) -> torch.Tensor:
    with torch.no_grad():
        return run.lm.module(TOKENS).logits


def activation(run: OpenedRun) -> torch.Tensor:
    return capture(run.lm.module, [run.hookpoint], TOKENS)[run.hookpoint]


def test_keeping_the_error_without_an_edit_changes_nothing(opened_run: OpenedRun):
    clean = logits(opened_run)
    with splice(opened_run.lm, opened_run.hookpoint, opened_run.coder, keep_error=True):
        assert torch.equal(logits(opened_run), clean)
    assert torch.equal(logits(opened_run), clean)


def test_splice_writes_the_reconstruction_except_at_the_first_position(opened_run: OpenedRun):
    x = activation(opened_run)
    with splice(opened_run.lm, opened_run.hookpoint, opened_run.coder):
        seen = activation(opened_run)
        assert (logits(opened_run) - 0).isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(seen[:, 1:], opened_run.coder(x)[:, 1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(seen[:, 0], x[:, 0])


def test_ablate_removes_what_the_latent_wrote(opened_run: OpenedRun):
    x, coder = activation(opened_run), opened_run.coder
    with torch.no_grad():
        code = coder.encode(x)
        latent = int(code[:, 1:].sum((0, 1)).argmax())
        expected = x - code[..., [latent]] * coder.W_dec[latent]
    with ablate(opened_run.lm, opened_run.hookpoint, coder, [latent]):
        seen = activation(opened_run)
    torch.testing.assert_close(seen[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[:, 1:], x[:, 1:])


def test_steer_adds_the_direction_everywhere(opened_run: OpenedRun):
    x = activation(opened_run)
    with steer(opened_run.lm, opened_run.hookpoint, opened_run.coder, 5, 3.0):
        seen = activation(opened_run)
    expected = x + 3 * opened_run.coder.W_dec[5].detach()
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)


def test_a_coder_with_a_layer_norm_intervenes_in_the_models_units(opened_run: OpenedRun):
    """Spliced: coder(x). Ablated and steered: a latent's row times the token's deviation."""
    x, coder = activation(opened_run), with_layer_norm(opened_run.coder)
    place = (opened_run.lm, opened_run.hookpoint, coder)
    deviation = x.std(-1, keepdim=True)
    with torch.no_grad():
        expected = coder(x)
        code = opened_run.coder.encode(layer_norm(x))
        latent = int(code[:, 1:].sum((0, 1)).argmax())
        written = deviation * coder.W_dec[latent]
    with splice(*place):
        seen = activation(opened_run)
    torch.testing.assert_close(seen[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-5)
    with ablate(*place, [latent]):
        ablated = activation(opened_run)
    expected = x - code[..., [latent]] * written
    torch.testing.assert_close(ablated[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-5)
    with steer(*place, latent, 3.0):
        torch.testing.assert_close(activation(opened_run), x + 3 * written, rtol=1e-4, atol=1e-5)


def test_interventions_work_while_generating(opened_run: OpenedRun):
    plain = opened_run.generate("the of and", 8)
    place = (opened_run.lm, opened_run.hookpoint, opened_run.coder)
    with steer(*place, 2, 200.0):
        steered = opened_run.generate("the of and", 8)
    assert steered != plain
    assert opened_run.generate("the of and", 8) == plain


def test_an_unknown_latent_is_refused(opened_run: OpenedRun):
    with (
        pytest.raises(ValueError, match=r"d_sae=96\); got \[96\]"),
        steer(opened_run.lm, opened_run.hookpoint, opened_run.coder, 96, 1.0),
    ):
        pass


def test_strongest_latents_are_the_codes_largest(opened_run: OpenedRun):
    lm, text = opened_run.lm, "the of and to in a"
    found = strongest_latents(opened_run.coder, lm, opened_run.hookpoint, text, 2)
    ids = lm.tokenizer(text, return_tensors="pt")["input_ids"]
    x = capture(lm.module, [opened_run.hookpoint], ids)[opened_run.hookpoint][0]
    with torch.no_grad():
        best = opened_run.coder.encode(x).topk(2)
    assert len(found) == ids.shape[1]
    for row in range(1, len(found)):
        values = [value for _, value in found[row].latents]
        expected = best.values[row][best.values[row] > 0].tolist()
        assert values == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_the_example_runs(reported_run: Path):
    """scripts/explore.py does what its docstring says, on a run folder alone."""
    done = subprocess.run(
        [sys.executable, "scripts/explore.py", str(reported_run), "the of and to"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for piece in ("latent", "as it is:", "spliced:", "steered with latent"):
        assert piece in done.stdout
