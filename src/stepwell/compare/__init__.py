"""Comparisons: paths and losses side by side, with controls of equal compute, in JSON cells and one table."""
