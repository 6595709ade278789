"""The kernel diff report: one call at a time, over shapes, lengths and input families."""
