"""Measuring a model, writing it to disk, and telling what was found."""
