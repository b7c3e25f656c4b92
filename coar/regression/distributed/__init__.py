"""Fits by several processes: partial sums of job arrays, and tasks of a Ray cluster."""
