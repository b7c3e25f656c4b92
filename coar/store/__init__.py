"""A run on disk or in an object store: layout, plan, seals, locks, integrity."""
