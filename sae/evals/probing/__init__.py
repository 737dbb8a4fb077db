"""Sparse probing: can a few latents tell where a concept is? On worlds, tokens and whole texts."""
