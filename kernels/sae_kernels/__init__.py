"""Sparse kernels for dictionaries of activations: a library of its own that knows no trainer.

The one idea: a TopK dictionary fires k of `d_sae` latents a token, so everything after the encoder
matmul costs n·k·d, never n·d_sae·d. Every public op is `op(..., impl="auto" | "triton" |
"reference")`; `auto` is the fast form for the device of the inputs, `reference` the plain PyTorch
that specifies it. All weights are (d_sae, d): row j is latent j.

Losses, parameters, optimisers and anything that remembers a previous call do not live here.
"""

from .checks import set_debug
from .decode import sparse_decode, sparse_decode_reference
from .decode_loss import DecodeLoss, sparse_decode_loss, sparse_decode_loss_reference
from .encode import encode_topk, encode_topk_reference
from .encoder_grad import sparse_encoder_grad, sparse_encoder_grad_reference
from .row_topk import topk, topk_by_groups, topk_reference

__all__ = [
    "topk",
    "encode_topk",
    "sparse_decode",
    "sparse_decode_loss",
    "sparse_encoder_grad",
    "topk_by_groups",
    "topk_reference",
    "encode_topk_reference",
    "sparse_decode_reference",
    "sparse_decode_loss_reference",
    "sparse_encoder_grad_reference",
    "DecodeLoss",
    "set_debug",
]
