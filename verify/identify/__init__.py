"""What arithmetic is this? A kernel nobody describes, read at the lengths that it is used at."""
