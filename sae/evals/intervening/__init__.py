"""Changing what latents write while the language model runs, and the eval that does."""
