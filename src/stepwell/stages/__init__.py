"""The steps of a path: one function each, the unit of resume."""
