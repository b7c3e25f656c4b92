"""From masks and outputs to attributions: one linear model per example."""
