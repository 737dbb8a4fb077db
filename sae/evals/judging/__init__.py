"""Judges that explain latents and apply explanations, and the eval that asks them."""
