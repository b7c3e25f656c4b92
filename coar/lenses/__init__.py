"""Lenses: what the latents between a language model's layers already predict."""
