"""Fits that start from mask gradients."""
