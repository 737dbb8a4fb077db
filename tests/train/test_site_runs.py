"""Runs of every site on a language model: train, evaluate, report, from a file; what is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import sae
import sae.stream.opening as opening
from sae.analysis import ablate, head_shares, open_run, places_of_latents, splice, steer
from sae.cli import main
from sae.configuration import from_command_line, from_flat
from sae.evals.evaluable import Evaluable
from sae.evals.replacing import Places, clean_pass, logits_of, spliced
from sae.stream.hookpoints import capture, find_hookpoints_of
from sae.stream.language_model import LanguageModel, load_language_model
from sae.train import run
from sae.train.plan import plan

MLP, OUT = "model.layers.1.mlp:in", "model.layers.1.mlp"
LAYERS = ("model.layers.0.mlp:in,model.layers.2.mlp:in", "model.layers.0.mlp,model.layers.2.mlp")
KINDS: dict[str, dict[str, Any]] = {
    "heads": {"coder.site": "sae", "model.hookpoint": "model.layers.1.self_attn.o_proj:in"},
    "transcoder": {"coder.site": "transcoder", "model.hookpoint": MLP, "model.target": OUT},
    "skip": {
        "coder.site": "transcoder",
        "coder.skip": True,
        "model.hookpoint": MLP,
        "model.target": OUT,
    },
    "crosscoder": {
        "coder.site": "crosscoder",
        "model.hookpoint": "model.layers.0,model.layers.1,model.layers.3",
        "coder.activation": "batchtopk",
    },
    "cross_layer": {
        "coder.site": "cross_layer",
        "model.hookpoint": LAYERS[0],
        "model.target": LAYERS[1],
        "coder.activation": "jumprelu",
        "coder.target_l0": 4.0,
        "coder.k": 32,  # the default: of another one, which does nothing here, users are warned
    },
    "cross_layer_topk": {
        "coder.site": "cross_layer",
        "model.hookpoint": LAYERS[0],
        "model.target": LAYERS[1],
        "coder.tie_decoders": True,
    },
}


@pytest.fixture
def perturbed(tiny_lm_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model whose matrices are a little others."""
    folder = tmp_path / "perturbed"
    shutil.copytree(tiny_lm_folder, folder)
    generator = torch.Generator().manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    noisy = {
        name: w + 0.05 * w.std() * torch.randn(w.shape, generator=generator) if w.ndim == 2 else w
        for name, w in weights.items()
    }
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def file_with(path: Path, settings: dict[str, Any]) -> Path:
    """A YAML file beside `path` that says the same but for these settings."""
    tree = yaml.safe_load(path.read_text())
    for key, value in settings.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    other = path.with_name("site.yaml")
    other.write_text(yaml.safe_dump(tree))
    return other


def configured(path: Path, settings: dict[str, Any]) -> sae.Config:
    return from_flat(settings, from_command_line([str(path)], "sae train"))


@pytest.mark.filterwarnings("ignore:The fused training step")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_is_measured_and_reported(
    kind: str, tiny_config: Path, tmp_path: Path, tiny_text_file: Path
):
    folder = run(configured(tiny_config, KINDS[kind]))
    main(["eval", str(folder), "--eval.tokens", "300", "--eval.downstream_tokens", "200"])
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert 0 < metrics["fvu"] < 1.2
    assert metrics["ce_clean"] != metrics["ce_spliced"]
    main(["report", str(folder), "--report.tokens", "300"])
    assert (folder / "report.html").stat().st_size > 10_000
    coder = sae.load(folder)
    assert coder.cfg.site == KINDS[kind]["coder.site"]
    if kind == "heads":
        torch.testing.assert_close(head_shares(coder, 4).sum(0), torch.ones(48))
    assert coder.metadata["hook_name"] == KINDS[kind]["model.hookpoint"]
    if len(coder.sites.reads) > 1:
        with pytest.raises(ValueError, match=r"opens runs that read one place.*`sae.load`"):
            open_run(folder)
    else:
        opened = open_run(folder)
        plain, place = opened.generate("the of and"), (opened.lm, opened.hookpoint, opened.coder)
        with steer(*place, 2, 1e4, target=opened.target):
            assert opened.generate("the of and") != plain
        with splice(*place, target=opened.target):
            assert opened.generate("the of and")
    # A dictionary alone remembers where it reads and writes.
    shutil.copytree(folder / "final", tmp_path / "alone")
    flags = ["--data.source", str(tiny_text_file), "--data.held_out_fraction", "0.1"]
    flags += ["--data.context_size", "32", "--model.dtype", "float32", "--eval.tokens", "300"]
    main(["eval", str(tmp_path / "alone"), *flags, "--eval.evals", "reconstruction"])
    alone = json.loads((tmp_path / "alone/results.json").read_text())["metrics"]
    assert alone["fvu"] == pytest.approx(metrics["fvu"])


@pytest.mark.filterwarnings("ignore:The fused training step")
def test_a_crosscoder_of_two_models(tiny_config: Path, perturbed: Path):
    given = {"coder.site": "crosscoder", "model.other": str(perturbed)}
    folder = run(configured(tiny_config, given))
    coder = sae.load(folder)
    assert coder.sites.reads == (32, 32)
    assert coder.site_norms().shape == (2, 48)
    flags = ["--eval.tokens", "300", "--eval.downstream_tokens", "200"]
    main(["eval", str(folder), "--evals", "downstream,interventions", *flags])
    found = json.loads((folder / "results.json").read_text())["metrics"]
    assert found["ce_clean"] > 0
    assert found["steering_gain"] is None, "a latent writes into both models"
    main(["report", str(folder), "--report.tokens", "300"])
    page = (folder / "report.html").read_text()
    places = places_of_latents(coder)
    assert places.names == ("model.layers.1", "other/model.layers.1")
    assert all(f"share of the norm at {name}" in page for name in places.names)
    assert re.search(
        r"Of \d+ latents that fire: \d+ shared by all, \d+ of several, \d+ model", page
    )


@pytest.mark.filterwarnings("ignore:The fused training step")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_resumed_and_goes_on_alike(kind: str, tiny_config: Path, tmp_path: Path):
    cfg = configured(tiny_config, KINDS[kind])
    whole = run(cfg)
    cfg = replace(cfg, run=replace(cfg.run, folder=str(tmp_path / "parts")))
    run(cfg)
    newest = sorted((tmp_path / "parts/checkpoints").iterdir())[-1]
    shutil.rmtree(newest)  # as if it had been killed before the last one
    shutil.rmtree(tmp_path / "parts/final")
    run(replace(cfg, train=replace(cfg.train, resume="auto")))
    mine, again = sae.load(whole), sae.load(tmp_path / "parts")
    assert mine.metadata == again.metadata
    for name, value in mine.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:The fused training step")
@pytest.mark.parametrize("kind", ["skip", "crosscoder", "cross_layer"])
def test_shards_serve_every_place(kind: str, tiny_config: Path, tmp_path: Path):
    """A run from shards trains on the rows that a live one does: its places in their order."""
    cfg, shards = configured(tiny_config, KINDS[kind]), str(tmp_path / "shards")
    main(["harvest", str(file_with(tiny_config, KINDS[kind])), "--harvest.folder", shards])
    given = {**KINDS[kind], "stream.shards": shards, "run.folder": str(tmp_path / "from_shards")}
    folder = run(configured(tiny_config, given))
    one, other = sae.load(run(cfg)), sae.load(folder)
    assert one.sites == other.sites
    assert one.metadata["hook_name"] == other.metadata["hook_name"]
    # Both read the same text in another order: the centres of what is written agree.
    torch.testing.assert_close(one.b_dec, other.b_dec, rtol=0.3, atol=0.02)


@pytest.fixture
def lm(tiny_lm_folder: Path) -> LanguageModel:
    cfg = from_command_line(["--model.name", str(tiny_lm_folder), "--model.dtype", "float32"], "x")
    return load_language_model(cfg.model, "cpu")


TOKENS = torch.arange(3, 43).reshape(2, 20)


class Exact:
    """Writes what the modules write: the transcoder that changes nothing."""

    def __init__(self, lm: LanguageModel, places: Places) -> None:
        widths = places.reader(lm).widths
        n = len(places.reads)
        self.sites = sae.coder.sites.Sites(widths[:n], widths[n:])
        self.d_sae = self.sites.d_in
        self.layers = [lm.module.get_submodule(place.path) for place in places.writes]

    def encode(self, x):
        return x

    @torch.no_grad()
    def decode(self, x):
        parts = x.split(list(self.sites.reads), -1)
        return torch.cat([f(part[None])[0] for f, part in zip(self.layers, parts, strict=True)], -1)


def places_of(lm: LanguageModel, kind: str) -> Places:
    given = KINDS[kind]
    read, written = (given[key] for key in ("model.hookpoint", "model.target"))
    return Places(
        tuple(find_hookpoints_of(lm.module, read)), tuple(find_hookpoints_of(lm.module, written))
    )


@pytest.mark.parametrize("kind", ["transcoder", "cross_layer"])
def test_writing_what_the_modules_write_changes_nothing(lm: LanguageModel, kind: str):
    places = places_of(lm, kind)
    logits, rows = clean_pass(lm, places, TOKENS)
    coder = Evaluable(Exact(lm, places), rows.shape[1])
    kept = torch.ones(TOKENS.numel(), dtype=torch.bool)
    with spliced(lm, places, coder, rows, kept):
        torch.testing.assert_close(logits_of(lm, TOKENS), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The fused training step")
def test_a_replacement_model_reads_layers_as_the_replaced_ones_made_them(
    lm: LanguageModel, tiny_config: Path
):
    """Against hooks by hand: layer 2 sees the residual stream after layer 0 was replaced."""
    coder = sae.load(run(configured(tiny_config, KINDS["cross_layer"])))
    places, layers = places_of(lm, "cross_layer"), lm.module.model.layers  # pyright: ignore
    _, rows = clean_pass(lm, places, TOKENS)
    kept = torch.ones(TOKENS.numel(), dtype=torch.bool)
    with spliced(lm, places, Evaluable(coder, rows.shape[1]), rows, kept):
        found = logits_of(lm, TOKENS)
    seen: list[torch.Tensor] = []

    def hook(number: int):
        def write(_module, args, _output):
            seen.append(args[0].flatten(0, 1))
            x = torch.cat([*seen, torch.zeros(40, 32 * (2 - len(seen)))], 1)
            return coder(x).split(32, 1)[number].reshape(2, 20, 32)

        return write

    handles = [layers[i].mlp.register_forward_hook(hook(n)) for n, i in enumerate((0, 2))]
    with torch.no_grad():
        by_hand = lm.module(TOKENS).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The fused training step")
def test_a_transcoder_is_spliced_in_and_ablated(lm: LanguageModel, tiny_config: Path):
    coder = sae.load(run(configured(tiny_config, KINDS["skip"])))
    read, written = (find_hookpoints_of(lm.module, name)[0] for name in (MLP, OUT))
    clean = capture(lm.module, [read, written], TOKENS)
    with splice(lm, read, coder, target=written):
        now = capture(lm.module, [written], TOKENS)[written]
    with torch.no_grad():
        torch.testing.assert_close(now[:, 1:], coder(clean[read])[:, 1:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(now[:, 0], clean[written][:, 0])
    latent = int(coder.encode(clean[read][:, 1:]).sum((0, 1)).argmax())
    with ablate(lm, read, coder, [latent], target=written):
        now = capture(lm.module, [written], TOKENS)[written]
    code = coder.encode(clean[read])[..., [latent]]
    expected = clean[written] - code * coder.W_dec[latent]
    torch.testing.assert_close(now[:, 1:], expected[:, 1:].detach(), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="`target` must be given"), splice(lm, read, coder):
        pass


def test_a_plan_of_a_transcoder(tiny_config: Path):
    found = plan(configured(tiny_config, {**KINDS["skip"], "train.step": "autograd"}), seconds=0.2)
    assert found.memory["coder"] > 48 * 32 * 2 * 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"coder.site": "transcoder", "model.hookpoint": MLP}, r"`model.target` must name"),
        ({"model.target": OUT}, r"`model.target` must .* be left out for an sae"),
        (
            {"coder.site": "transcoder", "model.hookpoint": OUT, "model.target": MLP},
            r"`model.target` must come behind what is read",
        ),
        (
            {"coder.site": "transcoder", "model.hookpoint": OUT, "model.target": OUT},
            r"`model.target` must come behind what is read",
        ),
        (
            {"coder.site": "transcoder", "model.hookpoint": MLP, "model.target": LAYERS[1]},
            r"`model.target` must match as many modules",
        ),
        (
            {"coder.site": "transcoder", "model.hookpoint": MLP, "model.target": "model.layers.9"},
            r"`model.target` must match a module",
        ),
        ({"coder.site": "crosscoder"}, r"needs at least two places"),
        ({**KINDS["cross_layer"], "coder.d_sae": 49}, r"must be a multiple of the layers"),
        (
            {
                "coder.site": "cross_layer",
                "model.hookpoint": "model.layers.0.mlp:in,model.layers.1.mlp.down_proj:in",
                "model.target": "model.layers.0.mlp,model.layers.1.mlp",
            },
            r"needs places of one width",
        ),
        (
            {"model.hookpoint": "model.layers.*"},
            r"must match exactly one module here; it matches 4: .*`coder.site: crosscoder`",
        ),
        ({"model.hookpoint": "model.layers.9"}, r"`model.hookpoint` must match a module"),
        (
            {"coder.site": "crosscoder", "model.other": "/nowhere"},
            r"`model.other` must be a hub id",
        ),
        ({**KINDS["transcoder"], "train.step": "fused"}, r"`train.step: fused` needs"),
    ],
)
def test_places_that_cannot_work_are_refused_before_weights(
    settings: dict[str, Any], words: str, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(opening, "load_language_model", lambda *_: pytest.fail("weights"))
    with pytest.raises(ValueError, match=words):
        run(configured(tiny_config, settings))


def test_an_sae_is_not_of_two_models(
    tiny_config: Path, perturbed: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(opening, "load_language_model", lambda *_: pytest.fail("weights"))
    with pytest.raises(ValueError, match=r"`model.other` must be left out here.*crosscoder"):
        run(configured(tiny_config, {"model.other": str(perturbed)}))
