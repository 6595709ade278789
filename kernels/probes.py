"""Probes: inputs whose right answer is known, so that an indexing fault shows whatever the rounding is.

One-hot probes demand bits, in every arithmetic: the query's logit with one key lies more than 104 + ln n nats
above all others, so their weights are exactly 0 in float32 and the result is exactly that key's value. Keys
are words of the Reed-Muller code RM(2, m) as +-1, D = 2^m: distance D/4, and so a logit gap of 32 sqrt(D) at
q = 64 * word and the usual scale D^-1/2; there are enough words for millions of keys. Values are tags that
name the key and the KV head. The other probes see what one-hot is blind to: zero padding (counted), merge
weights and the base of the lse (counted), the denominator (constant V), and the options of a call.

Where a probe demands a budget, `error_budget` of its call bounds the error (counted, sinks, ...), or the
closed form of `constant_bound`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from kernels.arithmetic import FLOAT_TYPES, Arithmetic
from kernels.budget import Budget, error_budget
from kernels.budget_sums import gamma
from kernels.contract import AttentionOutput, Call, Kernel, checked_call
from kernels.counter_random import CounterRandom
from kernels.errors import KernelFailure
from kernels.families import POISON, Sizes
from kernels.plan import Plan

Demand = Literal["bits", "budget"]
AMPLITUDE = 64.0
# Weights of exp(-GAP) are 0 in float32, even times 2^17 keys: 104 + ln n.
GAP = 116.0
# Logits of keys that a probe does not mean, below the ones it does.
LOW = -128.0
# Rows of the one-hot probe of strides.
STRIDED_ROWS = 128


class ProbeFailure(NamedTuple):
    """One wrong element. key: the key whose value was due, -1 where there is no single one; part: of the KV
    parts that hold it, -1 where not known; expected, got: of the first wrong column."""

    probe: str
    demand: Demand
    sequence: int
    row: int
    head: int
    key: int
    part: int
    n_kv: int
    what: str
    expected: float
    got: float

    def __str__(self) -> str:
        key = f", key {self.key}" if self.key >= 0 else ""
        part = f", part {self.part}" if self.part >= 0 else ""
        return (
            f"probe {self.probe} ({self.demand}): {self.what} of sequence {self.sequence}, row {self.row}"
            f" (n_kv {self.n_kv}), head {self.head}{key}{part}: expected {self.expected:.9g},"
            f" got {self.got:.9g}"
        )


@dataclass(frozen=True)
class Probe:
    """A call and what is due.

    out [B, T, Hq, Dv] and lse [B, T, Hq] in float64, None where the oracle says it; keys [B, T, Hq]: the key
    whose value is due, -1 for none; bound: the allowed error of out, by arithmetic, None for the budget.
    """

    name: str
    demand: Demand
    call: Call
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    bound: Callable[[Call, Arithmetic], torch.Tensor] | None = None


def code_words(count: int, size: int, *, first: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    """Words first .. first+count-1 of RM(2, m), 2^m <= size, as +-1 in [count, size], 0 beyond 2^m.

    Two words differ in at least 2^m / 4 places. Raises ValueError if the code has fewer words.
    """
    m = size.bit_length() - 1
    columns = torch.arange(1 << m, device=device)
    bits = (columns[:, None] >> torch.arange(m, device=device)) & 1  # [2^m, m]
    pairs = [bits[:, i] & bits[:, j] for i in range(m) for j in range(i)]
    rows = torch.stack([*bits.T, *pairs, torch.ones_like(columns)]).float()
    if first + count > 1 << len(rows):
        raise ValueError(f"head size {size}: {1 << len(rows)} code words, expected {first + count}")
    index = torch.arange(first, first + count, device=device)
    chosen = ((index[:, None] >> torch.arange(len(rows), device=device)) & 1).float()
    words = torch.zeros(count, size, device=device)
    words[:, : 1 << m] = 1 - 2 * torch.remainder(chosen @ rows, 2)
    return words


def tags(keys: int, kv_heads: int, size: int, *, device: torch.device | str = "cpu") -> torch.Tensor:
    """Values that name their key and head, float32 [keys, kv_heads, size], whole numbers from -64 to 64.

    Columns repeat: key's low digit, high digit, rest, and head with column; exact in every type. Signs go
    + - - + over the keys, so that sums over neighbours stay small: weights are 0 in the end, but equal ones
    until then, and an accumulator in float16 would overflow at a thousand keys of one sign.
    """
    key = torch.arange(keys, device=device, dtype=torch.int32)[:, None]
    column = torch.arange(size, device=device, dtype=torch.int32)
    head = torch.arange(kv_heads, device=device, dtype=torch.int32)[:, None]
    kind = column % 4
    of_key = torch.where(kind == 0, key % 128, torch.where(kind == 1, key // 128 % 128, key // 128**2 + 1))
    of_head = (head * 16 + column // 4 % 16) % 128
    value = torch.where(kind == 3, of_head, of_key[:, None])
    sign = 1 - 2 * ((key + key // 2) % 2)
    return ((value - 64) * sign[..., None]).float()


def one_hot(
    sizes: Sizes,
    *,
    device: torch.device | str = "cpu",
    strided: bool = False,
    most_rows: int | None = None,
) -> Probe:
    """Every key of the longest row, by some query head of every KV head; demands bits.

    sizes.n_kv gives the longest row alone: the probe makes as many rows as the keys need, each head of a
    group asking for another key. Rows all see n_kv keys. most_rows: of more rows, about so many are taken,
    the first and the last among them, the others evenly between.
    """
    n, r, heads = max(sizes.n_kv), sizes.ratio, sizes.kv_heads
    rows = torch.arange(-(-n // r), device=device)
    if most_rows is not None and len(rows) > most_rows:
        rows = torch.cat((rows[:: -(-len(rows) // most_rows)], rows[-1:])).unique()
    # Query (row t, head g) asks for key t * r + g, so neighbouring heads ask for neighbouring keys; the last
    # ones wrap round to the first keys.
    wanted = (rows[:, None] * r + torch.arange(r, device=device)) % n  # [T, r]
    return _one_hot("one-hot", sizes, n, wanted.repeat(1, heads)[None], device, strided=strided)


def one_hot_edges(
    sizes: Sizes, edges: Sequence[int], *, device: torch.device | str = "cpu", name: str = "one-hot edges"
) -> Probe:
    """Keys on both sides of each edge, the first and the last, by every query head; rows of each n_kv."""
    asked, lengths = [], []
    for n in sizes.n_kv:
        keys = sorted({k for e in (0, *edges, n) for k in (e - 1, e) if 0 <= k < n})
        for turn in range(len(keys)):
            asked.append([keys[(turn + h) % len(keys)] for h in range(sizes.kv_heads * sizes.ratio)])
            lengths.append(n)
    wanted = torch.tensor(asked, device=device)[None].expand(sizes.batch, -1, -1)
    return _one_hot(name, replace(sizes, n_kv=tuple(lengths)), None, wanted, device)


def _one_hot(
    name: str,
    sizes: Sizes,
    n_kv: int | None,
    wanted: torch.Tensor,
    device: torch.device | str,
    *,
    strided: bool = False,
) -> Probe:
    """wanted [B or 1, T, Hq]: the key that each query asks for."""
    keys, heads, r = sizes.keys, sizes.kv_heads, sizes.ratio
    batch, rows = sizes.batch, wanted.shape[1]
    words = code_words(keys, sizes.k_size, device=device).to(sizes.dtype)
    m = 1 << (sizes.k_size.bit_length() - 1)
    if AMPLITUDE * m / 2 * sizes.scale < GAP:
        raise ValueError(f"head size {sizes.k_size}: expected at least 16 for a one-hot probe")
    # Sequences differ in their tags only, so that a key of another sequence shows.
    k = words[None, :, None].expand(batch, -1, heads, -1).contiguous()
    values = tags(keys, heads, sizes.v_size, device=device).to(sizes.dtype)
    v = torch.stack([values.roll(b, 0) for b in range(batch)])
    longest = max(sizes.n_kv)
    # Beyond the longest row lie keys that would win against any other, with poison as values.
    k[:, longest:], v[:, longest:] = 0.0, POISON
    wanted = wanted.expand(batch, -1, -1)
    q = AMPLITUDE * words[wanted]
    head = torch.arange(heads * r, device=device) // r
    out = torch.stack([v[b][wanted[b], head] for b in range(batch)]).double()
    lengths = torch.tensor(sizes.n_kv) if n_kv is None else torch.full((rows,), n_kv)
    call = _call(q, k, v, lengths.expand(batch, -1), sizes, device, strided=strided)
    return Probe(name, "bits", call, out, None, wanted)


def strided_one_hot(sizes: Sizes, *, device: torch.device | str = "cpu") -> Probe:
    """One-hot over K and V that lie head by head, two elements off alignment; demands bits.

    A wrong stride shows at nearly every key, so at most `STRIDED_ROWS` rows are asked.
    """
    probe = one_hot(sizes, device=device, strided=True, most_rows=STRIDED_ROWS)
    return replace(probe, name="one-hot strided")


def counted(
    sizes: Sizes,
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


def constant_v(sizes: Sizes, *, seed: int = 0, device: torch.device | str = "cpu") -> Probe:
    """One value in every key, over Gaussian logits: only the denominator and rounding can spoil it."""
    random = CounterRandom(seed, device)
    shape = (sizes.batch, len(sizes.n_kv), sizes.kv_heads * sizes.ratio, sizes.k_size)
    q = random.normal(*shape)
    k = random.normal(sizes.batch, sizes.keys, sizes.kv_heads, sizes.k_size)
    column = (torch.arange(sizes.v_size, device=device) % 16 - 7.5) / 4
    v = column.expand(sizes.batch, sizes.keys, sizes.kv_heads, -1).clone()
    longest = max(sizes.n_kv)
    k[:, longest:], v[:, longest:] = POISON, POISON
    lengths = torch.tensor(sizes.n_kv).expand(sizes.batch, -1)
    call = _call(q, k, v, lengths, sizes, device)
    seen = (call.kv_len > 0)[..., None, None].double()
    out = seen * column.double().expand(*shape[:3], -1)
    return Probe("constant V", "budget", call, out, None, None, constant_bound)


def constant_bound(call: Call, a: Arithmetic) -> torch.Tensor:
    """The budget where v_j = o for every key: eta drops out, since sum_j p_j (v_j - o) = 0.

    |err| <= |o| (x + g (1 + x)), x = max(u_p, n tau_p) (0 if l sums rounded P),
    g = gamma_dn + gamma_dl + 2 gamma_dm + 3u + u_v + u_part, then the rounding of the result.
    """
    depths = [[a.depths(n) for n in row] for row in call.kv_len.tolist()]

    def per_row(name: str) -> torch.Tensor:
        values = [[float(getattr(d, name)) for d in row] for row in depths]
        return torch.tensor(values, dtype=torch.float64, device=call.q.device)[..., None, None]

    n = call.kv_len[..., None, None].double()
    lost = torch.clamp(n * a.tau_p, min=FLOAT_TYPES[a.p].u)
    if a.l_from_rounded_p:
        lost = torch.zeros_like(lost)
    deep = gamma(per_row("d_n"), a.u_acc) + gamma(per_row("d_l"), a.u) + 2 * gamma(per_row("d_m"), a.u)
    relative = lost + (deep + 3 * a.u + a.u_v + a.u_part) * (1 + lost)
    out_type, tau = FLOAT_TYPES[a.out], FLOAT_TYPES["f16"].tau
    size = call.v[:, :1].double().abs().repeat_interleave(call.shape.ratio, 2)
    bound = size * (relative + (out_type.u + 2.0**-24) * (1 + relative)) + out_type.tau + n * 2.0**-149
    if a.acc == "f16":
        bound = bound + per_row("d_n") * tau
    return bound + tau * ((a.u_v > 0) + (a.u_part > 0))


def empty_rows(sizes: Sizes, *, device: torch.device | str = "cpu", sinks: bool = False) -> Probe:
    """Rows that see nothing, among rows that see one key: (0, -inf), and the key's value; demands bits.

    With sinks none sees a key: (0, the sink).
    """
    seeing = [0, *([0, 0] if sinks else [1, 0]) * len(sizes.n_kv)]
    held = replace(sizes, n_kv=tuple(n for n in sizes.n_kv if n))
    call = one_hot_edges(held, sizes.edges, device=device).call
    batch, rows, heads = sizes.batch, len(seeing), sizes.kv_heads * sizes.ratio
    lengths = torch.tensor(seeing, dtype=torch.int32, device=device).expand(batch, -1)
    # A row that sees one key asks nothing of it: its logit is 0, and so is the lse.
    q = (lengths == 0).to(sizes.dtype)[..., None, None].expand(-1, -1, heads, sizes.k_size).contiguous()
    level = torch.linspace(-3, 3, heads, device=device) if sinks else None
    call = checked_call(
        q, call.k, call.v, kv_len=lengths, scale=sizes.scale, path=sizes.path, sinks=level
    )  # fmt: skip
    first = call.v[:, :1].double().repeat_interleave(sizes.ratio, 2)
    out = torch.where((lengths > 0)[..., None, None], first, 0.0)
    lse = torch.where((lengths > 0)[..., None], 0.0, -math.inf).double().expand(-1, -1, heads)
    if level is not None:
        lse = level.double().expand(batch, rows, heads)
    return Probe("empty rows with sinks" if sinks else "empty rows", "bits", call, out, lse)


def window_edge(sizes: Sizes, window: int, *, device: torch.device | str = "cpu") -> Probe:
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


def last_key_edge(sizes: Sizes, *, device: torch.device | str = "cpu") -> Probe:
    """The last visible key wins by 128 nats, the one beyond would win against it; demands bits."""
    n = max(sizes.n_kv)
    levels = torch.full((sizes.keys,), LOW)
    levels[n - 1], levels[n:] = 0, -LOW
    return _asking(_levels("last key", "bits", replace(sizes, n_kv=(n,)), levels, None, device), n - 1)


def sink_weights(sizes: Sizes, *, device: torch.device | str = "cpu") -> Probe:
    """Three keys of logit 0, and for head h a sink of ln(1 + h): out is 3 / (4 + h) of V; a budget."""
    n, heads = max(sizes.n_kv), sizes.kv_heads * sizes.ratio
    levels = torch.full((sizes.keys,), LOW)
    levels[[0, n // 2, n - 1]] = 0
    sinks = torch.log(1 + torch.arange(heads, dtype=torch.float32)).to(device)
    return _levels(
        "sinks", "budget", replace(sizes, n_kv=(n,)), levels, torch.ones(sizes.keys), device, sinks=sinks
    )


def softcap_edge(sizes: Sizes, *, device: torch.device | str = "cpu") -> Probe:
    """Two keys far above a softcap of 20 weigh the same though their logits differ by 30; a budget."""
    n = max(sizes.n_kv)
    levels = torch.full((sizes.keys,), LOW)
    levels[0], levels[n - 1] = 120, 90
    v = torch.where(torch.arange(sizes.keys) == 0, 1.0, -1.0)
    return _levels("softcap", "budget", replace(sizes, n_kv=(n,)), levels, v, device, softcap=20.0)


def alibi_edge(sizes: Sizes, *, device: torch.device | str = "cpu") -> Probe:
    """Equal logits under slopes that differ by head: geometric weights, the newest key first; a budget."""
    n, heads = max(sizes.n_kv), sizes.kv_heads * sizes.ratio
    slopes = (2.0 ** -(torch.arange(heads, dtype=torch.float32) % 8)).to(device)
    v = torch.arange(sizes.keys) % 2 * 2.0 - 1
    return _levels(
        "ALiBi", "budget", replace(sizes, n_kv=(n,)), torch.zeros(sizes.keys), v, device, alibi_slopes=slopes
    )


def far_offsets(sizes: Sizes, *, device: torch.device | str) -> Probe:
    """One-hot at the end of a K and a V of more than 2^31 elements, and beside it. Needs about 10 GB."""
    keys = (1 << 31) // (sizes.kv_heads * min(sizes.k_size, sizes.v_size)) + 64
    kinds = torch.full((1, keys, 1, 1), LOW, device=device, dtype=sizes.dtype)
    n = keys - 3
    k = kinds.expand(1, keys, sizes.kv_heads, sizes.k_size).contiguous()
    v = torch.zeros(1, keys, sizes.kv_heads, sizes.v_size, device=device, dtype=sizes.dtype)
    k[:, n - 1] = 0
    k[:, n:] = -LOW
    v[:, n - 1], v[:, n:] = 17, POISON
    heads = sizes.kv_heads * sizes.ratio
    q = torch.full((1, 1, heads, sizes.k_size), 8.0 / sizes.k_size**0.5, device=device, dtype=sizes.dtype)
    lengths = torch.full((1, 1), n, dtype=torch.int32, device=device)
    call = checked_call(q, k, v, kv_len=lengths, scale=sizes.scale, path=sizes.path)
    out = torch.full((1, 1, heads, sizes.v_size), 17.0, device=device, dtype=torch.float64)
    wanted = torch.full((1, 1, heads), n - 1, device=device)
    return Probe("offsets beyond 2^31", "bits", call, out, None, wanted)


def standard_probes(sizes: Sizes, *, device: torch.device | str = "cpu") -> list[Probe]:
    """Every probe at these sizes. sizes.n_kv: its longest row is probed, the others at the edges too."""
    return [make() for make in probe_makers(sizes, device=device)]


def probe_makers(sizes: Sizes, *, device: torch.device | str = "cpu") -> list[Callable[[], Probe]]:
    """What makes each of the standard probes, for where they are too large to be held together."""
    n = max(sizes.n_kv)
    edges = [e for e in sizes.edges if 0 < e < n]
    long = replace(sizes, batch=1, n_kv=(n,))
    seeing = replace(sizes, n_kv=tuple(x for x in sizes.n_kv if x) or (1,))
    makers: list[Callable[[], Probe]] = [
        partial(one_hot, long, device=device),
        partial(strided_one_hot, long, device=device),
        partial(one_hot_edges, seeing, edges, device=device),
        partial(last_key_edge, sizes, device=device),
        partial(empty_rows, sizes, device=device),
        partial(empty_rows, sizes, device=device, sinks=True),
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


def check(probe: Probe, kernel: Kernel, *, plan: Plan | None = None, most: int = 8) -> list[ProbeFailure]:
    """Run a probe; the first failures, at most this many. A kernel that fails is a failure of its own."""
    call = probe.call if plan is None else replace(probe.call, plan=plan)
    try:
        result = kernel.run(call)
    except KernelFailure as failure:
        return [
            ProbeFailure(probe.name, probe.demand, -1, -1, -1, -1, -1, 0, str(failure), math.nan, math.nan)
        ]
    arithmetic = kernel.arithmetic_of(call)
    return judge(probe, result, arithmetic, most=most)


def on_cache(probe: Probe, held: Call) -> Probe:
    """The probe as a kernel with a quantised cache sees it: exact on what its cache holds, within its budget.

    held: `Kernel.held` of the probe's call; a kernel without such a cache gets the probe as it is.
    """
    return probe if held is probe.call else Probe(probe.name, "budget", held, keys=probe.keys)


def judge(
    probe: Probe,
    result: AttentionOutput,
    arithmetic: Arithmetic,
    *,
    most: int = 8,
    budget: Budget | None = None,
) -> list[ProbeFailure]:
    """What is wrong with the result of a probe. budget: of the probe's call, if it is known already."""
    call, got = probe.call, result.out.double()
    out, lse = probe.out, probe.lse
    lse_wrong = torch.zeros(result.lse.shape, dtype=torch.bool, device=got.device)
    if probe.demand == "bits":
        assert out is not None
        # Values, not bit patterns: -0 is 0.
        wrong = ~(got == _as_type(out, arithmetic.out))
        if lse is not None:
            # -inf to the bit; a finite one may have passed through another base and back.
            near = (result.lse.double() - lse).abs() <= 2.0**-20 * (1 + lse.abs())
            lse_wrong = ~((result.lse.double() == lse) | (torch.isfinite(lse) & near))
    else:
        budget = budget or error_budget(call, arithmetic)
        out, lse = budget.out if out is None else out, budget.lse
        bound = budget.bound if probe.bound is None else probe.bound(call, arithmetic)
        wrong = ~((got - out).abs() <= bound)
        same = result.lse.double() == lse
        lse_wrong = ~(same | ((result.lse.double() - lse).abs() <= budget.lse_bound))
    assert out is not None
    failures = []
    for b, t, h in wrong.any(-1).nonzero()[:most].tolist():
        column = int(wrong[b, t, h].nonzero()[0])
        failures.append(_failure(probe, arithmetic, (b, t, h), f"column {column}", out[b, t, h, column],
                                 got[b, t, h, column]))  # fmt: skip
    for b, t, h in lse_wrong.nonzero()[: most - len(failures)].tolist():
        assert lse is not None
        failures.append(_failure(probe, arithmetic, (b, t, h), "lse", lse[b, t, h], result.lse[b, t, h]))
    return failures


def _failure(
    probe: Probe,
    a: Arithmetic,
    at: tuple[int, int, int],
    what: str,
    expected: torch.Tensor,
    got: torch.Tensor,
) -> ProbeFailure:
    b, t, h = at
    n = int(probe.call.kv_len[b, t])
    key = -1 if probe.keys is None else int(probe.keys[b, t, h])
    part = -1
    if key >= 0 and a.cuts_at is not None:
        part = sum(bound <= key for bound in a.cuts_at(n)[1:-1])
    return ProbeFailure(
        probe.name, probe.demand, b, t, h, key, part, n, what, float(expected), float(got)
    )  # fmt: skip


def _as_type(x: torch.Tensor, name: str) -> torch.Tensor:
    types = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
    return x.to(types[name]).double()


def _levels(
    name: str,
    demand: Demand,
    sizes: Sizes,
    levels: torch.Tensor,
    v: torch.Tensor | None,
    device: torch.device | str,
    **options: Any,
) -> Probe:
    """Keys with given logits [S] for every query; v [S] in every column, or tags."""
    batch, heads = sizes.batch, sizes.kv_heads
    q = torch.zeros(batch, len(sizes.n_kv), heads * sizes.ratio, sizes.k_size, device=device)
    q[..., -1] = AMPLITUDE
    k = torch.zeros(batch, sizes.keys, heads, sizes.k_size, dtype=sizes.dtype, device=device)
    k[..., -1] = (levels / (AMPLITUDE * sizes.scale)).to(k).view(1, -1, 1)
    if v is None:
        values = tags(sizes.keys, heads, sizes.v_size, device=device).to(sizes.dtype)
        values = values.expand(batch, -1, -1, -1).clone()
    else:
        values = v.to(k).view(1, -1, 1, 1).expand(batch, -1, heads, sizes.v_size).clone()
    values[:, max(sizes.n_kv) :] = POISON
    lengths = torch.tensor(sizes.n_kv).expand(batch, -1)
    return Probe(name, demand, _call(q, k, values, lengths, sizes, device, **options))


def _asking(probe: Probe, key: int) -> Probe:
    """A probe whose every query is due this key's value."""
    call = probe.call
    v = call.v[:, key].double().repeat_interleave(call.shape.ratio, 1)[:, None]
    out = v.expand(-1, call.shape.rows, -1, -1)
    return replace(probe, out=out, keys=torch.full(call.q.shape[:3], key, device=call.q.device))


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    sizes: Sizes,
    device: torch.device | str,
    *,
    strided: bool = False,
    **options: Any,
) -> Call:
    q, k, v = (x.to(sizes.dtype).to(device) for x in (q, k, v))
    if strided:
        k, v = _head_by_head(k), _head_by_head(v)
    kv_len = lengths.to(torch.int32).contiguous().to(device)
    return checked_call(q, k, v, kv_len=kv_len, scale=sizes.scale, path=sizes.path, **options)


def _head_by_head(x: torch.Tensor) -> torch.Tensor:
    """The same [B, S, H, D] in another memory order, beginning 2 elements into its memory."""
    b, s, h, d = x.shape
    memory = x.new_full((x.numel() + 2,), POISON)
    view = memory[2:].view(b, h, s, d).transpose(1, 2)
    view.copy_(x)
    return view
