"""Application of a mask to the model: gates in weights, in hooks and on routers, and ablations made permanent."""
