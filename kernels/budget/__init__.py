"""The rounding-error bound of one output element, and of a merge."""
