"""The one error of this package."""


class ModelError(ValueError):
    """A model file, or a part of one, that cannot be used.

    The message is one line: the file, the field, and what was expected there.
    """
