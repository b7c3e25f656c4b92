"""How a forward pass is run fast and still right."""
