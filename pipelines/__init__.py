"""Example pipelines: each file defines a model, its examples and a study of them."""
