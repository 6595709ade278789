"""Probes of what one-hot is blind to: keys of chosen logits, one value in all keys, rows that see nothing.

Zero padding, merge weights and the base of the lse (counted), the denominator (constant V), and the options
of a call: windows, sinks, softcap, ALiBi.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.sums import gamma
from verify.kernels.call import Call, checked_call
from verify.kernels.judging.counter_random import CounterRandom
from verify.kernels.judging.hidden_keys import POISON, likeliest
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.probes.one_hot_probes import one_hot_edges, tags
from verify.kernels.judging.probes.probe import AMPLITUDE, LOW, Demand, Probe, call_of
from verify.kernels.numbers import FLOAT_TYPES, NUMBER_TYPES
from verify.kernels.sequences import sequences


def counted(
    sizes: InputSizes,
    cut: int,
    a: int,
    b: int,
    *,
    device: torch.device | str = "cpu",
) -> Probe:
    """a keys just before a cut and b keys just after it have logit 0, all others -128; V is 1 and -1.

    The result is (a - b) / (a + b) in every column, ln(a + b) the lse: unequal a and b show merge weights,
    the base of the lse, and a zero key that does not belong. Demands a budget.
    """
    levels = torch.full((sizes.keys,), LOW)
    levels[max(cut - a, 0) : cut + b] = 0
    v = torch.where(torch.arange(sizes.keys) < cut, 1.0, -1.0)
    return _levels(f"counted {a}+{b} at {cut}", "budget", sizes, levels, v, device)


def constant_v(sizes: InputSizes, *, seed: int = 0, device: torch.device | str = "cpu") -> Probe:
    """One value in every key, over Gaussian logits: only the denominator and rounding can spoil it."""
    random = CounterRandom(seed, device)
    shape = (sizes.batch, len(sizes.n_kv), sizes.heads.q, sizes.heads.k_size)
    q = random.normal(*shape)
    k = random.normal(sizes.batch, sizes.keys, sizes.heads.kv, sizes.heads.k_size)
    column = (torch.arange(sizes.heads.v_size, device=device) % 16 - 7.5) / 4
    v = column.expand(sizes.batch, sizes.keys, sizes.heads.kv, -1).clone()
    longest = max(sizes.n_kv)
    grouped = q.unflatten(2, (sizes.heads.kv, -1))
    k[:, longest:] = likeliest(grouped, k, [sizes.n_kv] * sizes.batch)[:, None]
    v[:, longest:] = POISON
    lengths = torch.tensor(sizes.n_kv).expand(sizes.batch, -1)
    call = call_of(q, k, v, lengths, sizes, device)
    seen = (call.kv_len > 0)[..., None, None].double()
    out = seen * column.double().expand(*shape[:3], -1)
    return Probe(
        name="constant V", demand="budget", call=call, out=out, lse=None, keys=None, bound=constant_bound
    )


def constant_bound(call: Call, a: Arithmetic) -> torch.Tensor:
    """The budget where v_j = o for every key: eta drops out, since sum_j p_j (v_j - o) = 0.

    |err| <= |o| (x + g (1 + x)), x = max(u_p, n tau_p) (0 if the kernel states that l sums
    rounded P; where that is only assumed, as the looser elsewhere, it is not relied on),
    g = gamma_dn + gamma_dl + 2 gamma_dm + 3u + u_v + u_part, then the rounding of the result.
    """
    depths = [[a.depths(n) for n in row] for row in call.n_kv.tolist()]

    def per_row(name: str) -> torch.Tensor:
        values = [[float(getattr(d, name)) for d in row] for row in depths]
        return torch.tensor(values, dtype=torch.float64, device=call.q.device)[..., None, None]

    n = call.n_kv[..., None, None].double()
    lost = torch.clamp(n * a.tau_p, min=NUMBER_TYPES[a.p].u)
    if a.l_from_rounded_p and a.stated and not a.identified:
        lost = torch.zeros_like(lost)
    deep = gamma(per_row("d_n"), a.u_acc) + gamma(per_row("d_l"), a.u) + 2 * gamma(per_row("d_m"), a.u)
    relative = lost + (deep + 3 * a.u + a.u_v + a.u_part) * (1 + lost)
    out_type, tau = FLOAT_TYPES[a.out], FLOAT_TYPES["f16"].tau
    size = call.q.new_zeros((*call.q.shape[:3], call.shape.v_size), dtype=torch.float64)
    for sequence in sequences(call):
        held = sequence.v[: max(*sequence.lengths, 1)].double().abs().amax(0)
        size[sequence.at] = held.repeat_interleave(call.shape.ratio, 0)
    bound = size * (relative + (out_type.u + 2.0**-24) * (1 + relative)) + out_type.tau + n * 2.0**-149
    if a.acc == "f16":
        bound = bound + per_row("d_n") * a.tau_acc
    return bound + tau * ((a.u_v > 0) + (a.u_part > 0))


def empty_rows(sizes: InputSizes, *, device: torch.device | str = "cpu", sinks: bool = False) -> Probe:
    """Rows that see nothing, among rows that see one key: (0, -inf), and the key's value; demands bits.

    With sinks none sees a key: (0, the sink).
    """
    seeing = [0, *([0, 0] if sinks else [1, 0]) * len(sizes.n_kv)]
    held = replace(sizes, n_kv=tuple(n for n in sizes.n_kv if n))
    call = one_hot_edges(held, sizes.edges, device=device).call
    batch, rows, heads = sizes.batch, len(seeing), sizes.heads.q
    lengths = torch.tensor(seeing, dtype=torch.int32, device=device).expand(batch, -1)
    # A row that sees one key asks nothing of it: its logit is 0, and so is the lse.
    q = (lengths == 0).to(sizes.dtype)[..., None, None].expand(-1, -1, heads, sizes.heads.k_size).contiguous()
    level = torch.linspace(-3, 3, heads, device=device) if sinks else None
    call = checked_call(
        q, call.k, call.v, kv_len=lengths, scale=sizes.scale, path=sizes.path, sinks=level
    )  # fmt: skip
    first = call.v[:, :1].double().repeat_interleave(sizes.heads.ratio, 2)
    out = torch.where((lengths > 0)[..., None, None], first, 0.0)
    lse = torch.where((lengths > 0)[..., None], 0.0, -math.inf).double().expand(-1, -1, heads)
    if level is not None:
        lse = level.double().expand(batch, rows, heads)
    return Probe("empty rows with sinks" if sinks else "empty rows", "bits", call, out, lse)


def window_edge(sizes: InputSizes, window: int, *, device: torch.device | str = "cpu") -> Probe:
    """A sliding window whose first key must be seen and whose last hidden key must not; demands bits.

    The hidden key would win by 128 nats, the first visible one wins by 128 against the rest, and every part
    before the window sees nothing at all.
    """
    n = max(sizes.n_kv)
    window = min(window, n)
    levels = torch.full((sizes.keys,), LOW)
    levels[n - window] = 0
    levels[: n - window] = -LOW
    sizes = replace(sizes, n_kv=(n,))
    probe = _levels(f"window {window}", "bits", sizes, levels, None, device, sliding_window=window)
    return _asking(probe, n - window)


def last_key_edge(sizes: InputSizes, *, device: torch.device | str = "cpu") -> Probe:
    """The last visible key wins by 128 nats, the one beyond would win against it; demands bits."""
    n = max(sizes.n_kv)
    levels = torch.full((sizes.keys,), LOW)
    levels[n - 1], levels[n:] = 0, -LOW
    return _asking(_levels("last key", "bits", replace(sizes, n_kv=(n,)), levels, None, device), n - 1)


def sink_weights(sizes: InputSizes, *, device: torch.device | str = "cpu") -> Probe:
    """Three keys of logit 0, and for head h a sink of ln(1 + h): out is 3 / (4 + h) of V; a budget."""
    n, heads = max(sizes.n_kv), sizes.heads.q
    levels = torch.full((sizes.keys,), LOW)
    levels[[0, n // 2, n - 1]] = 0
    sinks = torch.log(1 + torch.arange(heads, dtype=torch.float32)).to(device)
    return _levels(
        "sinks", "budget", replace(sizes, n_kv=(n,)), levels, torch.ones(sizes.keys), device, sinks=sinks
    )


def softcap_edge(sizes: InputSizes, *, device: torch.device | str = "cpu") -> Probe:
    """Two keys far above a softcap of 20 weigh the same though their logits differ by 30; a budget."""
    n = max(sizes.n_kv)
    levels = torch.full((sizes.keys,), LOW)
    levels[0], levels[n - 1] = 120, 90
    v = torch.where(torch.arange(sizes.keys) == 0, 1.0, -1.0)
    return _levels("softcap", "budget", replace(sizes, n_kv=(n,)), levels, v, device, softcap=20.0)


def alibi_edge(sizes: InputSizes, *, device: torch.device | str = "cpu") -> Probe:
    """Equal logits under slopes that differ by head: geometric weights, the newest key first; a budget."""
    n, heads = max(sizes.n_kv), sizes.heads.q
    slopes = (2.0 ** -(torch.arange(heads, dtype=torch.float32) % 8)).to(device)
    v = torch.arange(sizes.keys) % 2 * 2.0 - 1
    return _levels(
        "ALiBi", "budget", replace(sizes, n_kv=(n,)), torch.zeros(sizes.keys), v, device, alibi_slopes=slopes
    )


def _levels(
    name: str,
    demand: Demand,
    sizes: InputSizes,
    levels: torch.Tensor,
    v: torch.Tensor | None,
    device: torch.device | str,
    **options: Any,
) -> Probe:
    """Keys with given logits [S] for every query; v [S] in every column, or tags."""
    batch, heads = sizes.batch, sizes.heads.kv
    q = torch.zeros(batch, len(sizes.n_kv), heads * sizes.heads.ratio, sizes.heads.k_size, device=device)
    q[..., -1] = AMPLITUDE
    k = torch.zeros(batch, sizes.keys, heads, sizes.heads.k_size, dtype=sizes.dtype, device=device)
    k[..., -1] = (levels / (AMPLITUDE * sizes.scale)).to(k).view(1, -1, 1)
    if v is None:
        values = tags(sizes.keys, heads, sizes.heads.v_size, device=device).to(sizes.dtype)
        values = values.expand(batch, -1, -1, -1).clone()
    else:
        values = v.to(k).view(1, -1, 1, 1).expand(batch, -1, heads, sizes.heads.v_size).clone()
    values[:, max(sizes.n_kv) :] = POISON
    lengths = torch.tensor(sizes.n_kv).expand(batch, -1)
    return Probe(name, demand, call_of(q, k, values, lengths, sizes, device, **options))


def _asking(probe: Probe, key: int) -> Probe:
    """A probe whose every query is due this key's value."""
    call = probe.call
    v = call.v[:, key].double().repeat_interleave(call.shape.ratio, 1)[:, None]
    out = v.expand(-1, call.shape.rows, -1, -1)
    return replace(probe, out=out, keys=torch.full(call.q.shape[:3], key, device=call.q.device))
