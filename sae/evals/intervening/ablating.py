"""What the model loses without a latent: x − z_k d_k at every token, with the error kept.

Of up to N_ROWS contexts of half 1 in which latent k fires before position `REACH`, at the tokens
where it fires,
    ablation_kl            KL(clean ‖ ablated)
    ablation_target_drop   y_k before − y_k after (`targets`)
The same change in size along a random direction, and along another latent's, are the baselines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.evaluable import Evaluable
from sae.evals.intervening.running import Forwards, divergence
from sae.evals.intervening.sample import ContextSample, Tokens
from sae.evals.intervening.targets import Targets, activations_of
from sae.evals.replacing import Places
from sae.stream.language_model import LanguageModel

N_ROWS = 4
REACH = 64
VARIANTS = ("", "_random_direction", "_random_latent")


@dataclass(frozen=True)
class Stage:
    """All that an intervention needs: the model, where it is changed, by what, on which text.

    Attributes:
        shares: whether forwards share what lies before the place (`running.can_share`).
    """

    lm: LanguageModel
    places: Places
    coder: Evaluable
    sample: ContextSample
    tokens: Tokens
    shares: bool = False

    def forwards(self, tokens: Tensor, counted: Tensor) -> Forwards:
        """Return the clean forward over tokens (b, t), and what makes variants of it."""
        return Forwards(self.lm, self.places, tokens, counted, shares=self.shares)


def ablate_each(stage: Stage, targets: Targets, generator: torch.Generator) -> dict[str, Tensor]:
    """Return `ablation_kl` and `ablation_target_drop` of each variant, (l) float64 each."""
    directions = unit(stage.coder.directions().float().cpu())
    rows = []
    for place, latent in enumerate(targets.latents.tolist()):
        random = unit(torch.randn(1, directions.shape[1], generator=generator))[0]
        other = int(targets.latents[(place + 1) % len(targets.latents)])
        others = torch.stack([random, directions[other]])
        rows.append(_ablate(stage, latent, targets.contrasts[place], others))
    columns = torch.stack(rows).unbind(1)
    names = [f"{what}{v}" for v in VARIANTS for what in ("ablation_kl", "ablation_target_drop")]
    return dict(zip(names, columns, strict=True))


def _ablate(stage: Stage, latent: int, contrast: Tensor, others: Tensor) -> Tensor:
    """Return KL and drop of the latent and of changes as large along `others`, (2 · 3) float64."""
    held = stage.tokens
    fires = (activations_of(held, latent) != 0) & (held.halves == 1) & (held.positions < REACH)
    chosen = held.rows[fires].unique()[:N_ROWS]
    is_in = fires & torch.isin(held.rows, chosen)
    # No token sees those behind it, so the model need not read beyond the last that is changed.
    reach = int(held.positions[is_in].max()) + 1
    tokens = torch.stack([beginning(stage.sample.rows[i].tokens, reach) for i in chosen.tolist()])
    at = torch.searchsorted(chosen, held.rows[is_in]) * reach + held.positions[is_in]
    own = ablation(stage.coder, held.x[is_in], Latents(*(p[is_in] for p in held.code)), latent)
    size = own.norm(dim=1, keepdim=True)
    changes = own.new_zeros(1 + len(others), tokens.numel(), own.shape[1])
    changes[:, at] = torch.stack([own, *(-size * row for row in others)])
    forwards = stage.forwards(tokens, at[held.following[is_in] >= 0])
    clean = forwards.clean
    found = [
        value
        for one in forwards.under(changes)
        for value in (divergence(clean, one).mean(), ((clean - one) @ contrast).mean())
    ]
    return torch.stack(found).double()


def ablation(coder: Evaluable, x: Tensor, code: Latents, latent: int) -> Tensor:
    """Return what x_hat changes by without the latent, (n, d_out) float32: −z_k d_k."""
    is_it = code.indices == latent
    return coder.change(x, code, code._replace(values=code.values.masked_fill(is_it, 0))).float()


def unit(rows: Tensor) -> Tensor:
    """Return rows of norm 1."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def beginning(tokens: Tensor, n: int) -> Tensor:
    """Return the first n tokens; what is added stands behind all that counts."""
    return torch.nn.functional.pad(tokens[:n], (0, max(n - len(tokens), 0)))
