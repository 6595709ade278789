"""JSON as every reader takes it."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json_text(content: Any) -> str:
    """JSON that every reader takes: numbers that are NaN or infinite become null."""
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
