"""Sparse kernels for dictionaries of activations: a library of its own that knows no trainer.

The one idea: a sparse dictionary fires k of `d_sae` latents a token, so everything after the
encoder matmul costs n·k·d, never n·d_sae·d. Every public op is `op(..., impl="auto" | "triton" |
"reference")`; `auto` is the fast form for the device of the inputs, `reference` the plain PyTorch
that specifies it. All weights are (d_sae, d): row j is latent j.

Losses, optimisers' policies and anything that remembers a previous call do not live here.
"""

from .batch_selection import batch_topk, batch_topk_reference
from .checks import set_debug
from .decode import sparse_decode, sparse_decode_reference
from .decode_loss import DecodeLoss, sparse_decode_loss, sparse_decode_loss_reference
from .encode import encode_topk, encode_topk_reference, new_scratch
from .encoder_grad import sparse_encoder_grad, sparse_encoder_grad_reference
from .fused_update import (
    AdamScalars,
    Code,
    Dictionary,
    Gradients,
    RowGradients,
    adam_scalars,
    adam_step_,
    dense_update_,
    fused_update_,
    sparse_gradients,
)
from .moments import Moments, new_moments
from .ragged import Ragged
from .row_topk import topk, topk_by_groups, topk_reference
from .threshold_selection import (
    Selected,
    jumprelu_theta_grad,
    threshold_select,
    threshold_select_reference,
)

__all__ = [
    # selection
    "topk",
    "batch_topk",
    "threshold_select",
    "jumprelu_theta_grad",
    "topk_by_groups",
    # the coder
    "encode_topk",
    "new_scratch",
    "sparse_decode",
    "sparse_decode_loss",
    "sparse_encoder_grad",
    # the update
    "fused_update_",
    "dense_update_",
    "sparse_gradients",
    "adam_step_",
    "adam_scalars",
    "new_moments",
    # what they take and return
    "Ragged",
    "Selected",
    "DecodeLoss",
    "Dictionary",
    "Code",
    "Gradients",
    "RowGradients",
    "Moments",
    "AdamScalars",
    # the specifications
    "topk_reference",
    "batch_topk_reference",
    "threshold_select_reference",
    "encode_topk_reference",
    "sparse_decode_reference",
    "sparse_decode_loss_reference",
    "sparse_encoder_grad_reference",
    "set_debug",
]
