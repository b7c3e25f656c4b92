"""From attributions to an edited model."""
