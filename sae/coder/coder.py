"""A dictionary: its tensors, an activation function, and how to encode and decode with them.

latents = act((x − b_dec) W_encᵀ + b_enc),   x_hat = latents W_dec + b_dec

Row j of W_enc and of W_dec belongs to latent j, and so does entry j of what an activation adds.
Losses live in `losses`, files in `dictionary`, starting values in `initialisation`, the way from a
trained coder to raw activations in `raw_units`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import sae_kernels
from sae.coder.activations import ACTIVATIONS
from sae.coder.latents import Latents, SparseCode, from_dense, strongest, to_dense
from sae.coder.layer_norm import layer_norm, token_moments, undo_layer_norm
from sae.coder.pre_acts import Select, pre_activations, refined
from sae.coder.sparsity import DEFAULT_COEFFICIENTS
from sae.coder.step_values import StepValues
from sae.config import SPARSITY_LOSSES, CoderConfig, require_fits

DEFAULT_EXPANSION_FACTOR = 8
DEFAULT_AUXK = ("topk", "batchtopk")  # by the others AuxK is used on demand


class Encoding(NamedTuple):
    """What losses are computed from: a code, what it was selected from, and a wider code.

    pre_acts: (n, d_sae), None where no loss reads them. wider: `coder.multi_k` latents a token.
    """

    code: SparseCode | Tensor
    pre_acts: Tensor | None = None
    wider: Latents | None = None


class SparseCoder(nn.Module):
    """A sparse dictionary of activations.

    Attributes:
        cfg: the resolved `CoderConfig` (d_sae is a number).
        metadata: what the dictionary was made from (model_name, hook_name, …); saved with it.
        has_layer_norm: whether the coder norms every token that it is given (`layer_norm`). Then
            the code and `decode` are in normed units; `decode_for` and the call give x's own.
        W_enc, W_dec: (d_sae, d_in). b_enc: (d_sae). b_dec: (d_in). matching_pursuit has one matrix
            under both names, and a b_enc that stays zero.
        threshold (batchtopk, jumprelu), r_mag, b_mag (gated), each (d_sae): see `activations`.
        log_pressure: a scalar, where `coder.target_l0` moves the sparsity loss's weight, or the
            thresholds (jumprelu): 0 once training is over.
        enc_shadow, dec_shadow: 16-bit copies of the weights for the fused step's matmuls and
            gathers. scratch: memory for a chunk of pre-activations. All are None everywhere but in
            what `with_memory` returns.
    """

    # What an activation may add: there only where its row in `activations` says so.
    threshold: Tensor
    first_threshold: Tensor
    r_mag: Tensor
    b_mag: Tensor
    log_pressure: Tensor
    enc_shadow: Tensor | None = None
    dec_shadow: Tensor | None = None
    scratch: Tensor | None = None

    def __init__(
        self,
        d_in: int,
        cfg: CoderConfig,
        metadata: dict[str, object] | None = None,
        *,
        has_layer_norm: bool = False,
    ):
        super().__init__()
        self.cfg = resolve(cfg, d_in)
        self.d_in, self.d_sae = d_in, d_sae_of(self.cfg, d_in)
        self.metadata: dict[str, object] = dict(metadata or {})
        self.has_layer_norm = has_layer_norm
        self.W_enc = nn.Parameter(torch.empty(self.d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        if self.is_tied:
            self.W_dec = self.W_enc
            self.register_buffer("b_enc", torch.zeros(self.d_sae))
        else:
            self.W_dec = nn.Parameter(torch.empty(self.d_sae, d_in))
            self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        own = ACTIVATIONS[self.cfg.activation].own
        for name, tensor in (own(self) if own else {}).items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        if self.cfg.target_l0 is not None:
            self.register_buffer("log_pressure", torch.zeros(()))

    @property
    def is_tied(self) -> bool:
        """Whether encoder and decoder are one matrix."""
        return self.cfg.activation == "matching_pursuit"

    @property
    def decoder_name(self) -> str:
        """The name of the decoder's parameter."""
        return "W_enc" if self.is_tied else "W_dec"

    @classmethod
    def create(
        cls,
        d_in: int,
        cfg: CoderConfig,
        *,
        seed: int = 0,
        metadata: dict[str, object] | None = None,
    ) -> SparseCoder:
        """Return a coder at its starting point: random unit decoder rows, W_enc equal to W_dec.

        Source: Gao et al. 2024, appendix A.1 (encoder initialised from the decoder).
        """
        coder = cls(d_in, cfg, metadata)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            rows = torch.randn(coder.d_sae, d_in, generator=generator)
            coder.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
            coder.W_enc.copy_(coder.W_dec)
        return coder

    def with_memory(
        self, enc_shadow: Tensor | None, dec_shadow: Tensor | None, scratch: Tensor | None
    ) -> SparseCoder:
        """Return this coder, sharing its parameters, with memory that a fused step keeps."""
        furnished = copy.copy(self)
        furnished.enc_shadow, furnished.dec_shadow = enc_shadow, dec_shadow
        furnished.scratch = scratch
        return furnished

    def encode_training(self, x: Tensor, values: StepValues | None = None) -> SparseCode | Tensor:
        """Return the code of `x` (n, d_in) in the form that is cheapest to train through.

        `x` is taken as it is, never layer-normed: a trainer normalises on its own. A running
        threshold moves with each batch that this sees. `values` are a schedule's, None the fixed
        ones.
        """
        return self.encode_for_losses(x, values).code

    def encode_for_losses(self, x: Tensor, values: StepValues | None = None) -> Encoding:
        """Return the code of `encode_training` with what else the losses need."""
        values = values or StepValues.fixed(self.cfg)
        row = ACTIVATIONS[self.cfg.activation]
        if self.cfg.multi_k is not None:
            assert row.encode is not None
            wider = row.encode(self, x, replace(values, k=max(self.cfg.multi_k, values.k)))
            assert isinstance(wider, Latents)
            return Encoding(strongest(wider, values.k), wider=wider)
        if row.encode is not None and not self.cfg.refine_step:
            return Encoding(row.encode(self, x, values))
        select = row.select
        assert select is not None
        return self._encoded(x, lambda pre_acts, is_first: select(self, pre_acts, values, is_first))

    def thresholds(self) -> Tensor:
        """Return what pre-activations must exceed, (d_sae), steered where there is a target."""
        is_steered = self.cfg.sparsity_loss == "quadratic"
        return self.threshold * self.log_pressure.exp() if is_steered else self.threshold

    def encode(self, x: Tensor) -> Tensor:
        """Return the dense code (…, d_sae) of `x` (…, d_in)."""
        dense = to_dense(self._code(self._rows(x)), self.d_sae)
        return dense.reshape(*x.shape[:-1], self.d_sae)

    def encode_sparse(self, x: Tensor) -> Latents:
        """Return the sparse code of `x` (…, d_in); its slots are shared by all tokens given."""
        code = self._code(self._rows(x))
        is_plain = isinstance(code, Latents) and not self.is_tied  # a tied one may take one twice
        latents = code if is_plain else from_dense(to_dense(code, self.d_sae))
        return Latents(*(part.reshape(*x.shape[:-1], part.shape[-1]) for part in latents))

    def decode(self, latents: SparseCode | Tensor) -> Tensor:
        """Return x_hat (…, d_in) from a sparse or a dense code; see `decode_for` for its units."""
        if isinstance(latents, Tensor):
            return latents @ self.W_dec + self.b_dec
        return sae_kernels.sparse_decode(
            latents.values,
            latents.indices,
            self.W_dec,
            self.b_dec,
            offsets=latents.offsets if isinstance(latents, sae_kernels.Ragged) else None,
        )

    def decode_for(self, latents: SparseCode | Tensor, x: Tensor) -> Tensor:
        """Return x_hat (…, d_in) in the units of `x` (…, d_in), the tokens that the code is of.

        The same as `decode`, but where the coder has a layer norm: then it is undone with each
        token's own mean and deviation. Evaluations and interventions decode by this.
        """
        x_hat = self.decode(latents)
        return undo_layer_norm(x_hat, x) if self.has_layer_norm else x_hat

    def direction_for(self, latent: int, x: Tensor) -> Tensor:
        """Return what one unit of `latent` adds to x_hat: (d_in), or (…, d_in) by token of `x`."""
        row = self.W_dec[latent]
        return row * token_moments(x)[1].to(row.device) if self.has_layer_norm else row

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of `x` (…, d_in), in its units."""
        code = self._code(self._rows(x))
        return self.decode_for(code, x.reshape(-1, self.d_in)).reshape(x.shape)

    def save(self, folder: str) -> None:
        """Write the dictionary to a folder that `sae.load` and SAELens open."""
        from sae.coder.dictionary import save_dictionary

        save_dictionary(self, folder)

    def _code(self, x: Tensor) -> SparseCode | Tensor:
        """Return the code of `x` (n, d_in) as it is once training is over."""
        infer = ACTIVATIONS[self.cfg.activation].infer
        if infer is None:
            return self.encode_training(x)
        return self._encoded(x, partial(infer, self)).code

    def _encoded(self, x: Tensor, select: Select) -> Encoding:
        """Return what `select` makes of x's pre-activations, once or with a refinement."""
        if self.cfg.refine_step:
            return Encoding(*refined(self, x, select))
        pre_acts = pre_activations(self, x)
        return Encoding(select(pre_acts, False), pre_acts)

    def _rows(self, x: Tensor) -> Tensor:
        """Return `x` (…, d_in) as what is encoded, (n, d_in)."""
        self._check_width(x)
        rows = x.reshape(-1, self.d_in)
        return layer_norm(rows).to(self.b_dec.dtype) if self.has_layer_norm else rows

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_in:
            raise ValueError(
                f"`x` must have shape (…, d_in={self.d_in}); got {tuple(x.shape)}. "
                "Read activations at the hookpoint the dictionary was trained on: "
                f"{self.metadata.get('hook_name', 'unknown')}."
            )


def d_sae_of(cfg: CoderConfig, d_in: int) -> int:
    """Return the number of latents that `cfg` means for inputs of width `d_in`."""
    if cfg.d_sae is not None:
        return cfg.d_sae
    return d_in * (cfg.expansion_factor or DEFAULT_EXPANSION_FACTOR)


def resolve(cfg: CoderConfig, d_in: int) -> CoderConfig:
    """Return `cfg` with every derived value filled in, checked against `d_in`."""
    d_sae = d_sae_of(cfg, d_in)
    require_fits(cfg, d_sae)
    k_aux = cfg.k_aux
    if k_aux is None:
        k_aux = max(d_in // 2, 1) if cfg.activation in DEFAULT_AUXK else 0
    kinds = SPARSITY_LOSSES.get(cfg.activation)
    kind = cfg.sparsity_loss or (kinds[0] if kinds else None)
    if cfg.activation == "jumprelu" and cfg.target_l0 is not None:
        kind = "quadratic"
    weight = cfg.sparsity_coefficient
    return replace(
        cfg,
        d_sae=d_sae,
        expansion_factor=None,
        k_aux=min(k_aux, d_sae),
        sparsity_loss=kind,
        sparsity_coefficient=DEFAULT_COEFFICIENTS[kind] if kind and weight is None else weight,
    )


def normalise_decoder_(coder: SparseCoder) -> None:
    """Set every decoder row to unit norm, in place."""
    with torch.no_grad():
        unit_rows_(coder.W_dec)


def unit_rows_(rows: Tensor) -> None:
    """Set every row of (n, d) to unit norm, in place."""
    rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(1e-12))


def project_decoder_gradient_(coder: SparseCoder) -> None:
    """Remove from each row of W_dec's gradient the part along the row, which would only rescale it.

    Source: Bricken et al. 2023, "Neural network training", Adam interacts with the norm constraint.
    """
    grad = coder.W_dec.grad
    if grad is not None:
        with torch.no_grad():
            grad.addcmul_((grad * coder.W_dec).sum(1, keepdim=True), coder.W_dec, value=-1)
