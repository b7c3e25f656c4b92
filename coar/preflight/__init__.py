"""Checks before a run, a baseline, an edit or an estimate: its numbers will mean what they should."""
