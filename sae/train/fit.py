"""`sae.fit`: train a dictionary on activations that you already have, with the same trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae.coder import SparseCoder, save_dictionary
from sae.coder.sites import Sites
from sae.config import ActivationName, Config
from sae.configuration import dotted_keys, from_flat, unknown_key_message
from sae.stream.arrays import open_source
from sae.train.distributed import make_accelerator, require_divisible
from sae.train.folder import require_free
from sae.train.run import prepare_folder, resolve
from sae.train.trainer import train_coder

# What applies to activations that already exist; the rest of `stream` is about making them.
SETTINGS = tuple(
    key
    for key, _ in dotted_keys()
    if key.split(".")[0] in ("coder", "train", "run") or key == "stream.normalisation"
)
NEED_FOLDER = ("trackers", "wandb_project", "resume", "checkpoint_every_steps", "keep_checkpoints")


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
    """Train a coder on activations of anything and return it, on the device it was trained on.

    The coder works on raw activations.

    Args:
        activations: a tensor or array (n, d_in), a path (.npy, .safetensors or a folder of them),
            or an iterator of (n, d_in) batches. For a transcoder a list of two of these, of what
            is read and what is written; for a crosscoder, one a place.
        d_sae: number of latents; None: 8 · d_in. k: active latents a token (topk).
        tokens: rows trained on, counting repeats; None: ten passes over a tensor, array or path,
            at least 100,000.
        progress: show a progress bar.
        overrides: any other setting of the sections coder, train and run, and `normalisation`, by
            its name: lr=1e-3, batch_tokens=1024, seed=1, normalisation="whiten", device="cpu",
            folder="runs/mine" (which keeps log, checkpoints and the dictionary), resume="auto".

    Errors: ValueError for settings that cannot work and for activations that are not finite.
    """
    require_folder_for(overrides)
    if overrides.get("model_loss", "none") != "none":
        raise ValueError(
            "`model_loss` needs a language model, which activations alone are not; got "
            f"{overrides['model_loss']!r}. Train from a configuration."
        )
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
    require_divisible(cfg.train, accelerator.num_processes)
    folder = Path(cfg.run.folder) if cfg.run.folder else None
    if folder is not None:
        source.state()  # an iterator has none, and says so
        if accelerator.is_main_process:
            require_free(folder, cfg)
        accelerator.wait_for_everyone()
    sites = Sites.of(cfg.coder, source.widths)
    cfg = resolve(cfg, sites, folder, accelerator.device)
    resume_from = prepare_folder(cfg, folder, accelerator) if folder else None
    coder = train_coder(
        cfg, source, accelerator, folder=folder, resume_from=resume_from, is_shown=progress
    )
    if folder is not None and accelerator.is_main_process:
        save_dictionary(coder, folder / "final")
    accelerator.wait_for_everyone()
    return coder.to(accelerator.device)


def require_folder_for(overrides: Mapping[str, Any]) -> None:
    """Refuse settings that do nothing where nothing is kept."""
    idle = [name for name in NEED_FOLDER if name in overrides]
    if idle and not overrides.get("folder"):
        raise ValueError(
            f'`{idle[0]}` needs a run\'s folder; got none. Give folder="runs/mine" too.'
        )


def _dotted(name: str) -> str:
    """Return the dotted key of a setting's bare name."""
    bare = {key.split(".")[1]: key for key in SETTINGS}
    if name not in bare:
        raise ValueError(unknown_key_message(name, bare))
    return bare[name]


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
