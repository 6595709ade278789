"""`verify explain` and `verify ladder`: engines' outputs beside what known changes do to the same model."""
