"""A dictionary's folder: `cfg.json` and `sae_weights.safetensors`, in SAELens v6 layout.

SAELens opens the folder as it is. What that layout cannot say (our own `CoderConfig`) stands under
its free-form metadata; `normalize_activations` there is our `has_layer_norm`. Tensors on disk are
W_enc (d_in, d_sae), W_dec (d_sae, d_in): W_enc is transposed here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae.coder.activations import ACTIVATIONS
from sae.coder.coder import SparseCoder
from sae.coder.sites import Sites
from sae.config import CoderConfig
from sae.files import new_folder, read_json, write_json, write_tensors

CFG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
OUR_KEY = "sae_coder_config"
LAYER_NORM = "layer_norm"  # SAELens' word, for SAELens' definition
OWN = ("threshold", "first_threshold", "r_mag", "b_mag", "W_skip")
# SAELens' names of transcoders, by those of autoencoders; it has no others.
THEIR_TRANSCODERS = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
SKIP_TRANSCODER = "skip_transcoder"
OF_THEIRS = {("gated", "b_enc"): "b_gate"}
EXTRAS: dict[str, Callable[[CoderConfig], dict[str, object]]] = {
    "topk": lambda cfg: {"k": cfg.k, "rescale_acts_by_decoder_norm": False},
    # Theirs stops where nothing is left or no new latent is found: ours takes its k steps.
    "matching_pursuit": lambda cfg: {
        "max_iterations": cfg.k,
        "residual_threshold": 0.0,
        "stop_on_duplicate_support": False,
    },
}


def save_dictionary(coder: SparseCoder, folder: str | Path) -> None:
    """Write `coder` to `folder`, replacing a dictionary that is there.

    The coder must work on raw activations (see `raw_units`).
    Errors: ValueError where the folder holds something else.
    """
    folder = Path(folder)
    others = (
        {p.name for p in folder.iterdir()} - {CFG_FILE, WEIGHTS_FILE} if folder.is_dir() else ()
    )
    if others:
        raise ValueError(
            f"`{folder}` must be empty or hold a dictionary alone; it also holds "
            f"{sorted(others)[:5]}. Choose another folder."
        )
    with new_folder(folder) as beside:
        write_dictionary_files(coder, beside)


def write_dictionary_files(coder: SparseCoder, folder: Path) -> None:
    """Write the two files of a dictionary into an existing folder."""
    write_tensors(folder / WEIGHTS_FILE, saelens_tensors(coder))
    write_json(folder / CFG_FILE, saelens_config(coder))


def saelens_tensors(coder: SparseCoder) -> dict[str, Tensor]:
    """Return what `sae_weights.safetensors` holds, by SAELens' names."""
    named = {name: getattr(coder, name) for name in tensor_names(coder)}
    return {
        OF_THEIRS.get((coder.cfg.activation, name), name): tensor.T if name == "W_enc" else tensor
        for name, tensor in named.items()
    }


def tensor_names(coder: SparseCoder) -> list[str]:
    """Return our names of the tensors that a dictionary's file holds."""
    if coder.is_tied:
        return ["W_dec", "b_dec"]
    return [
        "W_enc",
        "W_dec",
        "b_enc",
        "b_dec",
        *(n for n in OWN if getattr(coder, n, None) is not None),
    ]


def saelens_config(coder: SparseCoder) -> dict[str, object]:
    """Return `cfg.json` for `coder`.

    What SAELens has no word for gets one that it refuses, rather than another code.
    """
    return {
        "architecture": _architecture(coder),
        "d_in": coder.d_in,
        "d_sae": coder.d_sae,
        "dtype": str(coder.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": coder.writes_what_it_reads,
        "normalize_activations": LAYER_NORM if coder.has_layer_norm else "none",
        "reshape_activations": "none",
        **({} if coder.cfg.site == "sae" else _widths(coder)),
        **EXTRAS.get(coder.cfg.activation, lambda _: {})(coder.cfg),
        "metadata": {**coder.metadata, OUR_KEY: asdict(coder.cfg)},
    }


def _widths(coder: SparseCoder) -> dict[str, object]:
    """Return what `cfg.json` says of a coder of several places, or of another than it reads."""
    return {"d_out": coder.d_out, "site_widths": list(coder.sites.widths)}


def _architecture(coder: SparseCoder) -> str:
    theirs = ACTIVATIONS[coder.cfg.activation].saelens_architecture
    if coder.cfg.site == "transcoder" and theirs in THEIR_TRANSCODERS:
        if not coder.cfg.skip:
            return THEIR_TRANSCODERS[theirs]
        if theirs == "standard":
            return SKIP_TRANSCODER
    if coder.cfg.site != "sae":
        return f"sae_{coder.cfg.site}_{theirs}"
    if coder.cfg.refine_step:
        return f"sae_refined_{theirs}"
    return f"sae_signed_{theirs}" if coder.cfg.signed else theirs


def load_dictionary(folder: str | Path) -> SparseCoder:
    """Read a dictionary folder in SAELens v6 layout, ours or SAELens' own (topk, standard).

    Errors: ValueError naming the file that is missing, truncated or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder / CFG_FILE)
    tensors = read_weights(folder / WEIGHTS_FILE)
    coder = unfilled_coder(config, folder)
    _check_shapes(coder, tensors, folder / WEIGHTS_FILE)
    fill_(coder, config, tensors)
    return coder


def read_config(path: Path) -> dict:
    """Read a `cfg.json`, naming it where it says no sizes."""
    config = read_json(path)
    if not isinstance(config, dict) or not {"d_in", "d_sae"} <= config.keys():
        raise ValueError(f"`{path}` must give d_in and d_sae; it does not.")
    return config


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, naming it when it is truncated."""
    if not path.exists():
        raise ValueError(f"`{path}` must exist; the dictionary's folder lacks it.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"`{path}` must be a whole safetensors file; {error}. It is truncated or damaged: "
            "copy it again, or load an older checkpoint."
        ) from error


def unfilled_coder(config: dict, folder: Path) -> SparseCoder:
    """Return the coder that the `cfg.json` of `folder` means, its tensors still to be read.

    Errors: ValueError for an architecture or a normalisation that is not known.
    """
    cfg = coder_config(config, folder)
    widths = config.get("site_widths") or [config["d_in"], config.get("d_out")]
    return SparseCoder(
        config["d_in"],
        cfg,
        our_metadata(config),
        has_layer_norm=_has_layer_norm(config, folder),
        sites=None if cfg.site == "sae" else Sites.of(cfg, tuple(widths)),
    )


def _has_layer_norm(config: dict, folder: Path) -> bool:
    named = config.get("normalize_activations", "none")
    if named not in ("none", LAYER_NORM):
        raise ValueError(
            f"`normalize_activations` in {folder / CFG_FILE} must be none or {LAYER_NORM}; got "
            f"{named!r}. Fold the scale into the weights with SAELens "
            "(fold_activation_norm_scaling_factor) and save again."
        )
    return named == LAYER_NORM


def coder_config(config: dict, folder: Path) -> CoderConfig:
    """Return the `CoderConfig` that a `cfg.json` means."""
    if ours := config.get("metadata", {}).get(OUR_KEY):
        if unknown := ours.keys() - {field.name for field in fields(CoderConfig)}:
            raise ValueError(
                f"`{OUR_KEY}` in {folder / CFG_FILE} must hold settings of this version; it has "
                f"{sorted(unknown)}. Open it with the version that wrote it."
            )
        return CoderConfig(**{**ours, "prefixes": tuple(ours.get("prefixes", ()))})
    # A running threshold reads as a JumpReLU's, which comes behind it in the table.
    names = {row.saelens_architecture: name for name, row in ACTIVATIONS.items()}
    architecture = config.get("architecture")
    of_transcoders = {theirs: name for name, theirs in THEIR_TRANSCODERS.items()}
    of_transcoders[SKIP_TRANSCODER] = "standard"
    if architecture not in {**names, **of_transcoders}:
        raise ValueError(
            f"`architecture` in {folder / CFG_FILE} must be one of "
            f"{sorted({**names, **of_transcoders})}; got {architecture!r}."
        )
    return CoderConfig(
        activation=names[of_transcoders.get(architecture, architecture)],  # pyright: ignore[reportArgumentType]
        d_sae=config["d_sae"],
        k=config.get("k") or config.get("max_iterations") or 1,
        site="transcoder" if architecture in of_transcoders else "sae",
        skip=architecture == SKIP_TRANSCODER,
    )


def fill_(coder: SparseCoder, config: dict, tensors: dict[str, Tensor]) -> None:
    """Copy a file's tensors into `coder`, folding what its config asks of the reader."""
    with torch.no_grad():
        for name in tensor_names(coder):
            given = tensors[OF_THEIRS.get((coder.cfg.activation, name), name)]
            getattr(coder, name).copy_(given.T if name == "W_enc" else given)
        if coder.is_tied:
            return
        if config.get("rescale_acts_by_decoder_norm"):
            norms = coder.W_dec.norm(dim=1)
            coder.W_enc.mul_(norms[:, None])
            coder.b_enc.mul_(norms)
            coder.W_dec.div_(norms[:, None])
        if not config.get("apply_b_dec_to_input", True) and coder.writes_what_it_reads:
            # x W + b equals (x − b_dec) W + (b + W b_dec): one form serves both.
            shift = coder.W_enc @ coder.b_dec
            coder.b_enc.add_(shift)
            if coder.cfg.activation == "gated":
                coder.b_mag.add_(shift * coder.r_mag.exp())


def our_metadata(config: dict) -> dict[str, object]:
    """Return what a `cfg.json` remembers of the dictionary's origin."""
    return {key: value for key, value in config.get("metadata", {}).items() if key != OUR_KEY}


def _check_shapes(coder: SparseCoder, tensors: dict[str, Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in saelens_tensors(coder).items()}
    for name, shape in expected.items():
        given = tuple(tensors[name].shape) if name in tensors else None
        if given != shape:
            raise ValueError(
                f"`{name}` in {path} must have shape {shape} as {CFG_FILE} says; got {given}."
            )
