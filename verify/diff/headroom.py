"""Headroom of float16 sums on the inputs of a diff."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from verify.diff.examining import CellInputs
from verify.kernels.judging.headroom import (
    OFFSETS,
    HeadroomPlace,
    RowHeadroom,
    grown_to,
    headroom,
    headroom_sentences,
    row_headroom,
    safe_offset,
)
from verify.kernels.kernel import Kernel
from verify.kernels.numbers import FP8_TYPES

# Rows of a cell that are looked at: its last ones.
_ROWS = 2
# A length that engines have, to which lengths that were seen are drawn out.
LONGER = 131072


@dataclass
class DiffHeadroom:
    """The largest figures of the inputs of one candidate, in its order of summation."""

    kernel: Kernel
    cells: list[dict[str, Any]] = field(default_factory=list)  # one an input, for run.json
    fp8: bool = False  # P or its cache is e4m3

    def add(self, inputs: CellInputs) -> None:
        """Look at the last rows of a cell."""
        call = inputs.call
        last = slice(max(call.shape.rows - _ROWS, 0), None)
        if all(x is None for x in (call.cu_seqlens, call.mask, call.keys)):
            call = replace(call, q=call.q[:, last], kv_len=call.kv_len[:, last])
        arithmetic = self.kernel.arithmetic_of(call)
        self.fp8 |= arithmetic.p in FP8_TYPES or any(
            kind in FP8_TYPES for kind in (self.kernel.cache.at(None).k, self.kernel.cache.at(None).v)
        )
        found = row_headroom(call, arithmetic)
        self.cells.append(
            {"shape": inputs.shape, "n_kv": inputs.n_kv, "inputs": inputs.family, "seed": inputs.seed}
            | {name: float(x.max()) for name, x in zip(RowHeadroom._fields, found, strict=True)}
            | {"head": int(found.partial.flatten(0, 1).amax(0).argmax())}
        )

    def to_json(self) -> dict[str, Any]:
        worst = self._largest("partial").value
        return {
            "candidate": self.kernel.spec,
            "cells": self.cells,
            "largest_partial": worst,
            "offsets": [{"offset": c, "headroom": headroom(worst, c)} for c in OFFSETS],
            "safe_offset": safe_offset(worst),
        }

    def sentences(self) -> list[str]:
        """What a reader is told."""
        if not self.cells:
            return []
        # The largest of each length, over families: those of one length have other sizes.
        by_length: dict[int, float] = {}
        for cell in self.cells:
            by_length[cell["n_kv"]] = max(by_length.get(cell["n_kv"], 0.0), cell["partial"])
        longer = grown_to(list(by_length.items()), LONGER) if max(by_length) < LONGER else None
        partial, logit, value = (self._largest(name) for name in ("partial", "logit", "value"))
        return headroom_sentences(self.kernel.spec, partial, logit, value, longer, fp8=self.fp8)

    def _largest(self, name: str) -> HeadroomPlace:
        cell = max(self.cells, key=lambda each: each[name])
        return HeadroomPlace(cell[name], f"{cell['inputs']}, {cell['shape']} at {cell['n_kv']} keys")
