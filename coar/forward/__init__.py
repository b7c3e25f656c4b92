"""Fast forward passes with the numbers of plain ones."""
