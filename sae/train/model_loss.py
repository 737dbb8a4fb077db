"""What the model loses when it runs on what the coder writes, as a loss to train by.

With p the next-token distribution of the clean forward and q that of a forward in which the coder's
x_hat stands in place of y at every token that counts (`evals.replacing`):
    kl = mean over counted positions of KL(p ‖ q)      ce = mean of −log q(next token)
It is added to a step's other losses, on contexts of its own, in the last `model_loss_fraction` of
the steps: 1 trains end to end, a small share fine-tunes what reconstruction found. Without a
`model_loss_weight` it counts as much as the reconstruction of the same tokens does: its factor is
reconstruction / kl, held constant.
Source: Braun et al. 2024 (arXiv 2405.12241), end-to-end dictionaries; Karvonen 2025 (arXiv
2503.17272), KL and MSE in a short fine-tuning, balanced like this.

The contexts of a step are a function of its number: a run that goes on reads past those before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder import SparseCoder
from sae.coder.reconstruction import mean_squared
from sae.coder.step_values import StepValues
from sae.config import Config
from sae.evals.downstream import counted_positions
from sae.evals.replacing import Places, clean_pass, logits_of, replaced
from sae.stream.contexts import Contexts
from sae.stream.opening import OpenedModel
from sae.train.schedule import first_with_model_loss
from sae.train.state import Calibration

SMALLEST = 1e-9


class ModelLoss:
    """The loss of one process, on its own share of the training documents."""

    def __init__(self, cfg: Config, opened: OpenedModel, rank: int = 0, world_size: int = 1):
        self.cfg, self.lm = cfg.train, opened.lm
        self.places = Places(opened.hookpoints, opened.targets, opened.other)
        self.first = first_with_model_loss(cfg.train)
        self._contexts = opened.contexts("train", rank=rank, world_size=world_size)
        self._taken = 0

    def is_due(self, step: int) -> bool:
        """Say whether the step with 0-based index `step` trains with it."""
        return step >= self.first

    def __call__(
        self, coder: SparseCoder, calibration: Calibration, values: StepValues, step: int
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted loss, to be differentiated, and kl or ce itself, both scalars."""
        contexts = self._contexts_of(step)
        clean, rows = clean_pass(self.lm, self.places, contexts.tokens)
        may_replace = _replaceable(coder, contexts, rows)
        written, reconstruction = self._written(coder, calibration, values, rows[may_replace])
        parts = written.split(list(coder.sites.written_widths), -1)
        with replaced(self.lm, self.places, may_replace, parts.__getitem__):
            logits = logits_of(self.lm, contexts.tokens)
        loss = self._loss(clean, logits, contexts, counted_positions(contexts, may_replace))
        weight = self.cfg.model_loss_weight
        if weight is None:
            return loss * (reconstruction / loss.detach().clamp_min(SMALLEST)), loss.detach()
        return weight * loss, loss.detach()

    def _written(
        self, coder: SparseCoder, calibration: Calibration, values: StepValues, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what the coder writes for raw rows, in raw units, and its reconstruction loss."""
        normaliser, sites = calibration.normaliser, coder.sites
        x = normaliser.apply(rows.to(coder.b_dec.device))
        read = sites.read(x)
        x_hat = coder.decode_for(coder.encode_for_losses(read, values).code, read)
        residual = (sites.written(x) - x_hat).detach()
        reconstruction = mean_squared(residual, 0.0) / calibration.variance
        return normaliser.undo(x_hat, sites.written_columns, sites.written(rows)), reconstruction

    def _loss(self, clean: Tensor, logits: Tensor, contexts: Contexts, counted: Tensor) -> Tensor:
        """Return kl or ce over the counted positions; 0 where none counts."""
        q = _log_probs(logits, counted)
        if self.cfg.model_loss == "ce":
            targets = contexts.tokens.flatten().to(q.device)[counted + 1]
            terms = -q.gather(-1, targets[:, None])[:, 0]
        else:
            p = _log_probs(clean, counted)
            terms = (p.exp() * (p - q)).sum(-1)
        return terms.sum() / max(len(counted), 1)

    def _contexts_of(self, step: int) -> Contexts:
        """Return the step's contexts, reading past those of steps that another run has made."""
        n = self.cfg.model_loss_contexts
        while self._taken < step - self.first:
            self._contexts.next_batch(n)
            self._taken += 1
        self._taken += 1
        return self._contexts.next_batch(n)


def _log_probs(logits: Tensor, counted: Tensor) -> Tensor:
    """Return log-probabilities at the counted positions, (n, vocabulary), in float32 at least."""
    rows = logits.flatten(0, 1)[counted]
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).log_softmax(-1)


def _replaceable(coder: SparseCoder, contexts: Contexts, rows: Tensor) -> Tensor:
    """Return which of the b·t tokens the coder is trained on: kept, and of no outlying norm."""
    is_kept = contexts.is_kept.flatten().to(rows.device)
    max_norm = coder.metadata.get("max_norm")
    if not isinstance(max_norm, float):
        return is_kept
    return is_kept & (rows[:, coder.sites.columns()[0]].float().norm(dim=1) <= max_norm)
