"""Records as JSON, field by field, and JSON read back into them.

A record is a dataclass of numbers, texts, lists, tuples, dicts with names as keys, and other records. Its
fields are the keys, in their order. Numbers that are NaN or infinite are `null` in a file (`jsontext`): where
a field is a `float`, a `null` is read as NaN.
"""

from __future__ import annotations

import dataclasses
import math
import types
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from verify.machine.errors import UsageError

T = TypeVar("T")
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def as_json(value: Any) -> Any:
    """A record, or a list or dict of them, as what `json` writes: dicts by field, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: as_json(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(x) for x in value]
    return value


def record_from_json(kind: type[T], value: Any, where: str) -> T:
    """The record that `as_json` wrote. Keys that the record does not know are left out; a field with a
    default may be missing.

    where: the file, for messages. Raises UsageError that names file and field.
    """
    found: T = _read(kind, value, where, "")
    return found


def _read(kind: Any, value: Any, where: str, field: str) -> Any:
    """One value of a type that records may have. field: its dotted name, empty for the whole."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        others = [x for x in arguments if x is not type(None)]
        return None if value is None else _read(others[0], value, where, field)
    if dataclasses.is_dataclass(kind):
        return _read_record(kind, value, where, field)
    if origin is dict:
        _expect(isinstance(value, dict), "an object", value, where, field)
        return {key: _read(arguments[1], x, where, f"{field}.{key}") for key, x in value.items()}
    if origin in (list, tuple):
        _expect(isinstance(value, list), "a list", value, where, field)
        if origin is tuple and arguments[-1] is not Ellipsis:
            _expect(len(value) == len(arguments), f"{len(arguments)} values", value, where, field)
            kinds = arguments
        else:
            kinds = (arguments[0],) * len(value)
        read = [
            _read(k, x, where, f"{field}[{i}]") for i, (k, x) in enumerate(zip(kinds, value, strict=True))
        ]
        return tuple(read) if origin is tuple else read
    if origin is Literal:
        _expect(value in arguments, f"one of {', '.join(map(str, arguments))}", value, where, field)
        return value
    if kind is float:
        if value is None:
            return math.nan
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _expect(number, _WORDS[float], value, where, field)
        return float(value)
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    _expect(right, _WORDS.get(kind, kind.__name__), value, where, field)
    return value


def _read_record(kind: Any, value: Any, where: str, field: str) -> Any:
    _expect(isinstance(value, dict), "an object", value, where, field)
    hints = _hints(kind)
    given = {}
    for each in dataclasses.fields(kind):
        inner = f"{field}.{each.name}" if field else each.name
        if each.name in value:
            given[each.name] = _read(hints[each.name], value[each.name], where, inner)
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where}: no {inner} there, expected {_called(hints[each.name])}")
    return kind(**given)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _called(kind: Any) -> str:
    if get_origin(kind) in (list, tuple):
        return "a list"
    if dataclasses.is_dataclass(kind) or get_origin(kind) is dict:
        return "an object"
    return _WORDS.get(kind, "a value")


def _expect(holds: bool, expected: str, value: Any, where: str, field: str) -> None:
    if not holds:
        got = " ".join(repr(value).split())[:60]
        raise UsageError(f"{where}: {f'{field}: ' if field else ''}expected {expected}, got {got}")
