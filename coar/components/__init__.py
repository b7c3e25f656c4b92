"""The parts of a model that can be ablated: their table, and the finders that fill it."""
