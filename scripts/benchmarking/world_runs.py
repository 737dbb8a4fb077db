"""What is trained on a world: our recipes, the peers of sae-lens, and the nulls around them.

Every trainer gets the same rows for a seed: `World.batches(n, seed=seed)`. The time to make them is
taken out of the time of training. What is measured is what was saved and loaded again.
"""

import contextlib
import importlib.util
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sae
from sae.coder import save_dictionary
from sae.coder.sites import Sites
from sae.configuration import from_command_line, from_flat
from sae.evals.evaluable import Evaluable
from sae.evals.null_rows import CALIBRATION_TOKENS, NullInputs
from sae.evals.null_rows import NULLS as NULL_ROWS
from sae.evals.nulls import (
    Directions,
    PermutedDecoder,
    RandomDirections,
    ShuffledCodes,
    TrueDictionary,
)
from sae.evals.on_world import frequent_features
from sae.files import read_json, write_json
from sae.train.distributed import make_accelerator
from sae.train.run import resolve, with_world
from sae.train.trainer import train_coder
from sae.worlds import World, WorldSource
from sae.worlds.seeds import calibration_generator

from . import machine
from .rows import Absent

BASE: dict[str, Any] = {
    "coder.d_sae": 256,
    "coder.k": 5,
    "train.batch_tokens": 1024,
    "train.lr": 3e-4,
    "train.warmup_fraction": 0.0,
    "train.decay_fraction": 0.0,
    "train.log_every_steps": 1000,
}
# A recipe of ours is a configuration in configs/worlds, named after its file.
CONFIGS = machine.ROOT / "configs" / "worlds"
OF_OTHER_WORLDS = ("matryoshka_toy", "toy_model")
FOUND = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
RECIPES_16K = {name: path for name, path in FOUND.items() if name.startswith("synth_16k")}
RECIPES = {
    name: path for name, path in FOUND.items() if name not in (*OF_OTHER_WORLDS, *RECIPES_16K)
}
PEERS = ("sae-lens batchtopk", "sae-lens matryoshka")
NULLS = ("oracle", "frozen random decoder", "random directions", "oracle, codes shuffled")
# Made of the rows that the dictionary is measured on first, or of BatchTopK's dictionary.
FITTED = {"PCA": "pca", "identity": "identity"}
BROKEN = {"batchtopk, decoder rows permuted": "permuted", "batchtopk, codes shuffled": "shuffled"}
TIED = "true directions, tied linear encoder"
# A row each of what is known of metrics: from the truth to codes shuffled in time.
METRICS = (
    *("oracle", TIED, "matryoshka", "batchtopk", "topk", "matching_pursuit", "relu"),
    *("frozen random decoder", "random directions", *FITTED, *BROKEN),
)
FACTS_FILE = "trained.json"
MATRYOSHKA_SHARES = (128, 512, 2048, 4096)  # of 4096, as the benchmark's own widths


@dataclass(frozen=True)
class Task:
    """One run: a world, how many samples, the seed, and what all share.

    base: the size of the dictionary, and what trainers without a configuration of ours train with.
    given: dotted settings that replace those of all, ours too.
    keep: where dictionaries of ours stay, and are taken from where they are there already.
    """

    world: World
    samples: int
    seed: int
    base: dict[str, Any]
    given: dict[str, Any]
    keep: Path | None = None

    @property
    def batch(self) -> int:
        return self.base["train.batch_tokens"]


@dataclass
class Trained:
    """A dictionary as it is after saving and loading, and what it took.

    data_seconds: of making samples, not part of the seconds; None where they cannot be told apart.
    """

    coder: Any
    seconds: float = 0.0
    data_seconds: float | None = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


class TimedWorld:
    """A world whose making of training rows is timed."""

    def __init__(self, world: World) -> None:
        self._world, self.seconds = world, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)

    def training_block(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._timed():
            return self._world.training_block(*args, **kwargs)

    def batches(self, n: int, *, seed: int) -> Iterator[Tensor]:
        rows = self._world.batches(n, seed=seed)
        while True:
            with self._timed():
                batch = next(rows)
            yield batch

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def train(recipe: str, task: Task) -> Trained:
    """Return what a recipe, a peer or a null gives.

    Errors: Absent for a peer that is not installed; ValueError for settings that cannot work.
    """
    makers: dict[str, Callable[[Task], Trained]] = {
        "oracle": _oracle,
        "frozen random decoder": _frozen_decoder,
        "random directions": _random_directions,
        "oracle, codes shuffled": _shuffled,
        TIED: _tied,
        **{name: partial(_fitted, null) for name, null in FITTED.items()},
        **{name: partial(_broken, null) for name, null in BROKEN.items()},
        "sae-lens batchtopk": lambda task: _sae_lens(task, is_matryoshka=False),
        "sae-lens matryoshka": lambda task: _sae_lens(task, is_matryoshka=True),
    }
    return (
        makers[recipe](task) if recipe in makers else _ours((RECIPES | RECIPES_16K)[recipe], task)
    )


def _ours(config: Path, task: Task, name: str | None = None) -> Trained:
    """Return a dictionary of ours as it is after saving and loading, trained unless it was kept."""
    with contextlib.ExitStack() as stack:
        folder = task.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder / f"{name or config.stem}-{task.seed}"
        if not (folder / FACTS_FILE).exists():
            _train_ours(config, task, folder)
        facts = read_json(folder / FACTS_FILE)
        times = (facts.pop("seconds"), facts.pop("data_seconds"))
        return Trained(sae.load(folder / "final").to(task.world.device), *times, facts)


def _train_ours(config: Path, task: Task, folder: Path) -> None:
    """Train, save the dictionary and, when that is done, what it took."""
    fixed = {
        "train.tokens": task.samples,
        "run.seed": task.seed,
        "run.device": task.world.device.type,
    }
    cfg = with_world(
        from_flat({**task.given, **fixed}, from_command_line([str(config)], "bench_worlds"))
    )
    cfg = replace(cfg, world=task.world.cfg)
    on_cpu = task.world.device.type == "cpu"  # elsewhere the making of samples overlaps with steps
    timed = TimedWorld(task.world)
    accelerator = make_accelerator(cfg.run, cfg.train)
    source = WorldSource(timed if on_cpu else task.world, seed=task.seed)  # type: ignore[arg-type]
    cfg = resolve(cfg, Sites(source.widths), None, accelerator.device)
    start = time.perf_counter()
    coder = train_coder(cfg, source, accelerator, is_shown=False)
    seconds = time.perf_counter() - start
    save_dictionary(coder, folder / "final")
    data_seconds = timed.seconds if on_cpu else None
    times = {"seconds": seconds - timed.seconds, "data_seconds": data_seconds}
    facts = {"config": f"{CONFIGS.name}/{config.name}", "step": cfg.train.step}
    write_json(folder / FACTS_FILE, {**facts, **times})


def _sae_lens(task: Task, *, is_matryoshka: bool) -> Trained:
    """Train with the package's own trainer and the defaults of its benchmark on toy data."""
    if importlib.util.find_spec("sae_lens") is None:
        raise Absent("the package sae-lens is not installed")
    if task.world.device.type != "cpu":
        raise Absent("sae-lens is trained on a CPU here")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        import sae_lens  # pyright: ignore[reportMissingImports]

        torch.manual_seed(task.seed)
        timed = TimedWorld(task.world)
        coder = _sae_lens_coder(task, is_matryoshka)
        trainer = _sae_lens_trainer(coder, task, timed.batches(task.batch, seed=task.seed))
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            trainer.fit()
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            coder.save_inference_model(folder)
            loaded = sae_lens.SAE.load_from_disk(folder, device="cpu")
    facts = {"package": f"sae-lens {sae_lens.__version__}", "saved as": type(loaded).__name__}
    return Trained(loaded, seconds - timed.seconds, timed.seconds, facts)


def _sae_lens_coder(task: Task, is_matryoshka: bool) -> Any:
    from sae_lens.saes import batchtopk_sae, matryoshka_batchtopk_sae  # pyright: ignore

    d_sae = task.base["coder.d_sae"]
    shared = {"d_in": task.world.d_in, "d_sae": d_sae, "k": float(task.base["coder.k"])}
    if not is_matryoshka:
        return batchtopk_sae.BatchTopKTrainingSAE(
            batchtopk_sae.BatchTopKTrainingSAEConfig(**shared)
        )
    widths = [d_sae * share // MATRYOSHKA_SHARES[-1] for share in MATRYOSHKA_SHARES]
    return matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE(
        matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig(
            **shared, matryoshka_widths=widths
        )
    )


def _sae_lens_trainer(coder: Any, task: Task, batches: Iterator[Tensor]) -> Any:
    """Return its SAETrainer with the settings that its `train_toy_sae` gives it."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig  # pyright: ignore
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore

    lr = task.base["train.lr"]
    cfg = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=task.samples,
        device="cpu",
        autocast=False,
        lr=lr,
        lr_end=lr,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=task.batch,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False, eval_every_n_wandb_logs=2**31 - 1),
        n_batches_for_norm_estimate=1000,
    )
    return SAETrainer(cfg=cfg, sae=coder, data_provider=batches)


def _oracle(task: Task) -> Trained:
    return Trained(_true_dictionary(task))


def _shuffled(task: Task) -> Trained:
    dictionary = _true_dictionary(task)
    return Trained(ShuffledCodes(dictionary, dictionary.d_sae))


def _random_directions(task: Task) -> Trained:
    d_sae, k = task.base["coder.d_sae"], task.base["coder.k"]
    return Trained(RandomDirections(task.world.bias, d_sae, k, task.seed))


def _tied(task: Task) -> Trained:
    """The true directions, each token written with the k that its projection is largest on."""
    true = _true_dictionary(task)
    return Trained(Directions(true.W_dec, true.b_dec, task.base["coder.k"]))


def _fitted(null: str, task: Task) -> Trained:
    """A null of the rows alone, with the L0 that is asked of dictionaries."""
    generator = calibration_generator(task.seed, task.world.device)
    rows = task.world.activations(CALIBRATION_TOKENS, generator)
    stand_in = Evaluable(_true_dictionary(task), task.world.d_in)
    make = NULL_ROWS[null].make
    assert make is not None
    return Trained(make(NullInputs(stand_in, rows, float(task.base["coder.k"]), task.seed)))


def _broken(null: str, task: Task) -> Trained:
    """BatchTopK's dictionary with its latents' rows, or its tokens' codes, in another order."""
    whole = _ours(RECIPES["batchtopk"], task).coder
    return Trained(
        PermutedDecoder(whole, task.seed) if null == "permuted" else ShuffledCodes(whole)
    )


def _true_dictionary(task: Task) -> TrueDictionary:
    return TrueDictionary(task.world, frequent_features(task.world, task.base["coder.d_sae"]))


def _frozen_decoder(task: Task) -> Trained:
    """Train TopK with Adam under random unit rows that stay."""
    null = {
        "train.freeze_decoder": True,
        "train.optimizer": "adam",
        "train.lr": task.base["train.lr"],
    }
    return _ours(RECIPES["topk"], replace(task, given={**task.given, **null}), "frozen")
