"""Edits of single facts in language models."""
