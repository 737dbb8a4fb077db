"""What a dictionary computes, whatever its activation function."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from coder_variants import VARIANTS, make_variant

from sae.coder import (
    Latents,
    SparseCoder,
    from_dense,
    normalise_decoder_,
    project_decoder_gradient_,
    to_raw_units,
)
from sae.coder.initialisation import geometric_median, initial_b_dec
from sae.coder.losses import LossInputs, auxk_loss, extra_loss_names
from sae.coder.step_values import StepValues
from sae.config import CoderConfig
from sae.train.autograd_step import TrainingModule

D_IN, D_SAE, K = 12, 40, 5


def make_coder(name: str = "topk", **settings) -> SparseCoder:
    coder = make_variant(name, d_in=D_IN, d_sae=D_SAE, k=K)
    coder.cfg = replace(coder.cfg, **settings)
    return coder


def loss_inputs(coder: SparseCoder, x: torch.Tensor, dead: torch.Tensor) -> LossInputs:
    encoding = coder.encode_for_losses(x)
    values = StepValues.fixed(coder.cfg)
    return LossInputs(
        coder,
        x,
        x,
        x - coder.decode(encoding.code),
        encoding.code,
        dead,
        values,
        encoding.pre_acts,
        encoding.wider,
    )


def inputs(n: int = 16, seed: int = 3) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", VARIANTS)
@pytest.mark.parametrize("shape", [(7, D_IN), (2, 3, D_IN), (D_IN,), (0, D_IN)])
def test_sparse_and_dense_forms_agree(activation: str, shape: tuple[int, ...]):
    coder = make_coder(activation)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dense, latents = coder.encode(x), coder.encode_sparse(x)
    assert dense.shape == (*shape[:-1], D_SAE)
    torch.testing.assert_close(latents.to_dense(D_SAE), dense)
    torch.testing.assert_close(coder.decode(latents), coder.decode(dense))
    torch.testing.assert_close(coder(x), coder.decode(dense))
    assert torch.equal(latents.l0(), (dense != 0).sum(-1))


def test_from_dense_keeps_negative_values():
    dense = torch.tensor([[0.0, -2.0, 1.0], [0.0, 0.0, 0.0]])
    assert torch.equal(from_dense(dense).to_dense(3), dense)


def test_wrong_width_names_the_hookpoint():
    coder = make_coder()
    coder.metadata["hook_name"] = "model.layers.3"
    for method in (coder.encode, coder.encode_sparse, coder):
        with pytest.raises(ValueError, match=r"d_in=12.*got \(4, 5\).*model\.layers\.3"):
            method(torch.zeros(4, 5))


def test_k_above_derived_d_sae_is_refused():
    with pytest.raises(ValueError, match=r"got k=32, d_sae=24"):
        SparseCoder.create(12, CoderConfig(expansion_factor=2, k=32))


def test_creation_is_seeded_and_leaves_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again = (SparseCoder.create(D_IN, CoderConfig(k=K), seed=5) for _ in range(2))
    other = SparseCoder.create(D_IN, CoderConfig(k=K), seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)
    assert torch.equal(first.W_enc, first.W_dec)
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(first.d_sae))
    assert first.d_sae == 8 * D_IN


@pytest.mark.parametrize("activation", VARIANTS)
@pytest.mark.parametrize("scale", [0.02, 1.0, 37.0])
def test_raw_units_give_the_same_reconstruction(activation: str, scale: float):
    coder, x = make_coder(activation).double(), inputs().double()
    raw = to_raw_units(coder.float(), scale).double()
    coder.double()
    torch.testing.assert_close(raw(x), coder(x * scale) / scale, rtol=1e-5, atol=1e-6 / scale)
    assert torch.equal(raw.encode(x) != 0, coder.encode(x * scale) != 0)
    assert torch.equal(raw.W_dec, coder.W_dec)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_loss_trains_every_parameter(variant: str):
    """Each by itself, but for those that a loss is not meant to move."""
    coder = make_coder(variant)
    module = TrainingModule(coder, variance=float(D_IN))
    losses, _, _ = module(inputs(64), torch.arange(10), StepValues.fixed(coder.cfg))
    assert set(losses) == {"loss", "reconstruction", *extra_loss_names(coder.cfg)}
    for loss in losses.keys() - {"loss"}:
        coder.zero_grad()
        losses[loss].backward(retain_graph=True)
        moved = {
            name
            for name, parameter in coder.named_parameters()
            if parameter.grad is not None and parameter.grad.abs().sum() > 0
        }
        every = {name for name, _ in coder.named_parameters()}
        assert moved == every - spared(loss, coder), loss


def spared(loss: str, coder: SparseCoder) -> set[str]:
    """Return the parameters that a loss leaves alone, by its definition."""
    of_magnitudes = {"r_mag", "b_mag"}
    if loss == "auxk":  # trains dead latents, not the centre
        return {"b_dec", "threshold"} | of_magnitudes
    if loss == "gate":  # the decoder is held still
        return {"W_dec"} | of_magnitudes
    if loss == "reconstruction" and coder.cfg.activation == "gated":
        return {"b_enc"}  # a gate jumps: only the other two losses open it
    if loss != "sparsity":
        return set()
    if coder.cfg.sparsity_loss == "quadratic":  # L0 depends on the thresholds alone
        return {"W_enc", "W_dec", "b_enc", "b_dec"}
    if coder.cfg.sparsity_loss == "step":
        return {"W_enc", "W_dec", "b_enc", "b_dec"}
    return of_magnitudes


def test_auxk_gradient_reaches_encoder_and_decoder_of_dead_latents_only():
    coder, x = make_coder(k_aux=4), inputs(64)
    dead = torch.tensor([3, 7, 11, 20, 33])
    auxk_loss(loss_inputs(coder, x, dead)).backward()
    for name in ("W_enc", "W_dec", "b_enc"):
        rows = getattr(coder, name).grad.reshape(D_SAE, -1).abs().sum(1)
        assert (rows[dead] > 0).all(), name
        rows[dead] = 0
        assert (rows == 0).all(), name


def test_auxk_is_the_formula():
    coder, x = make_coder(k_aux=2), inputs(8)
    dead = torch.tensor([1, 2, 30])
    residual = x - coder(x)
    pre_acts = ((x - coder.b_dec) @ coder.W_enc.T + coder.b_enc)[:, dead].detach().relu()
    for row in pre_acts:
        row[row.argmin()] = 0
    expected = (residual - pre_acts @ coder.W_dec[dead]).pow(2).sum() / residual.pow(2).sum()
    torch.testing.assert_close(
        auxk_loss(loss_inputs(coder, x, dead)), coder.cfg.aux_coefficient * expected
    )


def test_auxk_without_dead_latents_is_zero():
    coder, x = make_coder(), inputs()
    none = torch.empty(0, dtype=torch.int64)
    assert auxk_loss(loss_inputs(coder, x, none)) == 0


def test_decoder_stays_unit_norm_and_its_gradient_orthogonal():
    coder = make_coder()
    normalise_decoder_(coder)
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(D_SAE))
    (coder(inputs()) - inputs()).pow(2).sum().backward()
    assert coder.W_dec.grad is not None
    before = coder.W_dec.grad.clone()
    project_decoder_gradient_(coder)
    along = (coder.W_dec.grad * coder.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros(D_SAE), atol=1e-4, rtol=0)
    assert not torch.equal(before, coder.W_dec.grad)


def test_geometric_median_balances_directions_and_ignores_an_outlier():
    x = inputs(200).double()
    centre = geometric_median(x.float()).double()
    pull = torch.nn.functional.normalize(x - centre, dim=1).sum(0)
    assert pull.norm() < 1e-3 * len(x)
    with_outlier = torch.cat([x, torch.full((1, D_IN), 1e5).double()]).float()
    moved_median = (geometric_median(with_outlier) - centre).norm()
    moved_mean = (with_outlier.mean(0) - x.mean(0)).norm()
    assert moved_median < 0.1
    assert moved_mean > 100


@pytest.mark.parametrize("method", ["geometric_median", "mean", "zeros"])
def test_b_dec_init_changes_the_start(method: str):
    x = inputs(50) + 4
    start = initial_b_dec(x, method)
    expected = {"geometric_median": geometric_median(x), "mean": x.mean(0), "zeros": 0 * x[0]}
    torch.testing.assert_close(start, expected[method])


@pytest.mark.parametrize("method", ["geometric_median", "mean"])
def test_b_dec_starts_at_the_centre_of_all_processes_samples(method: str):
    """Two of them, one with a tenth of the rows: as if one had all."""
    x = inputs(60) * torch.linspace(0, 4, 60)[:, None] + 4
    mine, others = x[:6], x[6:]
    barrier, sums = threading.Barrier(2), {}

    def over_ranks(part: torch.Tensor) -> torch.Tensor:
        sums[threading.get_ident()] = part.clone()
        barrier.wait(10)
        total = torch.stack(list(sums.values())).sum(0)
        barrier.wait(10)
        return total

    with ThreadPoolExecutor(2) as pool:
        starts = pool.map(lambda rows: initial_b_dec(rows, method, over_ranks), (mine, others))
        for start in starts:
            torch.testing.assert_close(start, initial_b_dec(x, method), rtol=1e-5, atol=1e-5)


def matmul_shapes(profile: torch.autograd.profiler.profile) -> list[set[int]]:
    """Return the sizes that meet in each matrix product, inside custom ops too."""
    products = ("aten::mm", "aten::addmm", "aten::bmm")
    return [
        {size for shape in event.input_shapes for size in shape}
        for event in profile.function_events or []
        if event.name in products
    ]


@pytest.mark.filterwarnings("ignore")
def wide_coder() -> SparseCoder:
    """So wide that gathers cost less than products."""
    return make_variant("topk", d_in=D_IN, d_sae=128 * K, k=K)


def test_a_topk_step_has_one_dense_product():
    """No (n, d_sae) × (d_sae, d_in) decode, and no dense gradient product either."""
    coder, n = wide_coder(), 64
    module = TrainingModule(coder, variance=1.0)
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        losses, _, _ = module(
            inputs(n), torch.empty(0, dtype=torch.int64), StepValues.fixed(coder.cfg)
        )
        losses["loss"].backward()
    dense = [sizes for sizes in matmul_shapes(profile) if {n, coder.d_sae, D_IN} <= sizes]
    assert len(dense) == 1


def test_latents_l0_counts_non_zero_only():
    latents = Latents(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.tensor([[0, 1], [1, 0]]))
    assert latents.l0().tolist() == [1, 2]
