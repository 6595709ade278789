"""The part of JSON Schema that the schemas of `verify/schemas` use, checked.

Type, enum, required, properties, additionalProperties, items. A word that is not one of them is refused, so
that none is taken to be checked that is not.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

_TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip
_KNOWN = {"$schema", "title", "type", "enum", "required", "properties", "items", "additionalProperties"}


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
        if "additionalProperties" in schema:
            for name in value.keys() - schema.get("properties", {}).keys():
                found += violations(schema["additionalProperties"], value[name], f"{at}.{name}")
    if isinstance(value, list) and "items" in schema:
        for i, each in enumerate(value):
            found += violations(schema["items"], each, f"{at}[{i}]")
    return found


def untold(schema: dict[str, Any], value: Any, at: str = "$") -> list[str]:
    """Keys of a value that its schema says nothing of: where it names any, it is to name all."""
    found = []
    if isinstance(value, dict) and "properties" in schema:
        for name, x in value.items():
            inner = schema["properties"].get(name, schema.get("additionalProperties"))
            found += [f"{at}.{name}"] if inner is None else untold(inner, x, f"{at}.{name}")
    if isinstance(value, list) and "items" in schema:
        found += [x for i, each in enumerate(value) for x in untold(schema["items"], each, f"{at}[{i}]")]
    return found


def schema_of(command: str) -> dict[str, Any]:
    """The shipped schema of a command's JSON."""
    found: dict[str, Any] = json.loads(files("verify.schemas").joinpath(f"{command}.json").read_text())
    return found


def assert_as_told(command: str, text: str) -> None:
    """What a command printed is as its schema says, and holds nothing that it does not say."""
    schema, value = schema_of(command), json.loads(text)
    assert violations(schema, value) == [], command
    assert untold(schema, value) == [], command


def _is(value: Any, kind: str) -> bool:
    if kind in ("integer", "number") and isinstance(value, bool):
        return False
    return isinstance(value, _TYPES[kind])
