"""What the model loses when it runs on what the coder writes, as a loss to train by.

With p the next-token distribution of the clean forward and q that of a forward in which the coder's
x_hat stands in place of y at every token that counts (`evals.replacing`):
    kl = mean over counted positions of KL(p ‖ q)      ce = mean of −log q(next token)
It is added to a step's other losses, on contexts of its own, in the last `model_loss_fraction` of
the steps: 1 trains end to end, a small share fine-tunes what reconstruction found. Without a
`model_loss_weight` it pulls `model_loss_pull` times as hard at x_hat as the reconstruction of the
same tokens does: its factor is pull · ‖d reconstruction / d x_hat‖ / ‖d kl / d x_hat‖, held
constant.
Source: Braun et al. 2024 (arXiv 2405.12241), end-to-end dictionaries; Karvonen 2025 (arXiv
2503.17272), KL and MSE in a short fine-tuning. There losses are made equal, not gradients; here
that made both worse, as Adam's second moments know only the smaller gradients before. So a
fine-tuning comes behind the whole schedule of the learning rate, has a small one of its own
(`schedule.lr_at`) and begins with no moments (docs/log.md has what each of these is worth).

The contexts of a step are a function of its number: a run that goes on reads past those before it.
They come in an order of their own: the activations of a run are those of the first documents in its
order, often used several times, and the coder loses less on these than on any other text.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.coder import SparseCoder
from sae.coder.step_values import StepValues
from sae.config import Config
from sae.evals.downstream import counted_positions
from sae.evals.replacing import Places, clean_pass, logits_of, replaced
from sae.stream.contexts import Contexts
from sae.stream.opening import OpenedModel
from sae.train.optimisers import Optimiser
from sae.train.schedule import first_with_model_loss
from sae.train.state import Calibration

SMALLEST = 1e-12
SEED_OF_TEXT = 1_000_003
"""Added to the run's seed for the order of the documents on which the model's loss is taken."""


class Added(NamedTuple):
    """A step's loss, scalars each.

    differentiable: what has its gradients. weighted: what it adds to the step's loss. plain: kl or
    ce itself.
    """

    differentiable: Tensor
    weighted: Tensor
    plain: Tensor


class ModelLoss:
    """The loss of one process, on its own share of the training documents."""

    def __init__(self, cfg: Config, opened: OpenedModel, rank: int = 0, world_size: int = 1):
        self.cfg, self.lm = cfg.train, opened.lm
        self.places = Places(opened.hookpoints, opened.targets, opened.other)
        self.first = first_with_model_loss(cfg.train)
        self._forgets = cfg.train.optimizer != "signum"  # whose tensors are the dictionary
        self._contexts = opened.contexts(
            "train", rank=rank, world_size=world_size, seed=cfg.run.seed + SEED_OF_TEXT
        )
        self._taken = 0

    def is_due(self, step: int) -> bool:
        """Say whether the step with 0-based index `step` trains with it."""
        return step >= self.first

    def begin_(self, optimiser: Optimiser, step: int) -> None:
        """Let a fine-tuning begin with no moments: those of the steps before know other gradients,
        and are too slow to forget them."""
        if step == self.first > 0 and self._forgets:
            for tensor in optimiser.tensors().values():
                tensor.zero_()

    def number_of(self, step: int) -> int:
        """Return the optimiser's number, from 1, of the step with 0-based index `step`."""
        return step + 1 - (self.first if self.is_due(step) and self._forgets else 0)

    def __call__(
        self, coder: SparseCoder, calibration: Calibration, values: StepValues, step: int
    ) -> Added:
        """Return the loss of the step with 0-based index `step`."""
        contexts = self._contexts_of(step)
        clean, rows = clean_pass(self.lm, self.places, contexts.tokens)
        may_replace = _replaceable(coder, contexts, rows)
        # The model may be on another device (`model.device`).
        kept = rows[may_replace].to(coder.b_dec.device)
        normaliser, sites = calibration.normaliser, coder.sites
        x = normaliser.apply(kept)
        read = sites.read(x)
        x_hat = coder.decode_for(coder.encode_for_losses(read, values).code, read)
        written = normaliser.undo(x_hat, sites.written_columns, sites.written(kept))
        parts = written.split(list(sites.written_widths), -1)
        with replaced(self.lm, self.places, may_replace, parts.__getitem__):
            logits = logits_of(self.lm, contexts.tokens)
        counted = counted_positions(contexts, may_replace)
        loss = self._loss(clean, logits, contexts, counted).to(x_hat.device)
        if self.cfg.model_loss_weight is not None:
            weighted = self.cfg.model_loss_weight * loss
            return Added(weighted, weighted.detach(), loss.detach())
        residual = x_hat.detach() - sites.written(x)
        scale = 2 * self.cfg.model_loss_pull / (max(len(x), 1) * calibration.variance)
        return _balanced(loss, x_hat, scale * residual)

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


def _balanced(loss: Tensor, x_hat: Tensor, pull: Tensor) -> Added:
    """Return `loss` with a weight that makes it pull at x_hat (n, d_out) as hard as `pull` does."""
    (gradient,) = torch.autograd.grad(loss, x_hat)
    weight = pull.norm() / gradient.norm().clamp_min(SMALLEST)
    return Added((x_hat * (weight * gradient)).sum(), weight * loss.detach(), loss.detach())


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
