"""The language model whose activations are read: any causal LM that `transformers` loads.

The one idea: whatever the name (a hub id, a local folder, `package:NAME`), it ends as a local
folder or hub id for `from_pretrained`; GGUF files are converted once into the cache
(`sae.stream.gguf`). Code that a model brings along is never run. Where activations are read is in
`sae.stream.hookpoints`.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from sae.config import DtypeName, ModelConfig
from sae.stream.gguf import converted_folder
from sae.stream.packages import is_package_source, package_folder
from sae.stream.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in eval mode, none of whose weights asks for a gradient."""

    module: nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def vocabulary_size(self) -> int:
        """The number of token ids that the model reads, which its tokenizer may not use up."""
        module: Any = self.module
        return module.get_input_embeddings().weight.shape[0]

    @property
    def max_context_size(self) -> int | None:
        """The most tokens a context may have, where the model's config says it."""
        config: Any = self.module.config
        return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_language_model(cfg: ModelConfig, device: torch.device | str) -> LanguageModel:
    """Load the model and tokenizer that `cfg.name` names onto `device`.

    Raises ValueError where the name is wrong and RuntimeError where a package is missing or the
    hub can't be reached, before any weights are read.
    """
    dtype = model_dtype(cfg.dtype, torch.device(device))
    place = _locate(cfg.name)
    is_on_hub = isinstance(place, str)
    revision = cfg.revision if is_on_hub else None
    with quiet_transformers(show_progress=is_on_hub), _clear_errors(cfg.name):
        tokenizer = _load_tokenizer(place, revision)
        if cfg.reinitialised is None:
            module = _load_module(place, revision, dtype)
        else:
            module = _drawn_anew(place, revision, cfg.reinitialised).to(dtype)
    module = module.to(device).eval().requires_grad_(False)
    return LanguageModel(module, tokenizer, cfg.name)


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `cfg.name` names, without weights; errors as for the model."""
    place = _locate(cfg.name)
    is_on_hub = isinstance(place, str)
    with quiet_transformers(show_progress=False), _clear_errors(cfg.name):
        return _load_tokenizer(place, cfg.revision if is_on_hub else None)


def load_outline(cfg: ModelConfig) -> nn.Module:
    """Return the model that `cfg.name` names without weights or memory, on torch's meta device.

    Errors as for the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    place = _locate(cfg.name)
    is_on_hub = isinstance(place, str)
    with quiet_transformers(show_progress=False), _clear_errors(cfg.name):
        config = AutoConfig.from_pretrained(
            place, revision=cfg.revision if is_on_hub else None, trust_remote_code=False
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).eval()


def model_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights; auto is bfloat16 where `device` multiplies it natively."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return getattr(torch, name)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matmuls in bfloat16 run on units made for it, and not through float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return any(
            getattr(torch.cpu, check, bool)()
            for check in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        )
    return False


def _locate(name: str) -> Path | str:
    """Turn `model.name` into a local folder or a hub id, or say what is wrong with it."""
    if not name.strip():
        raise ValueError(
            "`model.name` must name a language model; got an empty name. "
            "Give a hub id, a local folder, or `package:NAME`."
        )
    if is_package_source(name):
        return _packaged_model(name)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return converted_folder(path)
    if path.is_dir():
        return _model_folder(path)
    if path.exists() or not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ValueError(
            f"`model.name` must be a hub id, a local model folder, or `package:NAME`; got {name!r},"
            " which is not a folder here and can't be a hub id. Check the path."
        )
    return name


def _model_folder(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise ValueError(
            f"`model.name` must be a folder that holds a model; got {str(path)!r}, which has no "
            "config.json. Give the folder that `save_pretrained` wrote."
        )
    return path


def _packaged_model(name: str) -> Path:
    folder = package_folder(name)
    if (folder / "config.json").is_file():
        return folder
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise ValueError(
            f"`model.name` must name a package with a config.json or one .gguf file; got {name!r}, "
            f"whose .gguf files are: {found}. Give another package, or the path of one file."
        )
    return converted_folder(files[0])


def _load_tokenizer(place: Path | str, revision: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)


def _load_module(place: Path | str, revision: str | None, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        place, revision=revision, dtype=dtype, trust_remote_code=False, output_loading_info=True
    )
    module, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        warnings.warn(
            f"{place} has no weights for {', '.join(missing[:5])} ({len(missing)} in all); they "
            "are random. Activations before them are right, the model's loss is not.",
            stacklevel=4,
        )
    return module


def _drawn_anew(place: Path | str, revision: str | None, seed: int) -> nn.Module:
    """Return the model with the weights that it has before training, drawn in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """Say what to do where `transformers` fails to find or read the model."""
    try:
        yield
    except ImportError as error:
        raise RuntimeError(f"Loading {name!r} needs a missing package: {error}") from error
    except (OSError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"`model.name` must be a model that transformers itself can run; got {name!r}, "
                "which brings its own code, and that is never run. Choose another model."
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"`model.name` must be a model in plain weights; the weights of {name!r} are "
                "damaged or carry code, and that is never run. Use its safetensors form."
            ) from error
        raise _load_error(name, error) from error


def _load_error(name: str, error: Exception) -> Exception:
    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
    if Path(name).expanduser().exists() or is_package_source(name):
        return ValueError(
            f"`model.name` must be a causal language model whose files are whole; got {name!r}, "
            f"which could not be loaded: {cause} Download or save it again."
        )
    kind = RuntimeError if "connect" in cause.lower() else ValueError
    return kind(
        "`model.name` must be a hub id, a local folder, or `package:NAME`; there is no folder "
        f"{name!r} here, and the hub did not give such a model: {cause} "
        "Check the spelling, the working directory and the connection."
    )
