"""`sae.fit`: train a dictionary on activations that you already have, with the same trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae.coder import SparseCoder, save_dictionary
from sae.config import ActivationName, Config
from sae.configuration import dotted_keys, from_flat, unknown_key_message
from sae.stream.arrays import open_source
from sae.train.distributed import make_accelerator
from sae.train.folder import require_free
from sae.train.run import prepare_folder, resolve
from sae.train.trainer import train_coder

SECTIONS = ("coder", "train", "stream", "run")


def fit(
    activations: Any,
    *,
    d_sae: int | None = None,
    k: int = 32,
    activation: ActivationName = "topk",
    tokens: int | None = None,
    progress: bool = True,
    **overrides: Any,
) -> SparseCoder:
    """Train a coder on activations of anything and return it; it works on raw activations.

    Args:
        activations: a tensor or array (n, d_in), a path (.npy, .safetensors or a folder of them),
            or an iterator of (n, d_in) batches.
        d_sae: number of latents; None: 8 · d_in. k: active latents a token (topk).
        tokens: rows trained on, counting repeats; None: ten passes over a tensor, array or path,
            at least 100,000.
        progress: show a progress bar.
        overrides: any other setting of the sections coder, train, stream and run by its name, such
            as lr=1e-3, batch_tokens=1024, seed=1, folder="runs/mine" (which keeps log, checkpoints
            and the dictionary) and resume="auto".

    Errors: ValueError for settings that cannot work and for activations that are not finite.
    """
    given = {"d_sae": d_sae, "k": k, "activation": activation, **overrides}
    cfg = from_flat({_dotted(name): value for name, value in given.items()})
    accelerator = make_accelerator(cfg.run, cfg.train)
    source = open_source(
        activations,
        seed=cfg.run.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    cfg = from_flat(_length(tokens, source, cfg), cfg)
    folder = Path(cfg.run.folder) if cfg.run.folder else None
    if folder is not None:
        require_free(folder, cfg)
    cfg = resolve(cfg, source.d_in, folder, accelerator.device)
    resume_from = prepare_folder(cfg, folder, accelerator) if folder else None
    coder = train_coder(
        cfg, source, accelerator, folder=folder, resume_from=resume_from, is_shown=progress
    )
    if folder is not None and accelerator.is_main_process:
        save_dictionary(coder, folder / "final")
    return coder


def _dotted(name: str) -> str:
    """Return the dotted key of a setting's bare name."""
    known = dict(dotted_keys())
    matches = [key for key in known if key.split(".") in [[s, name] for s in SECTIONS]]
    if not matches:
        bare = {key.split(".")[1]: None for key in known if key.split(".")[0] in SECTIONS}
        raise ValueError(unknown_key_message(name, bare))
    return matches[0]


def _length(tokens: int | None, source: Any, cfg: Config) -> dict[str, int]:
    """Return the run's length and a batch that fits into it."""
    if tokens is None:
        if not hasattr(source, "rows"):
            raise ValueError("`tokens` must be given when activations come from an iterator.")
        tokens = max(10 * len(source.rows), 100_000)
    return {
        "train.tokens": tokens,
        "train.batch_tokens": min(cfg.train.batch_tokens, tokens),
    }
