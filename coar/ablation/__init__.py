"""What replaces an ablated component."""
