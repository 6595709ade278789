"""Bad models: one clear line that names the file, the field and what was expected."""


class ModelError(ValueError):
    """A model file that cannot be read, or that says something it should not."""
