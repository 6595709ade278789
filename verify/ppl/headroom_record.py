"""What a run keeps of its headroom: records alone, for whoever reads a run folder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerHeadroom:
    """The largest figures of one layer at one length, over heads and windows."""

    layer: int  # counted from 0
    n_kv: int  # keys of the row
    partial: float  # largest |partial sum| of P V at offset 0
    head: int  # that has it
    logit: float  # largest |logit|
    value: float  # largest |v|


@dataclass(frozen=True, kw_only=True)
class OffsetHeadroom:
    """What an offset on the maximum makes of the headroom."""

    offset: float  # nats
    headroom: float  # times below 65,504


@dataclass(frozen=True, kw_only=True)
class HeadroomRecord:
    """How near float16 sums are to overflow on this model and text."""

    order: str  # specification whose order of summation it is
    windows: int  # looked at: those of the first rank
    layers: list[LayerHeadroom]  # one a layer and length
    largest_partial: float  # of all layers
    offsets: list[OffsetHeadroom]  # none, ln 2, 3 x 0.6931
    safe_offset: float  # the smallest that leaves four times the room, nats
    longer: list[float] | None  # largest partial sum at 131,072 keys: low, middle, high; None: not told
