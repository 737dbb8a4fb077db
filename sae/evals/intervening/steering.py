"""What the model does when a direction is added: x + dose · scale · d̂ at every unmasked token.

On the first PROMPT tokens of N_PROMPTS contexts of half 1, the same for all directions, doses in
units of the root mean square distance of activations from their mean:
    response    y_k(dose) − y_k(0), mean over tokens (`targets`)
    kl          mean KL(clean ‖ steered)
    gain        the response where kl is MATCHED_KL, on the line through (√kl, response) of the
                doses around it (beyond the last dose, on the line from 0 through it)
For small doses kl grows with the square of the dose and the response linearly, hence √kl.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.evals.intervening.ablating import Stage, beginning, unit
from sae.evals.intervening.running import divergence
from sae.evals.intervening.targets import Targets

DOSES = (0.125, 0.25, 0.5, 1.0)
MATCHED_KL = 0.1
N_PROMPTS = 8
PROMPT = 16
N_RANDOM = 8


class Steered:
    """How every target responds to every direction.

    Shapes: kl (m, doses); response (m, doses, l).
    """

    def __init__(self, stage: Stage, targets: Targets, directions: Tensor) -> None:
        prompts = _Prompts(stage)
        clean = prompts.forwards.clean
        before = clean.mean(0)
        contrasts = targets.contrasts.T
        kls, responses = [], []
        for direction in unit(directions):
            doses = torch.tensor(DOSES)[:, None] * targets.scale * direction
            steered = prompts.under(doses)
            kls.append(divergence(clean, steered).mean(1))
            responses.append((steered.mean(1) - before) @ contrasts)
        self.kl, self.response = torch.stack(kls).double(), torch.stack(responses).double()

    def gains(self) -> Tensor:
        """Return the response of each target to each direction at MATCHED_KL, (m, l)."""
        return torch.stack(
            [at_matched_kl(*pair) for pair in zip(self.kl, self.response, strict=True)]
        )


def steer_each(stage: Stage, targets: Targets, generator: torch.Generator) -> dict[str, Tensor]:
    """Return every metric of steering by latent, (l) float64 each."""
    n = len(targets.latents)
    own = stage.coder.directions().float().cpu()[targets.latents]
    random = torch.randn(N_RANDOM, own.shape[1], generator=generator)
    nearest = targets.differences @ targets.components.T
    component = nearest.abs().argmax(1)
    is_up = nearest.gather(1, component[:, None])[:, 0] > 0
    signed, which = (2 * component + is_up).unique(return_inverse=True)
    components = targets.components[signed // 2] * (signed % 2 * 2 - 1)[:, None]
    steered = Steered(stage, targets, torch.cat([own, targets.differences, random, components]))
    gains = steered.gains()
    each, kind = torch.arange(n), (n, n, N_RANDOM, len(components))
    by_latent, by_difference, by_random, by_component = gains.split(kind)
    response = steered.response[each, :, each]
    is_other = ~torch.eye(n, dtype=torch.bool)
    others = by_latent.T[is_other].reshape(n, n - 1) if n > 1 else torch.full((n, 1), torch.nan)
    return {
        "dose_slope": response[:, 0] / DOSES[0],
        "dose_monotone": monotone_range(response),
        "steering_gain": by_latent.diagonal(),
        "steering_gain_difference": by_difference.diagonal(),
        "steering_gain_pca": by_component[which, each],
        "steering_gain_random_direction": by_random.mean(0),
        "steering_gain_random_latent": others.mean(1),
    }


def at_matched_kl(kl: Tensor, response: Tensor) -> Tensor:
    """Return the response where KL is MATCHED_KL, (l), from kl (doses), response (doses, l)."""
    root = torch.cat([kl.new_zeros(1), kl.clamp_min(0).sqrt()])
    values = torch.cat([torch.zeros_like(response[:1]), response])
    wanted = MATCHED_KL**0.5
    reached = (root >= wanted).nonzero()[:, 0]
    if not len(reached):
        last = root[-1]
        return values[-1] * (wanted / last) if last > 0 else torch.zeros_like(values[-1])
    high = int(reached[0])
    share = (wanted - root[high - 1]) / (root[high] - root[high - 1])
    return values[high - 1] + share * (values[high] - values[high - 1])


def monotone_range(response: Tensor) -> Tensor:
    """Return up to which dose the response rises with every dose, (l), from (l, doses); 0 for none.

    In shares of the largest dose.
    """
    steps = torch.diff(response, dim=1, prepend=torch.zeros_like(response[:, :1])) > 0
    n_rising = steps.long().cumprod(1).sum(1)
    return torch.tensor([0.0, *DOSES], dtype=torch.float64)[n_rising] / DOSES[-1]


class _Prompts:
    """The beginnings of some contexts of half 1 (of others, where there is none), run once."""

    def __init__(self, stage: Stage) -> None:
        held = stage.tokens
        is_early = (held.positions < PROMPT) & (held.following >= 0)
        is_tried = is_early & (held.halves == 1)
        rows = held.rows[is_tried].unique()[:N_PROMPTS]
        tokens = [beginning(stage.sample.rows[i].tokens, PROMPT) for i in rows.tolist()]
        is_in = (held.positions < PROMPT) & torch.isin(held.rows, rows)
        at = torch.searchsorted(rows, held.rows) * PROMPT + held.positions
        self.steered = at[is_in]
        self.forwards = stage.forwards(torch.stack(tokens), at[is_in & is_tried])

    def under(self, added: Tensor) -> Tensor:
        """Return log-probabilities (v, counted, vocabulary) with each of added (v, width)."""
        n_tokens = self.forwards.tokens.numel()
        changes = added.new_zeros(len(added), n_tokens, added.shape[1])
        changes[:, self.steered] = added[:, None]
        return self.forwards.under(changes)
