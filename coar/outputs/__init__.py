"""Output functions: the scalar that is read off the model for each example."""
