"""Training by what the model loses: gradients against differences, runs, resume, refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import sae
from sae.cli import main
from sae.coder import SparseCoder
from sae.coder.sites import Sites
from sae.coder.step_values import StepValues
from sae.configuration import from_command_line, from_flat
from sae.stream.normalisation import Normaliser
from sae.stream.opening import open_model
from sae.train import run
from sae.train.model_loss import ModelLoss
from sae.train.state import Calibration
from sae.train.tracking import read_metrics

SITES: dict[str, dict[str, Any]] = {
    "sae": {},
    "skip": {
        "coder.site": "transcoder",
        "coder.skip": True,
        "model.hookpoint": "model.layers.1.mlp:in",
        "model.target": "model.layers.1.mlp",
    },
    "crosscoder": {
        "coder.site": "crosscoder",
        "model.hookpoint": "model.layers.0,model.layers.2",
    },
    "cross_layer": {
        "coder.site": "cross_layer",
        "model.hookpoint": "model.layers.0.mlp:in,model.layers.2.mlp:in",
        "model.target": "model.layers.0.mlp,model.layers.2.mlp",
    },
}


# What makes the loss of a random model, which hardly depends on one place, count.
WEIGHTS = {"sae": 1e3, "skip": 1e6, "crosscoder": 1e3, "cross_layer": 1e6}


def configured(path: Path, **settings: Any) -> sae.Config:
    return from_flat(settings, from_command_line([str(path)], "sae train"))


def end_to_end(cfg: sae.Config, dtype: torch.dtype = torch.float64):
    """A model's loss over a tiny model and a small coder, both in float64."""
    opened = open_model(cfg, torch.device("cpu"))
    opened.lm.module.to(dtype)
    loss = ModelLoss(cfg, opened)
    widths = opened.reader().widths
    sites = Sites.of(cfg.coder, widths)
    coder = SparseCoder.create(sites.d_in, cfg.coder, seed=0, sites=sites).to(dtype)
    rows = torch.cat(opened.reader().read(opened.contexts("train").next_batch(8).tokens), -1)
    rows = rows.flatten(0, 1)
    normaliser = Normaliser.fit(rows, cfg.stream.normalisation, sites=sites)
    normaliser = replace(
        normaliser,
        **{name: tensor.to(dtype) for name, tensor in normaliser.tensors().items()},
    )
    x = sites.written(normaliser.apply(rows))
    return loss, coder, Calibration(normaliser, 1.0, x.mean(0), x.mean(0))


@pytest.mark.parametrize("normalisation", ["mean_norm", "whiten"])
@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("name", ["kl", "ce"])
def test_gradients_are_finite_differences(
    name: str, kind: str, normalisation: str, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
):
    more = {"train.model_loss": name, "train.model_loss_weight": 1.0, **SITES[kind]}
    more |= {"train.model_loss_contexts": 2, "coder.activation": "relu", "coder.k_aux": 0}
    more |= {"stream.normalisation": normalisation, "data.context_size": 12}
    cfg = configured(tiny_config, **more)
    # x in float64 throughout: differences of float32 logits are noise.
    monkeypatch.setattr(Normaliser, "apply", float64_apply)
    loss, coder, calibration = end_to_end(cfg)
    values = StepValues.fixed(coder.cfg)

    def value() -> torch.Tensor:
        loss._contexts.load_state_dict(start)
        return loss(coder, calibration, values, loss.first + loss._taken).differentiable

    start = loss._contexts.state_dict()
    value().backward()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in coder.named_parameters():
        assert parameter.grad is not None
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        # Where it is largest, and anywhere; the model norms in float32, and ReLUs have kinks.
        chosen = [int(grad.abs().argmax()), int(torch.randint(len(flat), (), generator=generator))]
        for i in chosen:
            before, step = float(flat[i]), 1e-4
            with torch.no_grad():
                flat[i] = before + step
                up = value()
                flat[i] = before - step
                down = value()
                flat[i] = before
            difference = float(up - down) / (2 * step)
            scale = float(grad.abs().max())
            assert abs(difference - float(grad[i])) < 0.05 * scale + 1e-7, (parameter_name, i)


def float64_apply(self: Normaliser, x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    if self.shift is not None:
        x = x - self.shift.double()
    assert self.factor is not None
    factor = self.factor.double()
    return x @ factor if factor.ndim == 2 else x * factor


@pytest.mark.filterwarnings("ignore:The fused training step")
@pytest.mark.parametrize("kind", SITES)
def test_a_run_is_trained_by_it_at_its_end(kind: str, tiny_config: Path):
    """It lowers the KL of what is spliced in, and appears in the log."""
    found = {}
    for fraction in (0.0, 0.5):
        more = {"train.model_loss": "kl", "train.model_loss_fraction": fraction}
        more |= {
            "train.model_loss_weight": WEIGHTS[kind],
            "train.lr": 5e-3,
            "train.decay_fraction": 0.0,
            "train.model_loss_lr_share": 2.0,
        }
        more |= {"run.folder": str(tiny_config.parent / f"run{fraction}"), **SITES[kind]}
        folder = run(configured(tiny_config, **more))
        main(["eval", str(folder), "--eval.tokens", "600", "--eval.downstream_tokens", "600"])
        found[fraction] = json.loads((folder / "results.json").read_text())["metrics"]["kl"]
        logged = [row["model"] for row in read_metrics(folder)]
        assert logged[0] == 0
        assert (logged[-1] > 0) == (fraction > 0)
    assert found[0.5] < 0.95 * found[0.0], found


@pytest.mark.parametrize("times", [1.0, 4.0])
def test_balanced_it_pulls_at_x_hat_as_the_reconstruction_does(times: float, tiny_config: Path):
    """The gradient of b_dec is the sum of x_hat's: in the direction of kl's, of another length."""
    gradients, adds = {}, {}
    for weight in (None, 2.0):
        cfg = configured(tiny_config, **{"train.model_loss": "kl", "train.model_loss_pull": times})
        cfg = replace(cfg, train=replace(cfg.train, model_loss_weight=weight))
        loss, coder, calibration = end_to_end(cfg, torch.float32)
        seen: list[torch.Tensor] = []
        decode = coder.decode_for

        def decode_for(code, x, decode=decode, seen=seen):
            x_hat = decode(code, x)
            x_hat.register_hook(seen.append)
            seen.append(x_hat.detach())
            seen.append(x)
            return x_hat

        coder.decode_for = decode_for  # pyright: ignore[reportAttributeAccessIssue]
        adds[weight] = loss(coder, calibration, StepValues.fixed(coder.cfg), loss.first)
        adds[weight].differentiable.backward()
        x_hat, x, *_, gradients[weight] = seen
    pull = (2 * times / len(x) * (x_hat - x) / calibration.variance).norm()
    torch.testing.assert_close(gradients[None].norm(), pull)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(gradients[None].flatten(), gradients[2.0].flatten(), 0) > 0.999
    torch.testing.assert_close(adds[None].plain, adds[2.0].plain)
    torch.testing.assert_close(adds[2.0].weighted, 2 * adds[2.0].plain)
    factor = gradients[None].norm() / gradients[2.0].norm() * 2
    torch.testing.assert_close(adds[None].weighted, factor * adds[None].plain)


@pytest.mark.filterwarnings("ignore:The fused training step")
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_fine_tuning_begins_without_moments(
    optimizer: str, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its first step is that of a fresh optimiser at the weights found so far."""
    seen: list[tuple[int, float]] = []
    honest = ModelLoss.begin_

    def begin_(self: ModelLoss, optimiser: Any, step: int) -> None:
        honest(self, optimiser, step)
        norm = sum(float(t.float().abs().sum()) for t in optimiser.tensors().values())
        seen.append((self.number_of(step), norm))

    monkeypatch.setattr(ModelLoss, "begin_", begin_)
    more = {"train.model_loss": "kl", "train.model_loss_fraction": 0.25}
    run(configured(tiny_config, **more, **{"train.optimizer": optimizer, "train.step": "autograd"}))
    assert [number for number, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[0][1] == 0
    assert all(norm > 0 for _, norm in seen[1:])


def test_its_documents_come_in_an_order_of_their_own(tiny_config: Path):
    """Those that fill the buffer first, and are used again and again, are no sample of the text."""
    cfg = configured(tiny_config, **{"train.model_loss": "kl"})
    loss, *_ = end_to_end(cfg)
    opened = open_model(cfg, torch.device("cpu"))
    its = loss._contexts.next_batch(64).document_ids.unique()
    first = opened.contexts("train").next_batch(64).document_ids.unique()
    assert len(its) > 4
    assert torch.isin(its, first).float().mean() < 0.5
    assert loss._contexts.part == "train"


@pytest.mark.filterwarnings("ignore:The fused training step")
def test_a_resumed_run_takes_the_contexts_that_are_next(tiny_config: Path, tmp_path: Path):
    more = {"train.model_loss": "kl", "train.model_loss_fraction": 0.75}
    cfg = configured(tiny_config, **more)
    whole = run(cfg)
    cfg = replace(cfg, run=replace(cfg.run, folder=str(tmp_path / "parts")))
    run(cfg)
    newest = sorted((tmp_path / "parts/checkpoints").iterdir())[-1]
    shutil.rmtree(newest)  # as if it had been killed before the last one
    shutil.rmtree(tmp_path / "parts/final")
    run(replace(cfg, train=replace(cfg.train, resume="auto")))
    mine, again = sae.load(whole).state_dict(), sae.load(tmp_path / "parts").state_dict()
    for name, value in mine.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.filterwarnings("ignore:The fused training step")
@pytest.mark.parametrize("name", ["kl", "ce"])
@pytest.mark.parametrize("kind", SITES)
def test_a_model_in_bfloat16(kind: str, name: str, tiny_config: Path):
    """End to end alone, at one place and at several: the coder stays in float32, and learns."""
    more = {"train.model_loss": name, "train.model_loss_fraction": 1.0, "model.dtype": "bfloat16"}
    more |= {"train.reconstruction_weight": 0.0, "train.model_loss_weight": WEIGHTS[kind]}
    more |= {"train.tokens": 6 * 128, "train.lr": 5e-3, "train.warmup_fraction": 0.0, **SITES[kind]}
    folder = run(configured(tiny_config, **more))
    logged = [row["model"] for row in read_metrics(folder)]
    assert all(value > 0 for value in logged)
    coder = sae.load(folder)
    assert coder.W_dec.dtype == torch.float32
    start = SparseCoder.create(coder.d_in, coder.cfg, seed=0, sites=coder.sites)
    moved = (coder.W_dec / coder.W_dec.norm(dim=1, keepdim=True) - start.W_dec).abs()
    assert moved.max() > 1e-3
    assert Accelerator().num_processes == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train.reconstruction_weight": 0.0}, r"`train.reconstruction_weight` is for steps"),
        (
            {"train.model_loss": "kl", "train.reconstruction_weight": 0.0},
            r"`train.model_loss_weight` must be given",
        ),
        ({"train.model_loss": "kl", "world.name": "synth_1k"}, r"`train.model_loss` needs"),
        ({"train.model_loss": "kl", "train.model_loss_fraction": 1.5}, r"model_loss_fraction"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        from_flat(settings)


def test_fit_has_no_model():
    with pytest.raises(ValueError, match="needs a language model"):
        sae.fit(torch.randn(100, 4), d_sae=8, k=1, model_loss="kl")
