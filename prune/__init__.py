"""Blocks that a denoiser can do without are removed, and the rest is trained to make up for them."""
