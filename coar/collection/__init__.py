"""Recording outputs under masks: preparation, units of work, engines, cost and stopping."""
