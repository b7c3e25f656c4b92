"""Replacements of ablated components: zeros, means, trained constants, or another example's activations."""
