"""Columns of tokens.parquet, by arm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from verify.ppl.groups import GroupResult


class Scores:
    """Columns of tokens.parquet by arm, as arrays [windows, scored]."""

    def __init__(self, result: GroupResult | pa.Table, scored: int) -> None:
        table = result if isinstance(result, pa.Table) else result.tokens
        self._table, self._scored = table, scored
        self._arms: dict[str, Any] = {}

    def column(self, arm: str, name: str) -> np.ndarray:
        """[windows, scored]; no windows where the arm failed. A window that it did not finish is left out."""
        if arm not in self._arms:
            self._arms[arm] = self._table.filter(pc.equal(self._table["arm"], arm))
        values: np.ndarray = self._arms[arm][name].to_numpy()
        whole = len(values) // self._scored * self._scored
        return values[:whole].reshape(-1, self._scored)

    def windows(self, arm: str) -> np.ndarray:
        """The numbers of the windows of `column`, ascending."""
        return self.column(arm, "window")[:, 0]

    def mean(self, arm: str, name: str) -> float:
        """NaN where there is nothing."""
        values = self.column(arm, name)
        return float(values.mean()) if values.size else float("nan")
