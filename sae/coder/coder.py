"""A dictionary: its tensors, an activation function, and how to encode and decode with them.

latents = act((x − b_dec) W_encᵀ + b_enc),   x_hat = latents W_dec + b_dec

Row j of W_enc and of W_dec belongs to latent j, and so does entry j of what an activation adds.
What x is, and what is written, is the site's (`sites`): where a coder writes another place than it
reads, b_dec belongs to what is written and is not taken from x; a skip adds x W_skipᵀ.
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
from sae.coder import cross_layer
from sae.coder.activations import ACTIVATIONS
from sae.coder.latents import Latents, SparseCode, from_dense, strongest, to_dense
from sae.coder.layer_norm import layer_norm, token_moments, undo_layer_norm
from sae.coder.pre_acts import Select, pre_activations, refined
from sae.coder.sites import Sites
from sae.coder.sparsity import DEFAULT_COEFFICIENTS
from sae.coder.step_values import StepValues
from sae.config import SPARSITY_LOSSES, CoderConfig, require_fits

DEFAULT_EXPANSION_FACTOR = 8
DEFAULT_AUXK = ("topk", "batchtopk")  # by the others AuxK is used on demand
OF_NO_LATENT = ("b_dec", "W_skip")  # the parameters that have no row or entry a latent


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
        sites: the places that are read and written.
        d_in, d_out: numbers of a token that are read, and written.
        W_enc: (d_sae, d_in). W_dec: (d_sae, d_out). b_enc: (d_sae). b_dec: (d_out).
            matching_pursuit has one matrix under both names, and a b_enc that stays zero;
            `cross_layer` has shapes of its own.
        W_skip: (d_out, d_in), where `coder.skip` asks for it.
        threshold (batchtopk, jumprelu), r_mag, b_mag (gated), each (d_sae): see `activations`.
        log_pressure: a scalar, where `coder.target_l0` moves the sparsity loss's weight, or the
            thresholds (jumprelu): 0 once training is over.
        enc_shadow, dec_shadow: 16-bit copies of the weights for the fused step's matmuls and
            gathers. scratch: memory for a chunk of pre-activations. All are None everywhere but in
            what `with_memory` returns.
    """

    W_skip: Tensor | None
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
        sites: Sites | None = None,
    ):
        super().__init__()
        self.sites = sites or Sites((d_in,))
        self.cfg = resolve(cfg, self.sites)
        self.d_in, self.d_out = self.sites.d_in, self.sites.d_out
        self.d_sae = d_sae_of(self.cfg, self.sites)
        self.metadata: dict[str, object] = dict(metadata or {})
        self.has_layer_norm = has_layer_norm
        d_read, d_written = _row_widths(self.cfg, self.sites)
        self.W_enc = nn.Parameter(torch.empty(self.d_sae, d_read))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        if self.is_tied:
            self.W_dec = self.W_enc
            self.register_buffer("b_enc", torch.zeros(self.d_sae))
        else:
            self.W_dec = nn.Parameter(torch.empty(self.d_sae, d_written))
            self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        skip = nn.Parameter(torch.zeros(self.d_out, self.d_in)) if self.cfg.skip else None
        self.register_parameter("W_skip", skip)
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
    def writes_what_it_reads(self) -> bool:
        """Whether what is reconstructed is what is encoded."""
        return self.sites.writes is None

    @property
    def n_layers(self) -> int | None:
        """The layers of a cross_layer coder; None for others."""
        return len(self.sites.reads) if self.cfg.site == "cross_layer" else None

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
        sites: Sites | None = None,
    ) -> SparseCoder:
        """Return a coder at its starting point: random unit decoder rows, W_enc equal to W_dec.

        Where another place is written, the encoder has random unit rows of its own.
        Source: Gao et al. 2024, appendix A.1 (encoder initialised from the decoder).
        """
        coder = cls(d_in, cfg, metadata, sites=sites)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            coder.W_dec.copy_(torch.randn(coder.W_dec.shape, generator=generator))
            normalise_decoder_(coder)
            if coder.writes_what_it_reads:
                coder.W_enc.copy_(coder.W_dec)
            else:
                coder.W_enc.copy_(torch.randn(coder.W_enc.shape, generator=generator))
                unit_rows_(coder.W_enc)
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
        if row.encode is not None and not self.cfg.refine_step and self.writes_what_it_reads:
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

    def decode(self, latents: SparseCode | Tensor, *, is_held: bool = False) -> Tensor:
        """Return x_hat (…, d_out) from a sparse or a dense code; see `decode_for` for its units.

        A skip's share is not in it. `is_held` gives W_dec and b_dec no gradient.
        """
        W_dec, b_dec = self.W_dec, self.b_dec
        if is_held:
            W_dec, b_dec = W_dec.detach(), b_dec.detach()
        if self.cfg.tie_decoders:
            assert self.n_layers is not None
            code = to_dense(latents, self.d_sae)
            flat = cross_layer.decode_tied(code.flatten(0, -2), W_dec, self.n_layers) + b_dec
            return flat.reshape(*code.shape[:-1], self.d_out)
        if isinstance(latents, Tensor):
            return latents @ W_dec + b_dec
        return sae_kernels.sparse_decode(
            latents.values,
            latents.indices,
            W_dec,
            b_dec,
            offsets=latents.offsets if isinstance(latents, sae_kernels.Ragged) else None,
        )

    def decode_for(self, latents: SparseCode | Tensor, x: Tensor) -> Tensor:
        """Return x_hat (…, d_out) in the units of `x` (…, d_in), the tokens that the code is of.

        The same as `decode`, but where the coder has a layer norm: then it is undone with each
        token's own mean and deviation; and where it has a skip, which is added. Evaluations and
        interventions decode by this.
        """
        x_hat = self.decode(latents)
        if self.W_skip is not None:
            x_hat = x_hat + x @ self.W_skip.T
        return undo_layer_norm(x_hat, x) if self.has_layer_norm else x_hat

    def target(self, rows: Tensor) -> Tensor:
        """Return what the code is to write, (n, d_out), of rows (n, sites.width): without what a
        skip writes already."""
        written = self.sites.written(rows)
        return written if self.W_skip is None else written - self.sites.read(rows) @ self.W_skip.T

    def site_norms(self) -> Tensor:
        """Return the norm of what a latent writes at each place, (places, d_sae).

        With training's units (`metadata["site_factors"]`), so that places of other scales compare.
        """
        if self.cfg.tie_decoders:
            assert self.n_layers is not None
            return cross_layer.norms_of_tied(self.W_dec, self.n_layers)
        parts = self.W_dec.split(list(self.sites.written_widths), 1)
        factors = self.metadata.get("site_factors", [1.0] * len(parts))
        assert isinstance(factors, list)
        return torch.stack([f * part.norm(dim=1) for f, part in zip(factors, parts, strict=True)])

    def direction_for(self, latent: int, x: Tensor) -> Tensor:
        """Return what one unit of `latent` adds to x_hat: (d_out), or (…, d_out) by token of x."""
        row = self.W_dec[latent]
        return row * token_moments(x)[1].to(row.device) if self.has_layer_norm else row

    def forward(self, x: Tensor) -> Tensor:
        """Return what is written for `x` (…, d_in), its reconstruction in an sae; (…, d_out)."""
        code = self._code(self._rows(x))
        x_hat = self.decode_for(code, x.reshape(-1, self.d_in))
        return x_hat.reshape(*x.shape[:-1], self.d_out)

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


def _row_widths(cfg: CoderConfig, sites: Sites) -> tuple[int, int]:
    """Return the numbers of a row of W_enc and of one of W_dec."""
    if cfg.site != "cross_layer":
        return sites.d_in, sites.d_out
    return sites.reads[0], sites.reads[0] if cfg.tie_decoders else sites.d_out


def d_sae_of(cfg: CoderConfig, sites: Sites) -> int:
    """Return the number of latents that `cfg` means for coders of `sites`.

    An expansion factor is of the first place's width; for cross_layer of all layers'.
    """
    if cfg.d_sae is not None:
        return cfg.d_sae
    d = sites.d_in if cfg.site == "cross_layer" else sites.reads[0]
    return d * (cfg.expansion_factor or DEFAULT_EXPANSION_FACTOR)


def resolve(cfg: CoderConfig, sites: Sites) -> CoderConfig:
    """Return `cfg` with every derived value filled in, checked against the widths of `sites`."""
    d_in, d_sae = sites.reads[0], d_sae_of(cfg, sites)
    require_fits(cfg, d_sae)
    if cfg.site == "cross_layer" and d_sae % len(sites.reads):
        raise ValueError(
            "`coder.d_sae` must be a multiple of the layers for `coder.site: cross_layer`; got "
            f"d_sae={d_sae}, {len(sites.reads)} layers. Choose a multiple."
        )
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
    """Set every decoder row to unit norm over all places, in place."""
    with torch.no_grad():
        if coder.n_layers is not None and not coder.cfg.tie_decoders:
            cross_layer.hold_(coder.W_dec, coder.n_layers)
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
            if coder.n_layers is not None and not coder.cfg.tie_decoders:
                cross_layer.hold_(grad, coder.n_layers)
            grad.addcmul_((grad * coder.W_dec).sum(1, keepdim=True), coder.W_dec, value=-1)
