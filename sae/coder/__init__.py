"""What a dictionary is: latents, activation functions, the coder, its losses and files."""

from sae.coder.coder import SparseCoder, normalise_decoder_, project_decoder_gradient_
from sae.coder.dictionary import load_dictionary, save_dictionary
from sae.coder.latents import Latents, from_dense
from sae.coder.raw_units import fold_affine, rescale_code_, to_raw_units, with_layer_norm

__all__ = [
    "Latents",
    "SparseCoder",
    "fold_affine",
    "from_dense",
    "load_dictionary",
    "normalise_decoder_",
    "project_decoder_gradient_",
    "rescale_code_",
    "save_dictionary",
    "to_raw_units",
    "with_layer_norm",
]
