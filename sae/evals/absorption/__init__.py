"""Absorption, splitting and hedging: does a latent fire for all of its concept, and alone?"""
