"""Recording outputs and gradients: preparation, units, engines, cost, stopping."""
