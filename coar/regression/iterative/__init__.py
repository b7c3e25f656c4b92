"""Ridge, least squares and the lasso where no decomposition fits into memory."""
