"""`sae plan`: what it says is what the run then takes, and it names the field that does not fit."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from user import run_here

from sae.config import Config
from sae.configuration import from_command_line, from_flat
from sae.train import plan as planning
from sae.train import run
from sae.train.plan import Plan, Speed, buffer_bytes, duration, plan, with_small_buffer
from sae.train.run import open_source, with_lanes


@pytest.fixture
def cfg(tiny_config: Path) -> Config:
    return from_command_line([str(tiny_config)], "sae plan")


@pytest.fixture
def planned(cfg: Config) -> Plan:
    return plan(cfg, seconds=0.1)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_disk_holds_what_was_planned(cfg: Config, planned: Plan):
    """At the end one checkpoint less than while the last is written."""
    folder = run(cfg)
    kept = len(list((folder / "checkpoints").iterdir()))
    assert kept == cfg.train.keep_checkpoints
    written = size_of(folder / "checkpoints") * (kept + 1) / kept + size_of(folder / "final")
    assert sum(planned.disk.values()) == pytest.approx(written, rel=0.1)


def test_the_parts_of_memory_are_those_of_the_run(cfg: Config, planned: Plan, monkeypatch):
    seen = {}

    def spied(cfg_, source, accelerator, **options):
        seen["model"] = sum(
            t.nbytes for t in source.lanes[0].stream.reader.sites[0][0].module.state_dict().values()
        )
        seen["coder"] = 4 * (2 * 32 * cfg_.coder.d_sae + cfg_.coder.d_sae + 32)
        buffer = source.lanes[0].buffer
        plans = (
            buffer._freed,
            *([torch.empty(buffer.rows_replaced, dtype=torch.int64)] * cfg_.stream.reuse),
        )
        seen["shuffle buffer"] = sum(t.nbytes for t in (*buffer.tensors().values(),)) + sum(
            8 * buffer.rows_replaced for _ in plans
        )
        return honest(cfg_, source, accelerator, **options)

    running = import_module("sae.train.run")  # the package exports the function
    honest = running.train_coder
    monkeypatch.setattr(running, "train_coder", spied)
    run(cfg)
    assert planned.memory["shuffle buffer"] == pytest.approx(seen["shuffle buffer"], rel=0.01)
    assert planned.memory["coder"] == seen["coder"]
    assert planned.memory["optimiser"] == 2 * seen["coder"]
    assert planned.memory["model"] <= seen["model"]
    assert planned.memory["model"] > 0.5 * seen["model"]


def test_nothing_is_written(cfg: Config, planned: Plan):
    assert planned.steps == 24
    assert not Path(cfg.run.folder or "runs/run").exists()


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("memory_available", "Lower `stream.buffer_tokens`"),
        ("disk_free", "`train.keep_checkpoints`"),
    ],
)
def test_what_does_not_fit_names_the_field_to_change(planned: Plan, field: str, expected: str):
    assert planned.problems() == []
    tight = replace(planned, memory={**planned.memory, "shuffle buffer": 10**12}, **{field: 10**9})
    if field == "disk_free":
        tight = replace(tight, memory=planned.memory, disk={"checkpoints": 10**12})
    (problem,) = tight.problems()
    assert expected in problem
    assert re.search(r"\b100\d\.\d\d GB are needed", problem), problem


def test_every_part_of_memory_has_a_remedy(planned: Plan):
    named = set(planned.memory) - {"loading the model"}
    assert named <= planning.REMEDIES.keys()


def test_time_adds_up(cfg: Config):
    """Filling, then reading every activation once for its reuses, then the steps."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    reused = replace(cfg, stream=replace(cfg.stream, reuse=4, buffer_tokens=600, lanes=1))
    source = open_source(with_small_buffer(reused), accelerator)
    speed = Speed(rows_per_second=100.0, step_seconds=2.0)
    reading, training = cfg.train.tokens / 4 / 100, 24 * 2.0
    assert duration(reused, speed, source, accelerator) == pytest.approx(6 + reading + training)
    threaded = replace(reused, stream=replace(reused.stream, refill="thread"))
    assert duration(threaded, speed, source, accelerator) == pytest.approx(
        6 + max(reading, training)
    )
    assert buffer_bytes(reused, source) == int(600 * (32 * 4 + 8 * (1 + 0.5 * 5)))


def test_lanes_come_from_the_run_that_is_continued(cfg: Config):
    assert with_lanes(cfg, Path("nowhere"), 2).stream.lanes == 2
    folder = run(replace(cfg, stream=replace(cfg.stream, lanes=2)))
    assert with_lanes(cfg, folder, 1).stream.lanes == 2


def test_the_command_prints_a_table(tiny_config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "plan", partial(plan, seconds=0.1))
    done = run_here("plan", tiny_config)
    assert done.returncode == 0, done.stderr
    for words in ("peak", "shuffle buffer", "checkpoints", "a step", "in 24 steps", "in all"):
        assert words in done.stdout
    refused = run_here("plan", tiny_config, "--stream.buffer_tokens", "9000000000")
    assert refused.returncode == 2
    assert "the run does not fit. memory:" in refused.stderr
    assert "Lower `stream.buffer_tokens`" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "shares"),
    [
        (("train.optimizer", "muon"), (1, 0)),
        (("train.optimizer", "signum"), (2, 0)),
        (("train.ema_decay", 0.9), (2, 1)),
    ],
)
def test_optimisers_and_averages_are_counted(
    cfg: Config, flags: tuple[str, object], shares: tuple[int, int]
):
    """In units of the coder's own size; a few vectors of Adam's are beside muon's momentum."""
    found = plan(from_flat({flags[0]: flags[1], "train.step": "autograd"}, cfg), seconds=0.01)
    parts = found.memory["optimiser"], found.memory["average"]
    assert parts == pytest.approx([share * found.memory["coder"] for share in shares], rel=0.06)
