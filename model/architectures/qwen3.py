"""`qwen3`: NEOX rotation, RMSNorm of each q and k head before it; heads times size need not be the width."""

from __future__ import annotations

from verify.model.architectures.grouped_query import GroupedQuery


class Qwen3(GroupedQuery):
    """Qwen 3, dense."""

    rope_kind = "neox"
    head_norms = "required"
