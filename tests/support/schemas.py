"""The part of JSON Schema that the schemas of `verify/schemas` use, checked.

Type, enum, required, properties, items. A word that is not one of them is refused, so that none is taken to
be checked that is not.
"""

from __future__ import annotations

from typing import Any

_TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip
_KNOWN = {"$schema", "title", "type", "enum", "required", "properties", "items"}


def violations(schema: dict[str, Any], value: Any, at: str = "$") -> list[str]:
    """What is not as the schema says, each with its place."""
    assert set(schema) <= _KNOWN, set(schema) - _KNOWN
    if "enum" in schema and value not in schema["enum"]:
        return [f"{at}: {value!r} is none of {schema['enum']}"]
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(_is(value, kind) for kind in kinds):
            return [f"{at}: {value!r:.60} is no {' or '.join(kinds)}"]
    found = []
    if isinstance(value, dict):
        found += [f"{at}: {name} is missing" for name in schema.get("required", ()) if name not in value]
        for name, inner in schema.get("properties", {}).items():
            if name in value:
                found += violations(inner, value[name], f"{at}.{name}")
    if isinstance(value, list) and "items" in schema:
        for i, each in enumerate(value):
            found += violations(schema["items"], each, f"{at}[{i}]")
    return found


def _is(value: Any, kind: str) -> bool:
    if kind in ("integer", "number") and isinstance(value, bool):
        return False
    return isinstance(value, _TYPES[kind])
