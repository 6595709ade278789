"""Models of other shapes made from a small one, with the same perplexity."""
