"""From scores of edges to circuits: sparse sets of edges that compute what the whole model computes on a task."""
