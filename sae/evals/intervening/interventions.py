"""Does a latent act as it reads? Ablated and steered with, the error term kept.

`eval.intervention_latents` latents, drawn uniformly from those that fire often enough to be tried;
all that is looked for is found in documents of one half and tried in the other's. Each latent's
target y is the log-probability of the tokens that follow where it fires most, against next tokens
at large (`targets`).
    key_value_auroc          does W_U d_k promote these followers (`key_value`); 0.5 is chance
    ablation_kl, ablation_target_drop      what the model, and the target, lose without the latent
                             where it fires (`ablating`)
    dose_slope, dose_monotone    how fast, and how far, the target rises as the direction is added
    steering_gain            the target's rise where the output has moved by 0.1 nats of KL, so that
                             directions of different strength compare (`steering`)
    concept_tpp_1, _5        are the latents of a concept that a rule names what carries it alone
                             (`concepts`)
Beside each: `_difference`, the difference in means, which knows the target and needs no dictionary;
`_pca`; `_random_direction`, 0 but for chance; `_random_latent`, another latent, above 0 as far as
latents have tokens in common. A latent should beat the last three; the first is what supervision
alone gives.
intervention_testable: share of all latents that could have been drawn.

Intervals are over the latents drawn, because which were drawn moves a mean more than which texts
they were tried on; those of concept_* are over documents, as their concepts are all there are.
Source: METRICS of Karvonen et al. 2025 (arXiv 2503.09532) for concept_tpp; Geva et al. 2021 for
key → value; matched KL, the followers' contrast and the baselines at the same KL are ours.

Cost: the layers above the place, on about 4 (2 l + 24) · 8 · 16 + 16 l · 64 tokens with l latents,
77,824 at the default of 32, whatever d_sae is; what lies below runs once a text (`running`). About
200 s of one core for 135 M weights. Memory: a sample of 16,384 tokens with activations and codes;
log-probabilities of 2048 tokens.
Cannot see: what a latent does far from where it writes (answers over many tokens); latents whose
followers are those of all tokens, which have no target; absorption and noise fitting
(docs/defects.md). ablation_kl alone says how much a latent writes, not whether it is the right
thing. Random directions are no zero for key_value_auroc: what a latent reads along a direction, the
model reads there too. Not for coders that write to several places.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from sae.evals.bootstrap import with_intervals
from sae.evals.interface import ContextBatch, EvalSetup, Label, Seen, Undefined, Value
from sae.evals.intervening import ablating, steering
from sae.evals.intervening.ablating import REACH, Stage, ablate_each, beginning
from sae.evals.intervening.concepts import ConceptPerturbation, tokens_with_concepts
from sae.evals.intervening.key_value import key_value_auroc
from sae.evals.intervening.running import TRIED_ON, can_share
from sae.evals.intervening.sample import ContextSample, tokens_of
from sae.evals.intervening.steering import steer_each
from sae.evals.intervening.targets import N_COMPONENTS, Targets, find_targets
from sae.evals.readout import find_readout
from sae.evals.replacing import Places, logits_of
from sae.stream.language_model import LanguageModel

LOG = logging.getLogger("sae.evals")
SAMPLE_TOKENS = 16_384
NO_MODEL = "the activations come from no language model, so there is none to intervene on"
MANY_PLACES = "the dictionary writes to several places, and a change at one acts on those after it"
NO_LATENT = "no latent fires on enough tokens of both halves of the documents"
NO_WORDS = "the model's tokenizer gives no text to find concepts in"
NO_CONCEPT = "fewer than two concepts are on enough tokens of both halves of the documents"

BY_LATENT = {
    "key_value_auroc": Label("next tokens that a latent promotes, AUROC", better="higher", best=1),
    "key_value_auroc_random_latent": Label("… that another latent promotes"),
    "ablation_kl": Label("KL where a latent fires, without it", "nats"),
    "ablation_kl_random_direction": Label("… with as much along a random direction", "nats"),
    "ablation_kl_random_latent": Label("… with as much along another latent's", "nats"),
    "ablation_target_drop": Label("log-probability that its next tokens lose", "nats", "higher"),
    "ablation_target_drop_random_direction": Label("… along a random direction", "nats"),
    "ablation_target_drop_random_latent": Label("… along another latent's", "nats"),
    "dose_slope": Label("rise of its next tokens by dose", "nats", "higher"),
    "dose_monotone": Label("share of the doses up to which they rise", "share", "higher", 1),
    "steering_gain": Label("rise of its next tokens at 0.1 nats of KL", "nats", "higher"),
    "steering_gain_difference": Label("… by the difference in means", "nats"),
    "steering_gain_pca": Label("… by the nearest principal component", "nats"),
    "steering_gain_random_direction": Label("… by random directions", "nats"),
    "steering_gain_random_latent": Label("… by the other latents", "nats"),
}
OF_CONCEPTS = {
    "concept_probe_accuracy": Label("probes of concepts, balanced accuracy"),
    "concept_tpp_1": Label("concept lost with its latent, less others' loss", better="higher"),
    "concept_tpp_5": Label("… with its 5 latents", better="higher"),
    "concept_tpp_difference": Label("… along the difference of means"),
    "concept_tpp_pca": Label("… along the nearest principal component"),
    "concept_tpp_random_direction": Label("… along a random direction"),
    "concept_tpp_random_latent": Label("… with a random latent"),
}
LABELS = {
    "intervention_testable": Label("latents that fire often enough to be tried", "share"),
    **BY_LATENT,
    **OF_CONCEPTS,
}
ON_CARDS = ("steering_gain", "ablation_kl", "ablation_target_drop", "key_value_auroc")
LATENT_LABELS = {name: BY_LATENT[name] for name in ON_CARDS}
CANNOT_SEE = (
    *("absorption", "noise fitting"),
    *("latents without followers of their own", "effects over many tokens"),
)


class Interventions:
    """Accumulates what `LABELS` lists; the model is run at the end, once."""

    def __init__(self, setup: EvalSetup) -> None:
        self.setup, self.seen = setup, Seen()
        self.sample = ContextSample(SAMPLE_TOKENS, setup.seed)
        self.lm: LanguageModel | None = None
        self.places: Places | None = None
        self._outcome: _Outcome | None = None

    def update(self, batch: ContextBatch) -> None:
        """Add a batch of contexts; those of no language model are left out."""
        if batch.lm is not None and batch.places is not None:
            self.lm, self.places, self._outcome = batch.lm, batch.places, None
            self.sample.update(batch)
            self.seen = self.sample.seen

    def merge(self, other: Interventions) -> None:
        """Add another's contexts."""
        self.sample.merge(other.sample)
        self.lm, self.places = self.lm or other.lm, self.places or other.places
        self.seen, self._outcome = self.sample.seen, None

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module."""
        stage = self._stage()
        if isinstance(stage, Undefined):
            return dict.fromkeys(LABELS, stage)
        found = self._run(stage)
        n = 0 if found.targets is None else len(found.targets.latents)
        metrics = with_intervals(
            lambda weights: {name: _mean(weights, col) for name, col in found.columns.items()},
            torch.ones(n, dtype=torch.bool),
            seed=self.setup.seed,
            n_resamples=self.setup.n_resamples,
            can_pair=False,
        )
        share = 0.0 if found.targets is None else found.targets.share_testable
        missing = {
            name: Undefined(found.reasons.get(name, NO_LATENT))
            for name in BY_LATENT
            if name not in metrics
        }
        return {"intervention_testable": share, **metrics, **missing, **self._concepts(stage)}

    def arrays(self) -> dict[str, Tensor]:
        """Return the scores of the latents drawn, NaN for the others."""
        stage = self._stage()
        found = None if isinstance(stage, Undefined) else self._run(stage)
        if found is None or found.targets is None:
            return {}
        scores = {}
        for name in (name for name in ON_CARDS if name in found.columns):
            values = torch.full((self.setup.d_sae,), torch.nan)
            values[found.targets.latents] = found.columns[name].float()
            scores[f"latents/{name}"] = values
        return scores

    def _stage(self) -> Stage | Undefined:
        """Return all that interventions need, or why there is none to make."""
        coder = self.setup.coder
        if self.lm is None or self.places is None or coder is None or not self.sample.rows:
            return Undefined(NO_MODEL)
        if len(self.places.written) > 1 or self.places.other is not None:
            return Undefined(MANY_PLACES)
        return Stage(self.lm, self.places, coder, self.sample, tokens_of(self.sample))

    def _run(self, stage: Stage) -> _Outcome:
        """Run the model, once for what was seen so far."""
        if self._outcome is None:
            held, seed = stage.tokens, self.setup.seed
            n = self.setup.settings.intervention_latents
            written = stage.coder.written(held.x)
            few = torch.stack([beginning(row.tokens, TRIED_ON) for row in self.sample.rows[:2]])
            shares = can_share(stage.lm, stage.places, few, stage.coder.d_out)
            stage = replace(stage, shares=shares)
            drawn = (self.setup.d_sae, _vocabulary(stage), n, REACH, seed)
            self._outcome = _intervene(stage, find_targets(held, written, *drawn), seed)
        return self._outcome

    def _concepts(self, stage: Stage) -> dict[str, Value]:
        if not hasattr(stage.lm.tokenizer, "decode"):
            return dict.fromkeys(OF_CONCEPTS, Undefined(NO_WORDS))
        is_on = tokens_with_concepts(self.sample, stage.lm.tokenizer)
        written = stage.coder.written(stage.tokens.x)
        directions = stage.coder.directions().float().cpu()
        found = ConceptPerturbation(stage.tokens, written, directions, is_on, self.setup.seed)
        if found.n_concepts < 2:
            return dict.fromkeys(OF_CONCEPTS, Undefined(NO_CONCEPT))
        return with_intervals(
            found.statistics,
            found.present,
            seed=self.setup.seed,
            n_resamples=self.setup.n_resamples,
            reasons=dict.fromkeys(OF_CONCEPTS, NO_CONCEPT),
        )


class _Outcome:
    """What interventions found: columns (l) float64 by name, and why some are missing."""

    def __init__(self, targets: Targets | None) -> None:
        self.targets = targets
        self.columns: dict[str, Tensor] = {}
        self.reasons: dict[str, str] = {}


def _intervene(stage: Stage, targets: Targets | None, seed: int) -> _Outcome:
    outcome = _Outcome(targets)
    if targets is None:
        return outcome
    n = len(targets.latents)
    LOG.info("Intervening on %d latents: forwards of about %d tokens.", n, n_forward_tokens(n))
    generator = torch.Generator().manual_seed(seed)
    directions = stage.coder.directions().float().cpu()[targets.latents]
    readout, reason = find_readout(stage.lm.module, stage.coder.d_out)
    if readout is not None:
        outcome.columns["key_value_auroc"] = key_value_auroc(readout, directions, targets)
        other = key_value_auroc(readout, directions.roll(1, 0), targets)
        outcome.columns["key_value_auroc_random_latent"] = other
    names = ("key_value_auroc", "key_value_auroc_random_latent")
    outcome.reasons |= dict.fromkeys(names, reason)
    outcome.columns |= ablate_each(stage, targets, generator)
    outcome.columns |= steer_each(stage, targets, generator)
    return outcome


def n_forward_tokens(n_latents: int) -> int:
    """Return about how many tokens the model is run on."""
    n_directions = 2 * n_latents + steering.N_RANDOM + 2 * N_COMPONENTS
    steered = n_directions * len(steering.DOSES) * steering.N_PROMPTS * steering.PROMPT
    return steered + n_latents * (len(ablating.VARIANTS) + 1) * ablating.N_ROWS * REACH


def _vocabulary(stage: Stage) -> int:
    """Return how many logits the model gives."""
    return logits_of(stage.lm, stage.sample.rows[0].tokens[None, :1]).shape[-1]


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    """Return the weighted means over the latents that have a value, (r)."""
    has = torch.isfinite(values).double()
    return (weights @ values.nan_to_num(0.0)) / (weights @ has)
