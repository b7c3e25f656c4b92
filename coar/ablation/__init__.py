"""What replaces an ablated component: zeros, means, trained constants, or another example's activations."""
