"""The scalar that is read off the model for each example."""
