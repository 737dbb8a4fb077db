"""Trained in normalised units, saved in raw ones: every architecture, every kind, every folder."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sae
import sae.train.trainer as trainer
from sae.coder.activations import ACTIVATIONS
from sae.coder.layer_norm import undo_layer_norm
from sae.coder.sites import Sites
from sae.config import NormalisationName
from sae.configuration import from_flat, read_run_config
from sae.stream.normalisation import FITS, Normaliser
from sae.train.state import coder_tensors

AUTO_WARNS = pytest.mark.filterwarnings("ignore:The fused training step does not train")


def settings(folder: Path, kind: NormalisationName, **more: Any) -> dict[str, Any]:
    lengths = {"tokens": 1024, "batch_tokens": 128, "checkpoint_every_steps": 3}
    coder = {"d_sae": 48, "k": 4, "lr": 1e-2}
    return {
        **lengths,
        **coder,
        **{"normalisation": kind, "folder": str(folder), "progress": False, "keep_checkpoints": 9},
        **more,
    }


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").iterdir())


def of_training(checkpoint: Path, kind: NormalisationName) -> tuple[sae.SparseCoder, Normaliser]:
    """The coder in training units and its normaliser, read from what a resumed run reads."""
    tensors = load_file(checkpoint / "trainer.safetensors")
    coder = sae.SparseCoder(16, sae.load(checkpoint).cfg)
    with torch.no_grad():
        for name, tensor in coder_tensors(coder).items():
            tensor.copy_(tensors[f"coder.{name}"])
    parts = {n.removeprefix("normaliser."): t for n, t in tensors.items() if "normaliser" in n}
    return coder, Normaliser(kind, **parts)


def in_raw_units(x_hat: Tensor, normaliser: Normaliser, x: Tensor) -> Tensor:
    """The way back, from the way there alone, in float64."""
    if normaliser.kind == "layer_norm":
        return undo_layer_norm(x_hat.double(), x.double())
    factor = torch.ones(()) if normaliser.factor is None else normaliser.factor
    factor = factor.double()
    inverse = torch.linalg.inv(factor) if factor.ndim == 2 else 1 / factor
    x_hat = x_hat.double()
    x_hat = x_hat @ inverse if inverse.ndim == 2 else x_hat * inverse
    return x_hat if normaliser.shift is None else x_hat + normaliser.shift.double()


@AUTO_WARNS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", FITS)
def test_saved_coders_work_on_raw_activations(
    activations: Tensor, tmp_path: Path, activation: str, kind: NormalisationName
):
    """Each checkpoint and final/ against the training coder on normalised activations."""
    if activation == "matching_pursuit" and kind in ("standardise", "whiten"):
        with pytest.raises(ValueError, match="whose encoder is its decoder"):
            sae.fit(activations, activation=activation, **settings(tmp_path, kind))
        return
    run, x = tmp_path / "run", activations[:256]
    returned = sae.fit(activations, activation=activation, **settings(run, kind))  # pyright: ignore
    steps = checkpoints(run)
    assert [path.name[-2:] for path in steps] == ["03", "06", "08"]
    for folder, checkpoint in [*zip(steps, steps, strict=True), (run / "final", steps[-1])]:
        assert_works_on_raw(folder, checkpoint, kind, x)
    assert torch.equal(sae.load(run / "final")(x), returned(x))
    assert not torch.equal(sae.load(steps[0])(x), returned(x))


@torch.no_grad()
def assert_works_on_raw(folder: Path, checkpoint: Path, kind: NormalisationName, x: Tensor) -> None:
    """Compare the dictionary in `folder` with the trainer's state in `checkpoint`."""
    coder, normaliser = of_training(checkpoint, kind)
    raw = sae.load(folder)
    assert raw.has_layer_norm == (kind == "layer_norm")
    code = coder.encode(normaliser.apply(x)).double()
    if kind == "mean_norm":
        assert normaliser.factor is not None
        code = code / normaliser.factor
    close = {"rtol": 1e-5, "atol": 1e-5 * float(code.max())}
    torch.testing.assert_close(raw.encode(x).double(), code, **close)
    expected = in_raw_units(coder(normaliser.apply(x)), normaliser, x)
    assert (raw(x) - expected).norm() < 1e-5 * expected.norm()
    unit_rows = torch.ones(48)
    if kind in ("standardise", "whiten"):
        assert not torch.allclose(raw.W_dec.norm(dim=1), unit_rows)
    else:
        torch.testing.assert_close(raw.W_dec.norm(dim=1), unit_rows)


@pytest.mark.parametrize("kind", FITS)
def test_training_in_any_units_learns(activations: Tensor, kind: NormalisationName):
    coder = sae.fit(
        activations, d_sae=48, k=3, tokens=30_000, normalisation=kind, batch_tokens=256, lr=3e-3,
        progress=False,
    )  # fmt: skip
    with torch.no_grad():
        error = (activations - coder(activations)).square().sum()
    assert error / (activations - activations.mean(0)).square().sum() < 0.3


@AUTO_WARNS
@pytest.mark.parametrize("kind", FITS)
def test_a_resumed_run_keeps_the_normaliser_that_it_began_with(
    activations: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: NormalisationName
):
    """Bit for bit, even where another fit would now come out differently."""
    run = tmp_path / "run"
    sae.fit(activations, **settings(run, kind))
    names = ("trainer.safetensors", "sae_weights.safetensors")
    whole = [load_file(checkpoints(run)[-1] / name) for name in names]
    shutil.rmtree(checkpoints(run)[-1])
    shutil.rmtree(run / "final")
    honest = Normaliser.fit

    def otherwise(sample: Tensor, *rest: Any, **_: object) -> Normaliser:
        return honest(sample * 2 + sample.roll(1, 1), *rest)

    monkeypatch.setattr(Normaliser, "fit", otherwise)
    sae.fit(activations, resume="auto", **settings(run, kind))
    again = [load_file(checkpoints(run)[-1] / name) for name in names]
    for one, other in zip(whole, again, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("kind", FITS)
def test_calibration_is_over_all_ranks(
    activations: Tensor, monkeypatch: pytest.MonkeyPatch, kind: NormalisationName
):
    """Two threads stand for processes with unequal shares of the sample, sorted by size."""
    rows = activations[activations.norm(dim=1).argsort()]
    cfg = from_flat({"stream.normalisation": kind})
    whole = trainer.calibrate(rows, cfg, Sites((rows.shape[1],)))
    barrier, given = threading.Barrier(2, timeout=20), [rows, rows]
    rank = threading.local()

    def sum_over_ranks(x: Tensor) -> Tensor:
        given[rank.number] = x
        barrier.wait()
        total = given[0] + given[1]
        barrier.wait()
        return total

    monkeypatch.setattr(trainer, "sum_over_ranks", sum_over_ranks)

    def calibrate(number: int) -> trainer.Calibration:
        rank.number = number
        return trainer.calibrate((rows[:1000], rows[1000:])[number], cfg, Sites((rows.shape[1],)))

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(calibrate, range(2)))
    for calibration in found:
        assert calibration.variance == pytest.approx(whole.variance, rel=1e-5)
        torch.testing.assert_close(calibration.mean, whole.mean, rtol=1e-5, atol=1e-5)
        given_units, expected = (c.normaliser.apply(rows) for c in (calibration, whole))
        torch.testing.assert_close(given_units, expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_without_its_normaliser_is_refused(activations: Tensor, tmp_path: Path):
    from sae.files import write_json, write_tensors
    from sae.train.checkpoint import MANIFEST, fingerprint_of

    run = tmp_path / "run"
    sae.fit(activations, **settings(run, "whiten"))
    newest = checkpoints(run)[-1]
    kept = load_file(newest / "trainer.safetensors")
    del kept["normaliser.shift"]
    write_tensors(newest / "trainer.safetensors", kept)
    (newest / MANIFEST).unlink()
    files = sorted(newest.iterdir())
    write_json(newest / MANIFEST, {file.name: fingerprint_of(file) for file in files})
    with pytest.raises(ValueError, match=r"lacks \['normaliser.shift'\].*another version"):
        sae.fit(activations, resume="auto", **settings(run, "whiten"))


def test_a_run_folder_of_the_older_key_opens(activations: Tensor, tmp_path: Path):
    run = tmp_path / "run"
    sae.fit(activations, **settings(run, "none"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("normalisation: none", "scale: none"))
    assert "scale: none" in config.read_text()
    assert read_run_config(run).stream.normalisation == "none"


def test_too_few_rows_to_whiten_are_refused_before_training(tmp_path: Path):
    with pytest.raises(ValueError, match=r"got 16 tokens, d_in=16"):
        sae.fit(torch.randn(16, 16), **settings(tmp_path / "run", "whiten"))
