"""From figures to a verdict: statistics, and the order in which verdicts apply."""
