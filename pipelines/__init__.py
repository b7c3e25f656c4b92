"""One readable file per setup: a model, its examples, and what is asked of them."""
