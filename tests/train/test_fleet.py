"""Several coders on one stream: each is the run that it would be alone, and all can go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from user import ROOT, clean_environment, command, run_here

import sae
from sae.config import FLEET_SETTINGS, FleetConfig
from sae.configuration import from_command_line, from_flat, read_run_config
from sae.train import fleet_groups, run
from sae.train.fleet_members import members_of
from sae.train.interrupt import Interrupted
from sae.train.tracking import read_metrics

TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")
NOT_NUMBERS = ("tokens_per_second", "wait_share")


def configured(path: Path, *flags: str) -> sae.Config:
    return from_command_line([str(path), *flags], "sae train")


def logged(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder)
    return [{k: v for k, v in row.items() if k not in NOT_NUMBERS} for row in rows]


# ---- members


def test_every_setting_of_a_fleet_replaces_one():
    """In the order of FLEET_SETTINGS, the last varying fastest."""
    values = {
        "hookpoint": ("model.layers.0", "model.layers.1:in"),
        "activation": ("jumprelu",),
        "d_sae": (48,),
        "target_l0": (4.0,),
        "lr": (1e-3, 2e-3),
        "seed": (0, 3),
    }
    flat = {"coder.k_aux": 8, **{f"fleet.{name}": value for name, value in values.items()}}
    members = members_of(from_flat({**flat, "run.folder": "runs/x"}))
    assert [m.name for m in members][:3] == [
        "model.layers.0_jumprelu_d_sae48_target_l04.0_lr0.001_seed0",
        "model.layers.0_jumprelu_d_sae48_target_l04.0_lr0.001_seed3",
        "model.layers.0_jumprelu_d_sae48_target_l04.0_lr0.002_seed0",
    ]
    assert len(members) == 8
    last = members[-1].cfg
    assert (last.model.hookpoint, last.coder.activation) == ("model.layers.1:in", "jumprelu")
    assert (last.coder.d_sae, last.coder.target_l0) == (48, 4.0)
    assert (last.train.lr, last.run.seed) == (2e-3, 3)
    assert last.run.folder == f"runs/x/{members[-1].name}"
    assert last.fleet == FleetConfig()
    assert set(FLEET_SETTINGS) == set(FleetConfig.__dataclass_fields__)


RELU = ["--fleet.activation", "topk,relu", "--coder.k_aux", "0"]
CROSSCODER = ["--coder.site", "crosscoder", "--coder.activation", "batchtopk"]
CROSSCODER += ["--model.hookpoint", "model.layers.0,model.layers.2"]
CROSS_LAYER = ["--coder.site", "cross_layer", "--train.step", "autograd"]
CROSS_LAYER += ["--model.hookpoint", "model.layers.0.mlp:in,model.layers.2.mlp:in"]
CROSS_LAYER += ["--model.target", "model.layers.0.mlp,model.layers.2.mlp"]
ON_A_WORLD = ["--world.name", "toy_model", "--fleet.hookpoint", "layers.1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fleet.k", "4,64"], r"`k64` is not: `coder.k` must be in .* k=64, d_sae=48"),
        (["--fleet.k", "4,8,4"], r"`fleet.k` must hold different values; got 4 twice"),
        (["--fleet.target_l0", "4"], r"`target_l04.0` is not: `coder.target_l0` is a setting"),
        (["--fleet.hookpoint", "layers.1:in,layers.1-in"], "give 'layers.1-in', which is another"),
        (["--fleet.hookpoint", "checkpoints"], "'checkpoints', which is .*the fleet's own"),
        (["--fleet.k", "4", "--model.other", "x"], "`model.other` must be left out"),
        (["--fleet.k", "4", "--train.model_loss", "kl"], "`train.model_loss` must be none where"),
        ([*CROSSCODER, "--fleet.hookpoint", "layers.0"], "`fleet.hookpoint` must be left out"),
        ([*CROSS_LAYER, "--fleet.d_sae", "48,49"], "`d_sae49` is not: .*multiple of the layers"),
        ([*RELU, "--train.step", "fused"], "`relu` is not: `train.step: fused` needs"),
        (["--fleet.k", "4", "--data.source", ""], "`data.source` must name"),
        (ON_A_WORLD, "must be left out where `world.name` is given"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_loads(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
):
    import sae.stream.opening as opening

    def never(*_: object) -> None:
        raise AssertionError("the model's weights were loaded")

    monkeypatch.setattr(opening, "load_language_model", never)
    cfg = configured(tiny_config, *flags)
    with pytest.raises(ValueError, match=message):
        run(cfg)
    assert not (tiny_config.parent / "run").exists()


def test_several_processes_are_refused(tiny_config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="trained by one process; 2 were launched"):
        run(configured(tiny_config, "--fleet.k", "2,4"))


def test_a_glob_that_matches_several_is_refused(tiny_config: Path):
    with pytest.raises(ValueError, match=r"for `model.layers.-` it matches 4: .*Write them out"):
        run(configured(tiny_config, "--fleet.hookpoint", "model.layers.*"))


# ---- each member is a run of its own


@pytest.fixture
def stacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU stack coders, as a GPU does."""
    monkeypatch.setattr(fleet_groups, "stacks", lambda _: True)


@pytest.mark.parametrize("is_stacked", [False, True], ids=["in turn", "stacked"])
def test_a_member_is_the_run_that_it_would_be_alone(
    tiny_config: Path, tmp_path: Path, request: pytest.FixtureRequest, is_stacked: bool
):
    """Stacked to rounding, else to the bit; the log too, and its config.yaml makes it again."""
    if is_stacked:
        request.getfixturevalue("stacking")
    folder = run(configured(tiny_config, "--fleet.k", "2,4", "--fleet.lr", "1e-3,2e-3"))
    for name in ("k2_lr0.001", "k4_lr0.002"):
        member = folder / name
        alone = run(configured(member / "config.yaml", "--run.folder", str(tmp_path / name)))
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if is_stacked else {"rtol": 0, "atol": 0}
        for tensor in TENSORS:
            found, want = (getattr(sae.load(place), tensor) for place in (member, alone))
            torch.testing.assert_close(found, want, **tolerance)
        for row, other in zip(logged(member), logged(alone), strict=True):
            assert row == (pytest.approx(other, rel=1e-4) if is_stacked else other)
        assert read_run_config(member).fleet.is_empty


def test_hookpoints_share_one_forward(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each member has its own module's activations, and the model reads the text once."""
    import sae.stream.reader as reader

    honest, forwards = reader.capture, []

    def counted(module: Any, hookpoints: Any, tokens: torch.Tensor) -> Any:
        forwards.append(len(hookpoints))
        return honest(module, hookpoints, tokens)

    monkeypatch.setattr(reader, "capture", counted)
    points = ["model.layers.0", "model.layers.2:in"]
    flags = ["--train.step", "autograd"]
    folder = run(configured(tiny_config, *flags, "--fleet.hookpoint", *points, "--fleet.k", "2,4"))
    in_fleet, places = len(forwards), ["model.layers.0_k4", "model.layers.2-in_k4"]
    for place, point in zip(places, points, strict=True):
        forwards.clear()
        own = ["--model.hookpoint", point, "--run.folder", str(tmp_path / place)]
        alone = sae.load(run(configured(tiny_config, *flags, *own)))
        member = sae.load(folder / place)
        assert torch.equal(member.W_enc, alone.W_enc)
        assert member.metadata == alone.metadata
        assert len(forwards) == in_fleet


@pytest.mark.parametrize("places", [CROSSCODER, CROSS_LAYER], ids=["crosscoder", "cross_layer"])
def test_coders_of_several_places_are_a_fleet(tiny_config: Path, tmp_path: Path, places: list[str]):
    """All members have all the places; each is the run that it would be alone, also if stopped."""
    folder = run(configured(tiny_config, *places, "--fleet.k", "2,4"))
    alone = run(configured(folder / "k4/config.yaml", "--run.folder", str(tmp_path / "alone")))
    member, expected = sae.load(folder / "k4"), sae.load(alone)
    assert member.sites == expected.sites
    assert member.metadata == expected.metadata
    for tensor in TENSORS:
        assert torch.equal(getattr(member, tensor), getattr(expected, tensor))
    shutil.rmtree(sorted((folder / "checkpoints").iterdir())[-1])  # as if it had been killed
    for name in ("k2", "k4"):
        shutil.rmtree(folder / name / "final")
    run(configured(tiny_config, *places, "--fleet.k", "2,4", "--train.resume", "auto"))
    again = sae.load(folder / "k4")
    assert again.metadata == expected.metadata
    assert torch.equal(again.W_dec, expected.W_dec)


def test_data_comes_in_the_order_of_the_runs_seed(tiny_config: Path):
    """Members' seeds choose weights alone: all see the same batches."""
    folder = run(configured(tiny_config, "--fleet.seed", "0,1", "--run.seed", "7"))
    first, second = (logged(folder / name) for name in ("seed0", "seed1"))
    assert first[-1]["fvu"] != second[-1]["fvu"]
    weights = [sae.load(folder / name).W_enc for name in ("seed0", "seed1")]
    assert not torch.allclose(weights[0], weights[1])
    alone = run(configured(tiny_config, "--run.seed", "7", "--run.folder", str(folder) + "_alone"))
    position = json.loads(next(folder.glob("checkpoints/*24/stream.json")).read_text())
    other = json.loads(next(alone.glob("checkpoints/*24/rank_0.json")).read_text())
    assert position == other
    buffer = load_file(next(folder.glob("checkpoints/*24/stream.safetensors")))
    of_alone = load_file(next(alone.glob("checkpoints/*24/rank_0.safetensors")))
    assert torch.equal(buffer["lane_0.buffer.0"], of_alone["source.lane_0.buffer.0"])


def test_side_by_side_is_one_after_the_other(tiny_config: Path, tmp_path: Path):
    """Two threads, which take up coders as they are free, train what one thread trains."""
    flags = ["--fleet.seed", "0,1,2"]
    in_turn = run(configured(tiny_config, *flags, "--run.folder", str(tmp_path / "in_turn")))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = run(configured(tiny_config, *flags))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for name in ("seed0", "seed1", "seed2"):
        found, want = (sae.load(place / name).W_enc for place in (together, in_turn))
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_a_world_serves_a_fleet(tmp_path: Path):
    flat = {"world.name": "toy_model", "coder.d_sae": 16, "coder.k": 1, "train.tokens": 4096}
    more = {"train.batch_tokens": 512, "fleet.k": [1, 2], "run.folder": str(tmp_path / "fleet")}
    folder = run(from_flat({**flat, **more}))
    for name, k in (("k1", 1), ("k2", 2)):
        assert logged(folder / name)[-1]["l0"] <= k
        assert sae.load(folder / name).metadata["world"]


def test_shards_serve_a_fleet(tiny_config: Path, tmp_path: Path):
    points = ["model.layers.0", "model.layers.1"]
    shards = ["--harvest.folder", str(tmp_path / "shards")]
    done = run_here("harvest", tiny_config, "--model.hookpoint", ",".join(points), *shards)
    assert done.returncode == 0, done.stderr
    flags = ["--fleet.hookpoint", *points, "--stream.shards", str(tmp_path / "shards")]
    folder = run(configured(tiny_config, *flags))
    assert [sae.load(folder / p).metadata["hook_name"] for p in points] == points


# ---- the command line, the page


def test_the_command_trains_measures_and_compares(tiny_config: Path):
    """As a user does it: one line, then `sae eval` and `sae report` of a member, as of any run."""
    done = run_here("train", tiny_config, "--fleet.k", "2,4", "--fleet.seed", "0,1")
    assert done.returncode == 0, done.stderr
    folder = tiny_config.parent / "run"
    assert "summary.html" in done.stdout
    members = json.loads((folder / "summary.json").read_text())["members"]
    assert [m["name"] for m in members] == ["k2_seed0", "k2_seed1", "k4_seed0", "k4_seed1"]
    for member in members:
        last = read_metrics(folder / member["name"])[-1]
        assert member["settings"] == {
            "coder.k": int(member["name"][1]),
            "run.seed": int(member["name"][-1]),
        }
        for name in ("fvu", "l0", "dead_share", "loss", "tokens"):
            assert member[name] == last[name]
        assert (folder / member["name"] / "env.json").exists()
    page = (folder / "summary.html").read_text()
    assert page.count("<circle") == 4
    assert page.count("<polyline") == 2, "a line for each seed"
    assert all(f"<code>{m['name']}</code>" in page for m in members)
    small = ["--eval.tokens", "500", "--eval.downstream_tokens", "100"]
    assert run_here("eval", folder / "k2_seed1", *small).returncode == 0
    assert (folder / "k2_seed1/results.json").exists()
    assert run_here("report", folder / "k4_seed0", "--report.tokens", "500").returncode == 0
    assert (folder / "k4_seed0/report.html").exists()


def test_trackers_are_of_each_member(tiny_config: Path):
    folder = run(configured(tiny_config, "--fleet.k", "2,4", "--run.trackers", "tensorboard"))
    assert all(list((folder / name / "tensorboard").iterdir()) for name in ("k2", "k4"))


def test_the_plan_names_members_and_adds_them_up(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
):
    from sae.train import plan as planning

    monkeypatch.setattr(planning, "plan", partial(planning.plan, seconds=0.1))
    one = planning.plan(configured(tiny_config))
    cfg = configured(tiny_config, "--fleet.seed", "0,1,2")
    fleet = planning.plan(cfg)
    assert fleet.members == ("seed0", "seed1", "seed2")
    for part in ("coder", "optimiser"):
        assert fleet.memory[part] == 3 * one.memory[part]
    assert fleet.memory["shuffle buffer"] == one.memory["shuffle buffer"]
    assert fleet.disk["dictionary"] == 3 * one.disk["dictionary"]
    assert not (tiny_config.parent / "run").exists()
    done = run_here("plan", tiny_config, "--fleet.seed", "0,1,2")
    assert "3 coders on one stream" in done.stdout
    assert "seed2" in done.stdout


# ---- going on


def states(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    files = sorted(newest.rglob("*.safetensors"))
    return {
        f"{file.relative_to(newest)}:{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


def assert_same_fleet(first: Path, second: Path) -> None:
    one, other = states(first), states(second)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    members = [m.name for m in members_of(read_run_config(first))]
    for name in members:
        assert logged(first / name) == logged(second / name)
        for tensor in TENSORS:
            found = [getattr(sae.load(place / name), tensor) for place in (first, second)]
            assert torch.equal(*found)
    summaries = [json.loads((place / "summary.json").read_text()) for place in (first, second)]
    assert summaries[0] == summaries[1]


# One group is stacked, one is of a coder that steps alone, on two hookpoints.
SWEEP = ["--fleet.activation", "topk,batchtopk,relu", "--fleet.hookpoint", "layers.1,layers.2"]
SWEEP += ["--coder.k_aux", "8"]
of_a_relu = pytest.mark.filterwarnings("ignore:The fused training step does not train")


@of_a_relu
@pytest.mark.usefixtures("stacking")
@pytest.mark.parametrize("stop_at", [8, 18])
def test_stop_and_resume_is_the_uninterrupted_fleet(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
):
    """Stopped by a signal at any step: mid-cycle and between log rows, and at a checkpoint."""
    whole = run(configured(tiny_config, *SWEEP, "--run.folder", str(tmp_path / "whole")))
    honest, sent = fleet_groups.lr_at, []

    def interrupting(step: int, cfg: Any) -> float:
        if step == stop_at and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(step, cfg)

    monkeypatch.setattr(fleet_groups, "lr_at", interrupting)
    with pytest.raises(Interrupted) as stopped:
        run(configured(tiny_config, *SWEEP))
    assert stopped.value.is_saved
    assert stopped.value.code == 128 + signal.SIGTERM
    resumed = run(configured(tiny_config, *SWEEP, "--train.resume", "auto"))
    assert_same_fleet(whole, resumed)


@of_a_relu
@pytest.mark.slow
def test_kill_9_and_resume_is_the_uninterrupted_fleet(tiny_config: Path, tmp_path: Path):
    flags = [*SWEEP, "--train.tokens", str(60 * 128), "--train.log_every_steps", "20"]
    whole = tmp_path / "whole"
    assert run_here("train", tiny_config, *flags, "--run.folder", whole).returncode == 0
    folder = tiny_config.parent / "run"
    process = subprocess.Popen(
        command("train", tiny_config, *flags),
        env=clean_environment(),
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(folder.glob("*/final"))
    done = run_here("train", tiny_config, *flags, "--train.resume", "auto")
    assert done.returncode == 0, done.stderr
    assert_same_fleet(whole, folder)


def test_another_fleet_is_not_continued(tiny_config: Path):
    run(configured(tiny_config, "--fleet.k", "2,4"))
    with pytest.raises(ValueError, match="already holds a run"):
        run(configured(tiny_config, "--fleet.k", "2,4"))
    with pytest.raises(ValueError, match=r"fleet.k was \(2, 4\), now \(2, 8\)"):
        run(configured(tiny_config, "--fleet.k", "2,8", "--train.resume", "auto"))


def test_a_fleet_that_failed_before_its_first_checkpoint_leaves_the_folder_free(tiny_config: Path):
    with pytest.raises(ValueError, match="too few"):
        run(configured(tiny_config, "--fleet.k", "2,4", "--stream.buffer_tokens", "100000"))
    assert (tiny_config.parent / "run/k2/config.yaml").exists()
    folder = run(configured(tiny_config, "--fleet.k", "2,8"))
    assert (folder / "k8/final").exists()


def test_a_member_that_diverges_is_named(tiny_config: Path):
    flags = ["--fleet.lr", "1e-3,1e30", "--train.step", "autograd"]
    with pytest.raises(ValueError, match=r"in member `lr1e.30` of the fleet, the loss on"):
        run(configured(tiny_config, *flags))


def test_a_damaged_member_is_named(tiny_config: Path):
    folder = run(configured(tiny_config, "--fleet.k", "2,4"))
    older, newest = sorted((folder / "checkpoints").glob("step_*"))
    file = newest / "k4/trainer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"k4/trainer.safetensors.*damaged.*{older.name}"):
        run(configured(tiny_config, "--fleet.k", "2,4", "--train.resume", "auto"))
