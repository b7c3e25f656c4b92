"""Checks before a run, a baseline, an edit or an estimate, and during a run: its numbers mean what they should."""
