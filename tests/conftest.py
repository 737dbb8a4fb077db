"""Fixtures that several packages' tests share: a tiny language model and a tiny text source.

Both are made from seeds, need no network, and are written once a session.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch

# Triton reads this where a kernel is defined, so it must stand before sae_kernels is imported.
# With a GPU the kernels are compiled, and the same tests run them there.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Triton 3.9 warns at its first compilation where this is unset, and warnings are errors here.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# Two threads a process stall on machines that are shared; one gives the same numbers everywhere.
torch.set_num_threads(1)

# On a machine with a GPU only the kernels' tests and those marked `gpu` use it, so that the others
# are the same everywhere; with SAE_TESTS_ON=gpu all do.
HAS_GPU, ALL_ON_GPU = torch.cuda.is_available(), os.environ.get("SAE_TESTS_ON") == "gpu"

N_DOCUMENTS = 300
SPECIAL_TOKENS = ["<bos>", "<eos>", "<pad>"]
VOCABULARY = (
    "the of and to in a is that it was for on are with as his they be at one have this from or "
    "had by hot but some what there we can out other were all your when up use word how said an "
    "each she which do their time if will way about many then them would write like so these her "
    "long make thing see him two has look more day could go come did my sound no most number who"
)


@pytest.fixture(autouse=True)
def on_one_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Hide the GPU from tests that are not about it."""
    is_about_it = ALL_ON_GPU or request.node.get_closest_marker("gpu") is not None
    if HAS_GPU and "kernels" not in request.path.parts:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        if not is_about_it:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that a test starts


def _documents() -> list[str]:
    """Seeded documents of 5 to 120 words, their frequencies falling as 1 / rank."""
    generator = random.Random(0)
    words = VOCABULARY.split()
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    lengths = [generator.randint(5, 120) for _ in range(N_DOCUMENTS)]
    return [" ".join(generator.choices(words, weights, k=length)) + "." for length in lengths]


@pytest.fixture(scope="session")
def tiny_text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of 300 seeded documents, one a line, in the column `text`."""
    path = tmp_path_factory.mktemp("text") / "tiny.jsonl"
    lines = (json.dumps({"text": document, "label": "x"}) for document in _documents())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random Llama (4 layers, hidden 32, vocabulary 300) and its byte-level tokenizer.

    Its BOS token has id 0, EOS 1, padding 2.
    """
    folder = tmp_path_factory.mktemp("tiny_lm")
    _save_tokenizer(folder)
    _save_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run_tree(tiny_lm_folder: Path, tiny_text_file: Path) -> dict[str, dict]:
    """The YAML tree of a run on the tiny model that trains, evaluates and reports in seconds."""
    return {
        "model": {
            "name": str(tiny_lm_folder),
            "hookpoint": "model.layers.1",
            "dtype": "float32",  # auto is bfloat16 on a CPU that multiplies it
        },
        "data": {"source": str(tiny_text_file), "context_size": 32, "held_out_fraction": 0.2},
        "stream": {"buffer_tokens": 1000, "calibration_sequences": 8},
        "coder": {"d_sae": 96, "k": 4},
        "train": {"tokens": 5120, "batch_tokens": 128},
        "eval": {"tokens": 1000, "downstream_tokens": 400, "intervention_latents": 4},
        "report": {"tokens": 4000, "contexts_per_latent": 3},
    }


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_documents(), trainer)
    bos, eos, pad = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=128,
    )
    fast.save_pretrained(folder)


def _save_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
