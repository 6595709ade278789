"""What a user of the library says of a kernel's arithmetic, in a word, in options, or as a record."""

from __future__ import annotations

from dataclasses import replace

import torch

from verify.kernels.budget.arithmetic import Arithmetic, loosest, loosest_of
from verify.kernels.numbers import FLOAT_TYPES, type_of
from verify.machine.errors import UsageError

SUMS = ("f32", "f16")
OPTIONS = ("p", "acc", "out")


def stated_arithmetic(arithmetic: str | Arithmetic | None) -> Arithmetic | str | None:
    """`f32` or `f16` for the type of its sums alone, an `Arithmetic` for more, None for nothing.

    Raises UsageError.
    """
    if arithmetic is None or isinstance(arithmetic, Arithmetic):
        return arithmetic
    if arithmetic == "identify":
        raise UsageError(
            "arithmetic='identify': tensors cannot be asked, only a kernel can (check_attention reads it off"
            " one that states nothing); expected f32, f16, options such as 'p=f16,acc=f32', or an Arithmetic"
        )
    if arithmetic in SUMS:
        return arithmetic
    found: dict[str, str] = {}
    for piece in arithmetic.split(","):
        name, _, value = piece.partition("=")
        known = SUMS if name == "acc" else tuple(FLOAT_TYPES)
        if name not in OPTIONS or value not in known:
            raise UsageError(
                f"arithmetic={arithmetic!r}: {piece!r}: expected f32, f16, or p=, acc=, out= with one of"
                f" {', '.join(FLOAT_TYPES)}"
            )
        found[name] = value
    if found.keys() == {"acc"}:
        return found["acc"]
    # Tiles, cuts and the order of sums stay unknown: as deep as any.
    loose = loosest("f16", acc=found.get("acc", "f32"))
    return replace(loose, p=found.get("p", loose.p), out=found.get("out", "f32"))


def arithmetic_for(stated: Arithmetic | str | None, call_type: torch.dtype, out: torch.dtype) -> Arithmetic:
    """The arithmetic of tensors at hand: what is stated, and the type that came back.

    With nothing stated sums are taken to be float32, all else to be as loose as can be: float16 sums have
    no bound from 128 keys on.
    """
    found = stated
    if not isinstance(found, Arithmetic):
        found = loosest_of(call_type, acc=found or "f32")
    kind = type_of(out)
    return replace(found, out=kind.name) if kind is not None and kind.name != "f32" else found
