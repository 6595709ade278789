"""The heads of an attention layer, and their sizes: one record for calls, plans, models and tests."""

from __future__ import annotations

from typing import NamedTuple


class Heads(NamedTuple):
    """q query heads over kv KV heads: query heads h*ratio .. h*ratio + ratio - 1 read KV head h.

    k_size, v_size: numbers of one head of q and k, and of one head of v and the output.
    """

    q: int
    kv: int
    k_size: int
    v_size: int

    def __str__(self) -> str:
        size = str(self.k_size) if self.k_size == self.v_size else f"{self.k_size}/{self.v_size}"
        return f"{self.q}/{self.kv} x {size}"

    @classmethod
    def grouped(cls, *, kv: int, ratio: int, k_size: int, v_size: int) -> Heads:
        """ratio query heads for each of kv KV heads."""
        return cls(kv * ratio, kv, k_size, v_size)

    @property
    def ratio(self) -> int:
        """r, query heads a KV head."""
        return self.q // self.kv

    def with_kv(self, kv: int) -> Heads:
        """So many KV heads, each with as many query heads."""
        return self._replace(q=kv * self.ratio, kv=kv)


class OfHeads:
    """What a record that has `heads` says of them by itself."""

    __slots__ = ()
    heads: Heads

    @property
    def ratio(self) -> int:
        """r, query heads a KV head."""
        return self.heads.ratio

    @property
    def q_heads(self) -> int:
        return self.heads.q

    @property
    def kv_heads(self) -> int:
        return self.heads.kv

    @property
    def k_size(self) -> int:
        return self.heads.k_size

    @property
    def v_size(self) -> int:
        return self.heads.v_size
