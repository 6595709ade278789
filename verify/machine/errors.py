"""Errors of use, and what every layer of the house raises for them."""

from __future__ import annotations

from verify.data import CorpusError
from verify.kernels.errors import SpecError
from verify.model.errors import ModelError


class UsageError(ValueError):
    """Bad input to a command: one clear line that names the option or file and what was expected."""


# What a command turns into one line on stderr and exit code 2.
INPUT_ERRORS = (UsageError, CorpusError, ModelError, SpecError)
