"""GGUF files as ordinary model folders, converted once.

`transformers` needs tens of seconds to unpack a GGUF file, so the first load writes what it read
as safetensors into the cache, under a name made from the file's content. A folder in the cache is
whole or absent: it is written beside and renamed.

The cache is `$SAE_CACHE`, else `$XDG_CACHE_HOME/sae`, else `~/.cache/sae`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sae.files import explained_write, sync
from sae.stream.quiet import quiet_transformers

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return where converted models are kept."""
    if own := os.environ.get("SAE_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "sae"


def converted_folder(file: Path) -> Path:
    """Return a model folder with the weights and tokenizer of a GGUF file, converting it once.

    The weights are dequantised to float32, so that nothing is lost a second time. Raises
    RuntimeError where the package `gguf` is missing or the file can't be converted.
    """
    folder = cache_folder() / "models" / f"{file.stem}-{_content_key(file)}"
    if not folder.is_dir():
        _require_gguf(file)
        _log.info("Converting %s to %s; this happens once.", file.name, folder)
        with quiet_transformers(), redirect_stderr(io.StringIO()):  # its bars heed no setting
            _write_whole(folder, *_read(file))
    return folder


def _content_key(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _require_gguf(file: Path) -> None:
    if find_spec("gguf") is None:
        raise RuntimeError(
            f"Reading `{file.name}` needs the Python package 'gguf', which is not installed here. "
            "Run `pip install gguf`, or install this project with its extra `demo`."
        )


def _write_whole(folder: Path, *parts: Any) -> None:
    """Save the model's parts into a fresh folder beside `folder`, then give it its name.

    Processes that convert at the same time each write their own; the first to finish names it.
    """
    with explained_write(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for part in parts:
                part.save_pretrained(beside)
            for path in (*beside.iterdir(), beside):
                sync(path)
            beside.chmod(0o755)
            _rename(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _rename(beside: Path, folder: Path) -> None:
    try:
        beside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _read(file: Path) -> tuple[Any, Any]:
    """Return the tokenizer and the model, dequantised, that a GGUF file holds."""
    import transformers

    # Before version 5, `gguf_file` alone dequantised.
    config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config(dequantize=True)} if config else {}
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.float32, **options
        )
    except (OSError, ValueError, LookupError, NotImplementedError) as error:
        raise RuntimeError(
            f"`{file}` must be a GGUF file that transformers can unpack; {type(error).__name__}: "
            f"{str(error).rstrip('.')}. "
            "Download it again, or use the model's safetensors form."
        ) from error
    return tokenizer, model
