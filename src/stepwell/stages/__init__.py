"""The six stages of a run, one file each: score, grid, joint, select, distill, deliver.

A stage takes the setting and the results before it, and returns its own, which is saved and says what it
cost: it is the unit of resume.
"""
