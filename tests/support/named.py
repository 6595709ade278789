"""Names of parametrised tests."""

from __future__ import annotations

import re


def named(value: object) -> str:
    """An id without addresses: processes that share the tests must call each by the same name."""
    if isinstance(value, set | frozenset):
        value = "+".join(sorted(map(str, value)))
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
