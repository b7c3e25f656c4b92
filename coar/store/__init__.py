"""A run on disk or in an object store: its layout, its units and its integrity."""
