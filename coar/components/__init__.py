"""Which parts of a model can be ablated: the table, and the finders that fill it."""
