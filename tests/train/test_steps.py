"""The fused step is the autograd step with less work: same numbers, no gradient, no wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from step_states import BATCH, D_IN, copy_training_, inputs_of, make, resolved, train
from torch import Tensor

import sae
from sae.coder.activations import ACTIVATIONS
from sae.coder.losses import LossInputs, auxk_gradients, auxk_loss
from sae.coder.step_values import StepValues
from sae.stream.arrays import open_source
from sae.stream.normalisation import Normaliser
from sae.train.adam import AdamState
from sae.train.autograd_step import AutogradStep
from sae.train.dead import DeadLatents
from sae.train.fused_step import FusedStep
from sae.train.metrics import MetricSums
from sae.train.state import Calibration, TrainState
from sae.train.steps import make_step, resolve_step
from sae_kernels import decode_loss, encode, fused_update, row_topk
from sae_kernels.launching import HAS_TRITON, INTERPRETING, record_launches

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETING, reason="needs Triton's interpreter")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MANY_DEAD = {"coder.d_sae": 256, "train.dead_after_tokens": 256, "coder.aux_coefficient": 1.0}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        MANY_DEAD,
        {"train.grad_clip_norm": 0.05, **MANY_DEAD},
        {"train.grad_accumulation_steps": 2, **MANY_DEAD},
        {"train.adam_betas": (0.5, 0.9)},
        {"coder.k_aux": 0},
    ],
    ids=["plain", "auxk", "clipped", "accumulated", "betas", "without auxk"],
)
def test_fused_is_autograd_to_rounding(activations: Tensor, settings: dict):
    """200 steps, each of both from the same state: where rounding breaks a tie between latents,
    runs that go on alone part for good.
    """
    fused, fused_step = make(activations, "fused", **settings)
    plain, plain_step = make(activations, "autograd", **settings)
    n_micro, most_dead = settings.get("train.grad_accumulation_steps", 1), 0
    first = last = float("nan")
    for i in range(200):
        copy_training_(fused, plain)
        rows = []
        for state, step in ((fused, fused_step), (plain, plain_step)):
            if i % 5 == 0:
                state.dead.refresh(state.tokens_seen)
            step(inputs_of(state, n_micro, BATCH // n_micro), 1e-3 * min(1.0, (i + 1) / 10))
            state.step += 1
            rows.append(state.metrics.compute())
            state.metrics.clear()
        for name in rows[1]:
            assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5, abs=1e-6), (i, name)
        for name, parameter in fused.coder.named_parameters():
            expected = plain.coder.get_parameter(name)
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-5)
        for name, moment in fused.optimiser.tensors().items():
            expected = plain.optimiser.tensors()[name]
            torch.testing.assert_close(moment, expected, rtol=1e-3, atol=1e-6)
        assert (fused.coder.W_dec.norm(dim=1) - 1).abs().max() < 1e-6
        assert torch.equal(fused.dead.last_fired_at, plain.dead.last_fired_at)
        assert torch.equal(fused.dead.indices, plain.dead.indices)
        most_dead, last = max(most_dead, plain.dead.indices.numel()), rows[1]["fvu"]
        first = last if i == 0 else first
    assert (most_dead > 8) == ("coder.d_sae" in settings)
    assert last < 0.5 * first


def test_fused_goes_where_autograd_goes(activations: Tensor):
    _, fused = train(activations, "fused", 200)
    _, plain = train(activations, "autograd", 200)
    for one, other in zip(fused, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.01)
    assert fused[-1]["fvu"] < 0.5 * fused[0]["fvu"]


@pytest.mark.parametrize("n_padded", [0, 3])
def test_auxk_gradients_are_autograds(n_padded: int):
    """Those of encoder, decoder and bias of dead latents, padding changing nothing."""
    cfg = resolved({"coder.k_aux": 4}).coder
    coder = sae.SparseCoder.create(D_IN, cfg, seed=1)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, D_IN, generator=generator)
    with torch.no_grad():
        coder.b_enc.normal_(generator=generator)
        coder.b_dec.normal_(generator=generator)
    dead = torch.tensor([3, 7, 11, 20, 33])
    residual = (x - coder(x)).detach()
    given = LossInputs(coder, x, x, residual, coder.encode_sparse(x), dead, StepValues(k=4))
    loss = auxk_loss(given)
    loss.backward()
    padded = torch.cat([dead, torch.full((n_padded,), coder.d_sae)])
    with torch.no_grad():
        by_hand, rows = auxk_gradients(replace(given, dead_indices=padded))
    torch.testing.assert_close(by_hand, loss.detach())
    assert rows is not None
    for name in ("W_enc", "W_dec", "b_enc"):
        gradient, expected = getattr(rows, name), coder.get_parameter(name).grad
        assert expected is not None
        assert (expected[dead].flatten(1).norm(dim=1) if expected.ndim > 1 else expected).any()
        torch.testing.assert_close(gradient[:5], expected[dead], rtol=1e-5, atol=1e-7)
        assert not gradient[5:].any()


def test_auxk_moves_dead_rows_of_encoder_and_decoder(activations: Tensor):
    """A latent that never fires has no gradient but AuxK's."""
    moved = {}
    for k_aux in (0, 8):
        state, step = make(activations, "fused", **{"coder.k_aux": k_aux})
        with torch.no_grad():
            state.coder.b_enc[:8] = -5.0  # silent, but within AuxK's reach after a shift of b_enc
            state.coder.b_enc[:8] += 5.0 * torch.arange(8).lt(4)
        state.dead.indices = torch.arange(4)
        silent = state.coder.b_enc.clone()
        step(inputs_of(state, 1, 256), 1e-3)
        moments = state.optimiser.moments
        moved[k_aux] = [bool(moments[name].m[:4].any()) for name in ("W_enc", "W_dec")]
        assert not moments["W_dec"].m[4:8].any()  # neither fired nor listed
        assert torch.equal(silent[4:8], state.coder.b_enc[4:8])
    assert moved[8] == [True, True]


@pytest.mark.parametrize("moment_format", ["bf16", "8bit"])
def test_narrow_moments_learn_as_well(activations: Tensor, moment_format: str):
    """Within a few percent of float32's loss, in 4 or 2 bytes a weight in place of 8."""
    wide, wide_rows = train(activations, "fused", 200)
    narrow, rows = train(activations, "fused", 200, **{"train.adam_moments": moment_format})
    last, expected = (sum(r["loss"] for r in found[-20:]) / 20 for found in (rows, wide_rows))
    assert last < 1.1 * expected
    sizes = [
        sum(t.numel() * t.itemsize for t in state.optimiser.moments["W_enc"][:2])
        for state in (narrow, wide)
    ]
    assert sizes[0] * (2 if moment_format == "bf16" else 4) == sizes[1]


def test_the_bf16_option_is_as_exact_as_float32_on_a_cpu(activations: Tensor):
    """Scores are bf16, the strongest latents' values float32: only near ties may fall otherwise."""
    state, step = make(activations, "fused", **{"train.mixed_precision": "bf16"})
    assert isinstance(step, FusedStep)
    shadow = step.coder.enc_shadow
    assert shadow is not None
    assert shadow.dtype == torch.bfloat16
    exact, exact_step = make(activations, "fused")
    for each, each_state in ((step, state), (exact_step, exact)):
        for i in range(20):
            each(inputs_of(each_state, 1, 256), 1e-3)
            each_state.step = i + 1
    rows, expected = state.metrics.compute(), exact.metrics.compute()
    assert abs(rows["loss"] - expected["loss"]) < 2e-3
    assert rows["loss"] != expected["loss"]
    assert torch.equal(shadow, state.coder.W_enc.detach().bfloat16())  # kept fresh


# ---- batches selected together, and prefixes


@pytest.mark.parametrize("settings", [{}, {"train.grad_accumulation_steps": 2}])
@pytest.mark.parametrize("prefixes", [(), (4, 32)])
def test_batchtopk_and_prefixes_are_their_definition(
    activations: Tensor, settings: dict, prefixes: tuple[int, ...]
):
    """BatchTopK and Matryoshka against plain differentiation of their own definitions."""
    of_coder = {"coder.activation": "batchtopk", "coder.prefixes": prefixes, "coder.k_aux": 0}
    state, step = make(activations, "fused", **of_coder, **settings)
    coder = sae.SparseCoder.create(D_IN, state.coder.cfg, seed=0)
    coder.load_state_dict(state.coder.state_dict())
    ends = (*prefixes, coder.d_sae)
    adam = torch.optim.Adam(coder.parameters(), lr=1e-3)
    n_micro = state.batch_tokens // 128 if settings else 1
    threshold = 0.0
    for i in range(5):
        batch = inputs_of(state, n_micro, 256 // n_micro)
        step(batch, 1e-3, StepValues.fixed(coder.cfg))
        state.step = i + 1
        for x in batch:
            pre_acts = torch.relu((x - coder.b_dec) @ coder.W_enc.T + coder.b_enc)
            least = pre_acts.flatten().topk(coder.cfg.k * len(x)).values[-1]
            rate = state.coder.cfg.threshold_rate
            moved = threshold + rate * (float(least.detach()) - threshold)
            threshold = moved if threshold else float(least.detach())
            latents = pre_acts.where(pre_acts >= least, 0)
            loss = torch.zeros(())
            for end in ends:
                error = x - latents[:, :end] @ coder.W_dec[:end] - coder.b_dec
                loss = loss + error.square().sum() / len(ends)
            (loss / (len(x) * state.calibration.variance * n_micro)).backward()
        sae.coder.project_decoder_gradient_(coder)
        adam.step()
        adam.zero_grad()
        sae.coder.normalise_decoder_(coder)
    for name, parameter in coder.named_parameters():
        torch.testing.assert_close(parameter, state.coder.get_parameter(name), rtol=0, atol=1e-5)
    torch.testing.assert_close(state.coder.threshold, torch.full((64,), threshold))


def test_a_row_may_train_parameters_of_its_own(
    activations: Tensor, monkeypatch: pytest.MonkeyPatch
):
    """As JumpReLU's threshold will be: its gradient comes from the row, Adam steps it."""
    topk = ACTIVATIONS["topk"]
    assert topk.backward is not None

    def backward(coder, code, grad_values):
        behind = topk.backward(coder, code, grad_values)
        return behind._replace(parameters={"gain": torch.ones_like(coder.gain)})

    honest = sae.SparseCoder.create

    def with_gain(*args, **kwargs):
        coder = honest(*args, **kwargs)
        coder.gain = torch.nn.Parameter(torch.zeros(coder.d_sae))
        return coder

    monkeypatch.setattr(sae.SparseCoder, "create", with_gain)
    monkeypatch.setitem(ACTIVATIONS, "topk", replace(topk, backward=backward))
    state, step = make(activations, "fused")
    step(inputs_of(state, 1, 256), 1e-3)
    torch.testing.assert_close(state.coder.gain, torch.full((64,), -1e-3))  # Adam's first step
    assert "gain.exp_avg" in state.optimiser.tensors()


# ---- what is chosen, and what is said


def test_auto_is_fused_where_it_can_be_and_one_warning_where_not():
    assert resolved({}).train.step == "fused"
    with pytest.warns(UserWarning, match=r"does not train `coder.activation: relu`; falling back"):
        assert resolved({"coder.activation": "relu"}).train.step == "autograd"
    asked = resolved({"coder.activation": "relu", "train.step": "autograd"})
    assert resolve_step(asked).train.step == "autograd"  # without a warning, which is an error here


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"coder.activation": "relu", "train.step": "fused"},
            r"`train.step: fused` needs what .* got `coder.activation: relu`. .* topk",
        ),
        (
            {"train.step": "fused", "train.optimizer": "muon"},
            r"`train.step` must be autograd where train.optimizer is muon",
        ),
        (
            {"train.optimizer": "signum", "train.adam_moments": "bf16"},
            r"`train.adam_moments` must be fp32 where train.optimizer is signum",
        ),
    ],
)
def test_what_the_fused_step_cannot_do_is_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        resolved(settings)


# ---- what it costs


KERNEL_MODULES = (row_topk, encode, decode_loss, fused_update)


def take_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `auto` mean the Triton kernels, as it does on a GPU."""
    for module in KERNEL_MODULES:
        monkeypatch.setattr(module, "choose_form", lambda *_: "triton")


def profiled(call: Callable[[], None]) -> torch.autograd.profiler.profile:
    """Run a call under torch's profiler, with shapes and memory."""
    profile = torch.autograd.profiler.profile(record_shapes=True, profile_memory=True)
    with profile:
        call()
    return profile


def peak_bytes(profile: torch.autograd.profiler.profile) -> int:
    """Return the most memory that was held at once, of what was allocated inside."""
    assert profile.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes())  # pyright: ignore[reportAttributeAccessIssue]
        for event in profile.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def dense_products(profile: torch.autograd.profiler.profile, sizes: set[int]) -> int:
    """Return how many matrix products all three sizes meet in, inside custom ops too."""
    products = ("aten::mm", "aten::addmm", "aten::bmm")
    return sum(
        sizes <= {size for shape in event.input_shapes for size in shape}
        for event in profile.function_events or []
        if event.name in products
    )


@pytest.mark.filterwarnings("ignore")
def test_a_step_holds_the_chunk_and_no_gradient(monkeypatch: pytest.MonkeyPatch):
    """Extra memory: the pre-activations' chunk, a block of rows, O(n (d + k)), vectors of d_sae.

    The fused step keeps its chunk on a CPU.
    """
    n, d_in, d_sae, k, chunk, block = 96, 128, 8192, 4, 2**18, 2**16
    monkeypatch.setattr(encode, "CPU_BUFFER_BYTES", chunk)
    monkeypatch.setattr(fused_update, "BLOCK_BYTES", block)
    settings: dict[str, Any] = {"coder.d_sae": d_sae, "coder.k": k, "train.batch_tokens": n}
    x = torch.randn(1000, d_in, generator=torch.Generator().manual_seed(0))
    peaks = {}
    for name in ("fused", "autograd"):
        state, step = make(x, name, **settings)
        batch = inputs_of(state, 1, n)
        step(batch, 1e-3)  # what is made once is there
        profile = profiled(lambda step=step, batch=batch: step(batch, 1e-3))
        peaks[name] = peak_bytes(profile)
        if isinstance(step, FusedStep):
            assert step.coder.scratch.nbytes == chunk
            peaks[name] += chunk
        # The encoder, and nothing that would decode or differentiate densely.
        rows = {int(chunk / 4 / d_sae), d_in, d_sae}
        assert dense_products(profile, rows) == n / (chunk / 4 / d_sae)
        assert dense_products(profile, {n, d_in, d_sae}) == 0
    weight = d_sae * d_in * 4
    assert peaks["fused"] < chunk + 3 * block + 4 * 12 * n * (d_in + k) + 80 * d_sae
    assert peaks["fused"] < 0.4 * weight
    assert peaks["autograd"] > 2 * weight


@interpreted
def test_kernels_train_as_autograd_does(activations: Tensor, monkeypatch: pytest.MonkeyPatch):
    """The whole step on Triton's kernels: interpreted here, compiled where there is a GPU."""
    tiny: dict[str, Any] = {"coder.d_sae": 12, "coder.k": 2, "coder.k_aux": 3}
    tiny["train.dead_after_tokens"] = 1
    states = {}
    for name in ("autograd", "fused"):
        if name == "fused":
            take_triton(monkeypatch)
        state, step = make(activations, name, **tiny)
        for i in range(3):
            state.dead.indices = torch.tensor([1, 5, 7])
            step(inputs_of(state, 1, 8), 1e-3)
            state.step = i + 1
        states[name] = state
    for name, parameter in states["fused"].coder.named_parameters():
        expected = states["autograd"].coder.get_parameter(name)
        torch.testing.assert_close(parameter, expected, rtol=0, atol=2e-6)


@needs_triton
@pytest.mark.parametrize("settings", [{}, {"train.grad_clip_norm": 1.0}])
def test_no_step_reads_from_the_device(monkeypatch: pytest.MonkeyPatch, settings: dict):
    """On meta tensors, which have no data, whatever waits for a number fails."""
    take_triton(monkeypatch)
    monkeypatch.setattr(encode, "_autocast_dtype", lambda _: None)  # meta has no autocast
    meta = torch.device("meta")
    cfg = resolved({"train.mixed_precision": "bf16", **settings})
    source = open_source(torch.randn(8, D_IN), seed=0, rank=0, world_size=1)
    with meta:
        coder = sae.SparseCoder(D_IN, cfg.coder)
        mean = torch.zeros(D_IN)
        dead = DeadLatents(coder.d_sae, dead_after_tokens=1, k_aux=8, device=meta)
        dead.indices = torch.zeros(5, dtype=torch.int64)
        state = TrainState(
            coder=coder,
            optimiser=AdamState(coder, "8bit"),
            dead=dead,
            metrics=MetricSums(mean, ("loss", "reconstruction", "auxk")),
            source=source,
            calibration=Calibration(Normaliser("none"), 1.0, mean, mean),
            batch_tokens=cfg.train.batch_tokens,
        )
        accelerator: Any = SimpleNamespace(device=meta, num_processes=1)
        step = make_step(cfg, state, accelerator)
        with record_launches() as launched:
            step([torch.zeros(256, D_IN)], 1e-3)
    names = {launch.kernel.fn.__name__ for launch in launched}
    assert "_update_kernel" in names


@pytest.mark.gpu
@needs_cuda
def test_a_captured_step_is_the_step(activations: Tensor):
    """Replayed as a CUDA graph, over a changing list of dead latents, it trains the same coder."""
    states = {}
    for is_captured in (False, True):
        state, step = make(activations, "fused", cpu=False, **MANY_DEAD)
        assert isinstance(step, FusedStep)
        step.captured.is_off = not is_captured
        for i in range(30):
            if i % 5 == 0:
                state.dead.refresh(state.tokens_seen)
            step(inputs_of(state, 1, 256), 1e-3)
            state.step = i + 1
        assert not is_captured or not step.captured.is_off
        states[is_captured] = state
    for name, parameter in states[True].coder.named_parameters():
        assert torch.equal(parameter, states[False].coder.get_parameter(name))


OF_EVERY_KIND = {
    "topk, auxk": MANY_DEAD,
    "8-bit moments": {"train.adam_moments": "8bit", **MANY_DEAD},
    "clipped": {"train.grad_clip_norm": 0.05},
    "muon": {"train.optimizer": "muon", **MANY_DEAD},
    "signum": {"train.optimizer": "signum"},
    "refined": {
        "coder.activation": "batchtopk",
        "coder.prefixes": (8, 16),
        "coder.detach_prefixes": True,
        "coder.refine_step": 0.3,
        "coder.tilt": 0.002,
    },
    "jumprelu": {
        "coder.activation": "jumprelu",
        "coder.target_l0": 4.0,
        "coder.dead_penalty": 1e-3,
    },
    "relu": {"coder.activation": "relu", "coder.sparsity_loss": "tanh"},
    "gated": {"coder.activation": "gated"},
    "matching pursuit": {"coder.activation": "matching_pursuit", "coder.k_aux": None},
    "bf16": {"train.mixed_precision": "bf16", **MANY_DEAD},
}


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("settings", OF_EVERY_KIND.values(), ids=OF_EVERY_KIND.keys())
def test_a_captured_autograd_step_is_the_step(activations: Tensor, settings: dict):
    """Rates, numbers and lists of dead latents change; k too, where it is the activation's."""
    has_k = "coder.activation" not in settings or settings["coder.activation"] == "batchtopk"
    states = {}
    for is_captured in (False, True):
        state, step = make(activations, "autograd", cpu=False, **settings)
        assert isinstance(step, AutogradStep)
        step.captured.is_off = not is_captured
        values = StepValues.fixed(state.coder.cfg)
        for i in range(30):
            if i % 5 == 0:
                state.dead.refresh(state.tokens_seen)
            now = replace(values, k=4 - i // 10) if has_k else values
            step(inputs_of(state, 1, 256), 1e-3 * (1 + i), now)
            state.step = i + 1
        assert not is_captured or not step.captured.is_off
        states[is_captured] = state
    for name, parameter in states[True].coder.named_parameters():
        expected = states[False].coder.get_parameter(name)
        # Sums by atomic additions come in any order.
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4)
    assert states[True].metrics.compute() == pytest.approx(
        states[False].metrics.compute(), rel=1e-3
    )


PADDED = {
    "topk": {"coder.k_aux": 4, "coder.aux_coefficient": 1.0},
    "jumprelu": {
        "coder.activation": "jumprelu",
        "coder.target_l0": 4.0,
        "coder.dead_penalty": 1.0,
        "coder.k_aux": 9,
    },
}


@pytest.mark.parametrize("settings", PADDED.values(), ids=PADDED.keys())
def test_padding_the_dead_list_changes_nothing(activations: Tensor, settings: dict):
    """Losses and gradients are those of the list without d_sae, even where AuxK takes all."""
    found = []
    for n_padded in (0, 3):
        state, step = make(activations, "autograd", **settings)
        assert isinstance(step, AutogradStep)
        dead = torch.tensor([3, 7, 11, 20, state.coder.d_sae - 1])
        padded = torch.cat([dead, torch.full((n_padded,), state.coder.d_sae)])
        (x,) = inputs_of(state, 1, BATCH)
        losses, _, _ = step.module(x, padded, StepValues.fixed(state.coder.cfg))
        losses["loss"].backward()
        gradients = {name: p.grad for name, p in state.coder.named_parameters()}
        found.append(({name: loss.detach() for name, loss in losses.items()}, gradients))
    (losses, gradients), (padded_losses, padded_gradients) = found
    own = "dead_penalty" if "coder.dead_penalty" in settings else "auxk"
    assert float(losses[own]) > 0
    torch.testing.assert_close(padded_losses, losses)
    torch.testing.assert_close(padded_gradients, gradients)
