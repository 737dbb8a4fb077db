"""Coders that read and write other places than one: what holds for every one of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from site_cases import CASES, D_SAE, SETTINGS, WIDTHS, make, rows, sites
from torch import Tensor

import sae
from sae.coder import SparseCoder, load_dictionary, normalise_decoder_, project_decoder_gradient_
from sae.coder.latents import to_dense
from sae.coder.losses import LossInputs, auxk_loss
from sae.coder.sites import Sites
from sae.coder.step_values import StepValues
from sae.config import CoderConfig, Config, NormalisationName, StreamConfig
from sae.stream.arrays import ArraySource
from sae.stream.normalisation import Normaliser
from sae.train.autograd_step import TrainingModule
from sae.train.interrupt import Interrupted


@pytest.mark.parametrize(("site", "name"), CASES)
def test_every_parameter_that_should_learn_gets_a_gradient(site: str, name: str):
    coder = make(site, name)
    dead = torch.arange(0, D_SAE, 3)
    losses, _, _ = TrainingModule(coder, 3.0)(rows(site), dead, StepValues.fixed(coder.cfg))
    losses["loss"].backward()
    for parameter_name, parameter in coder.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize(("site", "name"), CASES)
def test_a_saved_coder_writes_the_same(tmp_path: Path, site: str, name: str):
    coder, x = make(site, name), rows(site)
    coder.save(str(tmp_path / "kept"))
    loaded = load_dictionary(tmp_path / "kept")
    read = coder.sites.read(x)
    assert loaded.sites == coder.sites
    assert torch.equal(loaded(read), coder(read))
    assert torch.equal(loaded.encode(read), coder.encode(read))


OF_EACH_KIND = [case for case in CASES if case[1] in ("topk", "jumprelu", "gated")]


@pytest.mark.parametrize("kind", ["none", "mean_norm", "standardise", "whiten"])
@pytest.mark.parametrize(("site", "name"), OF_EACH_KIND)
@torch.no_grad()
def test_raw_units_write_what_training_units_do(site: str, name: str, kind: NormalisationName):
    """Places of very different scales and centres, so that a mixed-up factor shows."""
    if site == "tied" and kind in ("standardise", "whiten"):
        kind = "none"  # refused: one decoder for places of different factors
    coder = make(site, name).double()
    widths = torch.tensor(WIDTHS[site])
    scales = torch.linspace(0.5, 40, len(widths)).repeat_interleave(widths).double()
    x = rows(site, 400).double() * scales + scales.flip(0)
    normaliser = Normaliser.fit(x, kind, sites=coder.sites, is_tied=site == "tied")
    raw = normaliser.to_raw_units(coder).double()(coder.sites.read(x))
    written = normaliser.apply(x).double()
    given = coder.sites.read(written).clone()
    written[:, coder.sites.written_columns] = coder(given)
    expected = coder.sites.written(raw_rows(normaliser, written))
    torch.testing.assert_close(raw, expected, rtol=2e-3, atol=2e-3 * float(expected.std()))


def raw_rows(normaliser: Normaliser, x: Tensor) -> Tensor:
    if normaliser.inverse is not None:
        inverse = normaliser.inverse.double()
        x = x @ inverse if inverse.ndim == 2 else x * inverse
    return x if normaliser.shift is None else x + normaliser.shift.double()


@pytest.mark.parametrize("site", ["transcoder", "crosscoder"])
def test_raw_decoder_rows_stay_of_about_norm_one(site: str):
    coder, x = make(site, "topk"), rows(site, 300)
    normalise_decoder_(coder)
    columns = coder.sites.columns()
    for place, scale in zip(columns, (3.0, 30.0, 0.5), strict=False):
        x[:, place] *= scale
    raw = Normaliser.fit(x, "mean_norm", sites=coder.sites).to_raw_units(coder)
    norms = raw.W_dec.norm(dim=1)
    if site == "transcoder":
        torch.testing.assert_close(norms, torch.ones_like(norms))
    torch.testing.assert_close(
        raw.site_norms() / raw.site_norms().sum(0), coder.site_norms() / coder.site_norms().sum(0)
    )


def test_a_cross_layer_latent_reads_its_layer_and_writes_to_later_ones():
    for site in ("cross_layer", "tied"):
        coder = make(site, "relu")
        x = rows(site)[:, : coder.d_in]
        code = coder.encode(x)
        moved = x.clone()
        moved[:, 6:12] += 1  # the second layer of three
        changed = ((coder.encode(moved) - code).abs() > 1e-5).any(0)
        assert changed.nonzero().flatten().tolist() == list(range(8, 16))
        one = torch.zeros(1, D_SAE)
        one[0, 8] = 1
        written = (coder.decode(one) - coder.b_dec)[0]
        assert (written[:6] == 0).all()
        assert (written[6:] != 0).all()
        sparse = coder.decode(coder.encode_sparse(x))
        torch.testing.assert_close(sparse, coder.decode(code))


def test_a_crosscoder_by_matching_pursuit_works_on_raw_rows():
    """One matrix reads and writes all places: one factor for the whole row, larger places count
    for more; what is saved reconstructs raw rows as well as the log says."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(12, 10, generator=generator)
    codes = torch.rand(2048, 12, generator=generator).pow(8)
    parts = list((codes @ directions).split([4, 6], 1))
    parts[1] = 5 * parts[1]
    coder = sae.fit(
        parts,
        site="crosscoder",
        activation="matching_pursuit",
        d_sae=12,
        k=3,
        tokens=30_000,
        batch_tokens=256,
        lr=1e-2,
        progress=False,
        step="autograd",
    )
    assert torch.equal(coder.W_enc, coder.W_dec)
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(12))
    rows = torch.cat(parts, 1)
    assert (coder(rows) - rows).square().sum() < 0.2 * (rows - rows.mean(0)).square().sum()


def test_cross_layer_decoders_stay_held_in_training():
    x = rows("cross_layer", 512)
    parts = [part.clone() for part in x.split(WIDTHS["cross_layer"], 1)]
    for optimizer in ("adam", "muon"):
        coder = sae.fit(
            parts,
            site="cross_layer",
            d_sae=D_SAE,
            k=4,
            tokens=2048,
            batch_tokens=256,
            optimizer=optimizer,
            lr=1e-2,
            progress=False,
            step="autograd",
        )
        assert (coder.W_dec[8:16, :6] == 0).all()
        assert (coder.W_dec[16:, :12] == 0).all()
        assert (coder.W_dec[16:, 12:] != 0).all()


@pytest.mark.parametrize("site", SETTINGS)
def test_auxk_trains_dead_rows_alone(site: str):
    coder, x, dead = make(site, "topk", k_aux=3), rows(site), torch.tensor([1, 9, 20])
    code = coder.encode_for_losses(coder.sites.read(x)).code
    target = coder.target(x)
    residual = (target - coder.decode(code)).detach()
    given = LossInputs(coder, coder.sites.read(x), target, residual, code, dead, StepValues(k=4))
    auxk_loss(given).backward()
    moved = (coder.W_enc.grad != 0).any(1).nonzero().flatten()
    assert len(moved) > 0
    assert set(moved.tolist()) <= set(dead.tolist())
    assert coder.W_dec.grad is not None
    assert (coder.W_dec.grad != 0).any(1).nonzero().flatten().tolist() == moved.tolist()


def test_l1_of_a_crosscoder_weighs_by_the_sum_of_norms():
    coder, x = make("crosscoder", "relu"), rows("crosscoder")
    losses, _, code = TrainingModule(coder, 1.0)(x, torch.arange(0), StepValues.fixed(coder.cfg))
    parts = coder.W_dec.split(WIDTHS["crosscoder"], 1)
    weights = torch.stack([part.norm(dim=1) for part in parts]).sum(0)
    expected = (
        coder.cfg.sparsity_coefficient * (to_dense(code, D_SAE) @ weights).mean() / coder.d_in**0.5
    )
    torch.testing.assert_close(losses["sparsity"], expected)


def test_a_skip_alone_fits_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 6, generator=generator)
    y = x @ torch.randn(6, 5, generator=generator) + 2
    shared = dict(
        site="transcoder",
        d_sae=8,
        k=1,
        tokens=200_000,
        batch_tokens=256,
        lr=1e-2,
        progress=False,
        step="autograd",
    )
    fvu = {}
    for skip in (True, False):
        coder = sae.fit([x, y], skip=skip, **shared)
        fvu[skip] = ((coder(x) - y).var(0).sum() / y.var(0).sum()).item()
    assert fvu[True] < 0.01 < 0.1 < fvu[False], fvu


@pytest.mark.parametrize(
    ("site", "name"), [("skip", "topk"), ("crosscoder", "batchtopk"), ("cross_layer", "jumprelu")]
)
def test_resume_is_exact(tmp_path: Path, site: str, name: str):
    parts = [part.clone() for part in rows(site, 512).split(WIDTHS[site], 1)]
    shared = {
        **SETTINGS[site],
        "activation": name,
        "d_sae": D_SAE,
        "k": 4,
        "batch_tokens": 64,
        "lr": 1e-2,
        "progress": False,
        "decay_fraction": 0.0,
        "step": "autograd",
        "warmup_fraction": 0.0,
        "checkpoint_every_steps": 4,
        "dead_after_tokens": 200,
    }
    whole = sae.fit(parts, tokens=64 * 12, folder=str(tmp_path / "whole"), **shared)
    folder = tmp_path / "parts"
    honest, calls = ArraySource.next_batch, [0]

    def stopping(self: ArraySource, n: int) -> Tensor:
        calls[0] += 1
        if calls[0] == 7:
            raise Interrupted(15, is_saved=True)
        return honest(self, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArraySource, "next_batch", stopping)
        with pytest.raises(Interrupted):
            sae.fit(parts, tokens=64 * 12, folder=str(folder), **shared)
    again = sae.fit(parts, tokens=64 * 12, folder=str(folder), resume="auto", **shared)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_a_crosscoder_tells_shared_features_from_those_of_one_place():
    """Planted: 16 features of both places, 8 of each alone; ≥ 95% must be told rightly."""
    generator = torch.Generator().manual_seed(0)
    n, d, shared, alone = 40_000, 24, 16, 8
    n_features = shared + 2 * alone
    directions = torch.nn.functional.normalize(
        torch.randn(2, n_features, d, generator=generator), dim=2
    )
    directions[1, shared : shared + alone] = 0
    directions[0, shared + alone :] = 0
    fires = torch.rand(n, n_features, generator=generator) < 0.06
    codes = fires * (1 + 0.3 * torch.randn(n, n_features, generator=generator)).clamp_min(0.1)
    x, y = codes @ directions[0], 3 * (codes @ directions[1])
    coder = sae.fit(
        [x, y],
        site="crosscoder",
        activation="batchtopk",
        d_sae=n_features,
        k=2,
        tokens=600_000,
        batch_tokens=512,
        lr=5e-3,
        progress=False,
    )
    share = (coder.site_norms() / coder.site_norms().sum(0))[0]
    kind = torch.where(share > 0.85, 1, torch.where(share < 0.15, 2, 0))
    found = torch.cat(
        [torch.nn.functional.normalize(part, dim=1) for part in coder.W_dec.split([d, d], 1)], 1
    )
    truth = torch.cat([directions[0], directions[1]], 1)
    match = (found @ truth.T).argmax(0)  # (n_features): the latent of each planted feature
    planted = torch.tensor([0] * shared + [1] * alone + [2] * alone)
    assert (kind[match] == planted).float().mean() >= 0.95


OF_SAELENS = [("transcoder", name) for name in ("relu", "jumprelu", "batchtopk")] + [
    ("skip", "relu")
]


@pytest.mark.sae_lens
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="sae-lens not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("site", "name"), OF_SAELENS)
def test_saelens_opens_our_transcoders_and_we_open_theirs(site: str, name: str, tmp_path: Path):
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    coder = make(site, name)
    x = coder.sites.read(rows(site))
    coder.save(str(tmp_path / "ours"))
    theirs = SAE.load_from_disk(tmp_path / "ours")
    torch.testing.assert_close(theirs.encode(x), coder.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs(x), coder(x), rtol=1e-5, atol=1e-6)
    theirs.save_model(tmp_path / "theirs")
    torch.testing.assert_close(
        load_dictionary(tmp_path / "theirs")(x), coder(x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.sae_lens
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="sae-lens not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("site", "name"), [("transcoder", "topk"), ("crosscoder", "relu")])
def test_saelens_refuses_what_it_has_no_words_for(site: str, name: str, tmp_path: Path):
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    make(site, name).save(str(tmp_path / "ours"))
    with pytest.raises((ValueError, KeyError)):
        SAE.load_from_disk(tmp_path / "ours")


@pytest.mark.parametrize(
    ("settings", "widths", "words"),
    [
        ({"site": "transcoder"}, (4,), "two places"),
        ({"site": "crosscoder"}, (4,), "at least two places"),
        ({"site": "cross_layer"}, (4, 4, 4), "at least two layers"),
        ({"site": "cross_layer"}, (4, 4, 4, 5), "one width"),
        ({"site": "sae"}, (4, 5), "one place"),
    ],
)
def test_other_places_than_a_site_needs_are_refused(settings, widths, words):
    with pytest.raises(ValueError, match=words):
        Sites.of(CoderConfig(**settings), widths)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"skip": True}, "coder.skip"),
        ({"tie_decoders": True, "site": "crosscoder"}, "coder.tie_decoders"),
        ({"site": "transcoder", "refine_step": 0.3}, "coder.refine_step"),
        ({"site": "cross_layer", "prefixes": (4,)}, "coder.prefixes"),
        ({"site": "transcoder", "activation": "matching_pursuit"}, "coder.activation"),
    ],
)
def test_settings_without_a_meaning_at_a_site_are_refused(settings, key):
    with pytest.raises(ValueError, match=key):
        CoderConfig(**settings)


def test_layer_norm_is_for_one_place():
    with pytest.raises(ValueError, match=r"stream\.normalisation"):
        Config(
            coder=CoderConfig(site="crosscoder"), stream=StreamConfig(normalisation="layer_norm")
        )


def test_matrices_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="as many rows"):
        sae.fit([torch.randn(10, 3), torch.randn(9, 3)], site="crosscoder", d_sae=4, k=1)


def test_latents_of_layers_must_be_equally_many():
    with pytest.raises(ValueError, match="multiple of the layers"):
        SparseCoder(18, CoderConfig(site="cross_layer", d_sae=25, k=4), sites=sites("cross_layer"))


def test_project_removes_what_a_held_decoder_would_get():
    coder = make("cross_layer", "topk")
    coder.W_dec.grad = torch.ones_like(coder.W_dec)
    project_decoder_gradient_(coder)
    assert (coder.W_dec.grad[16:, :12] == 0).all()
