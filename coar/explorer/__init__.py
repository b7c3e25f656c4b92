"""The explorer: one self-contained page that shows a run, and a local server for it."""
