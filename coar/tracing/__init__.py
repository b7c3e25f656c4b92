"""Causal tracing: where in a language model a fact is recalled."""
