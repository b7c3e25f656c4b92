"""Fast forward passes that give the numbers of plain ones."""
