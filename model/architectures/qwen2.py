"""`qwen2`: NEOX rotation, mostly with biases on q, k and v."""

from __future__ import annotations

from verify.model.architectures.grouped_query import GroupedQuery


class Qwen2(GroupedQuery):
    """Qwen 2 and 2.5, dense."""

    rope_kind = "neox"
    output_vector = True
