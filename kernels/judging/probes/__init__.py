"""Probes: inputs whose right answer is known, so that an indexing fault shows whatever the rounding is.

`standard_probes` has one of every kind at given sizes: `one_hot_probes` demand bits of every key,
`level_probes` see what one-hot is blind to; `probe` judges a kernel's result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.other_forms import in_chunks, several
from verify.kernels.judging.probes.level_probes import (
    alibi_edge,
    constant_bound,
    constant_v,
    counted,
    empty_rows,
    last_key_edge,
    sink_weights,
    softcap_edge,
    window_edge,
)
from verify.kernels.judging.probes.one_hot_probes import (
    code_words,
    far_offsets,
    one_hot,
    one_hot_edges,
    strided_one_hot,
    tags,
    why_not_one_hot,
)
from verify.kernels.judging.probes.probe import Probe, ProbeFailure, check, judge, on_cache
from verify.kernels.plans.asked import MOST_SEVERAL

__all__ = [
    "Probe",
    "ProbeFailure",
    "alibi_edge",
    "check",
    "code_words",
    "constant_bound",
    "constant_v",
    "counted",
    "empty_rows",
    "far_offsets",
    "judge",
    "last_key_edge",
    "on_cache",
    "one_hot",
    "one_hot_edges",
    "probe_makers",
    "sink_weights",
    "softcap_edge",
    "standard_probes",
    "strided_one_hot",
    "tags",
    "why_not_one_hot",
    "window_edge",
]


def standard_probes(sizes: InputSizes, *, device: torch.device | str = "cpu") -> list[Probe]:
    """Every probe at these sizes. sizes.n_kv: its longest row is probed, the others at the edges too."""
    return [make() for make in probe_makers(sizes, device=device)]


def probe_makers(
    sizes: InputSizes, *, device: torch.device | str = "cpu", brief: bool = False
) -> list[Callable[[], Probe]]:
    """What makes each of the standard probes, for where they are too large to be held together.

    Without those that need a code word a key where there are too few (`why_not_one_hot`). On the path
    `several` the rows of each go `MOST_SEVERAL` at a time. brief: each key is asked for by the query heads of
    one KV head, in one of the two layouts, in the place of every KV head and both (`one_hot`).
    """
    if sizes.path == "several":
        makers_of_rows = probe_makers(replace(sizes, path="decode"), device=device, brief=brief)
        return [partial(_several, make) for make in makers_of_rows]
    n = max(sizes.n_kv)
    edges = [e for e in sizes.edges if 0 < e < n]
    long = replace(sizes, batch=1, n_kv=(n,))
    seeing = replace(sizes, n_kv=tuple(x for x in sizes.n_kv if x) or (1,))
    makers: list[Callable[[], Probe]] = []
    if why_not_one_hot(sizes) is None:
        makers = [
            partial(one_hot, long, device=device, once=brief),
            partial(strided_one_hot, long, device=device, once=brief),
            partial(one_hot_edges, seeing, edges, device=device),
            partial(empty_rows, sizes, device=device),
            partial(empty_rows, sizes, device=device, sinks=True),
        ]
    makers += [
        partial(last_key_edge, sizes, device=device),
        partial(constant_v, sizes, device=device),
        partial(sink_weights, sizes, device=device),
        partial(softcap_edge, sizes, device=device),
        partial(alibi_edge, sizes, device=device),
    ]
    windows = sorted({1, max(n // 3, 1), max(n - 1, 1)})
    makers += [partial(window_edge, long, w, device=device) for w in windows]
    for i, cut in enumerate(edges):
        a, b = ((1, 3), (3, 1), (5, 11))[i % 3]
        makers.append(partial(counted, long, cut, min(a, cut), min(b, n - cut), device=device))
    makers.append(partial(counted, long, n, min(3, n), 0, device=device))
    return makers


def _several(make: Callable[[], Probe]) -> Probe:
    """A probe whose rows go together, as many as the path `several` has."""
    probe = make()
    call = several(probe.call, MOST_SEVERAL)
    lse = probe.lse
    if lse is not None:
        # Rows that fill the last chunk see nothing but the sink.
        empty = -math.inf if call.sinks is None else call.sinks.double()
        lse = torch.where((call.kv_len > 0)[..., None], in_chunks(lse, MOST_SEVERAL), empty)
    return replace(
        probe,
        call=call,
        out=None if probe.out is None else in_chunks(probe.out, MOST_SEVERAL),
        lse=lse,
        keys=None if probe.keys is None else in_chunks(probe.keys, MOST_SEVERAL, -1),
    )
