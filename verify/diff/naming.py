"""Which known bug does it look like? What is wrong with a kernel, matched with the library of faults.

A kernel is run on a few small calls, and what is wrong with its results is written down as signs: in which
rows, heads and columns, by how much, which key one row is wrong about, whether by a common factor, what the
lse does. The same calls were run on every fault of `verify.kernels.faults`, under several plans. The likeness
of two kernels is the weight of the signs that both have over that of the signs that either has; a sign that
few faults have weighs more. Below `LIKE` nothing is named.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import torch

from verify.kernels.call import AttentionOutput, Call
from verify.kernels.capabilities import Capabilities
from verify.kernels.errors import KernelFailure
from verify.kernels.exact import exact_attention
from verify.kernels.faults import FAULTS
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.heads import Heads
from verify.kernels.judging.blame import RowWeights
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.probes import strided_one_hot
from verify.kernels.kernel import Kernel
from verify.kernels.numbers import FLOAT_TYPES

# Likeness from which on a fault is named; how many are. 0.48 is the most at which, under plans that the
# library does not hold, the right fault is among three in 95 %: 96.2 % of results in float32, 95.5 % in
# float16 (94.0 % at 0.5). Of kinds that are held out 77 and 81 % get no name there (61 % at 0.4). Measured by
# tests/verify/diff/test_naming.py.
LIKE, MOST = 0.48, 3
# A kernel whose errors are all tiny looks like many.
LIKE_IF_TINY = 0.8
# What is no sign, in median errors of the kernel: its rounding errs that much somewhere.
NOISE = 32
# Relative errors of a row and head that are told apart: 2^-12 is what float16 leaves, 2^-3 another result.
_STEPS = (2.0**-11, 2.0**-7, 2.0**-3)
# A share of an error that one explanation must have, squared.
_EXPLAINED = 0.9
# Plans under which each fault is run: KV parts, tiles, types of the result.
_PLANS: tuple[dict[str, int | str], ...] = (
    {"kv": 1}, {"kv": 2}, {"kv": 3}, {"kv": 4}, {"kv": 6}, {"block": 16}, {"block": 32}, {"block": 128},
    {"kv": 5}, {"block": 48}, {"kv": 3, "block": 32}, {"out": "f16"}, {"out": "f16", "kv": 2},
    {"out": "f16", "block": 32}, {"out": "bf16"}, {"out": "bf16", "kv": 2},
)  # fmt: skip
# What `benchmarks/fault_signs.py` writes.
STORED = "fault_signs.json"


Signs = frozenset[str]


class Likeness(NamedTuple):
    """A fault that a kernel looks like."""

    fault: str  # its name in the library
    what: str  # in a sentence
    likeness: float  # 0 to 1
    signs: int  # that both have
    of: int  # signs that the kernel has

    def __str__(self) -> str:
        return f"looks like: {self.what} (fault {self.fault}, {self.signs} of {self.of} signs)"


def looks_like(kernel: Kernel, device: torch.device | str = "cpu") -> list[Likeness]:
    """The known faults that a kernel is most like, at most three; none where it is like none."""
    seen = signs_of(kernel, device)
    return named(seen, asked_of(kernel.capabilities()), library())


class Known(NamedTuple):
    """A fault's signs under one plan."""

    fault: str
    what: str
    signs: Signs


def named(seen: Signs, asked: frozenset[str], known: Sequence[Known]) -> list[Likeness]:
    """The likest first. asked: calls that the kernel takes, and `lse` where it returns one: signs of others
    count for nobody."""
    if not seen:
        return []
    faults = {each.fault for each in known}
    having: Counter[str] = Counter()
    for sign, _ in {(sign, each.fault) for each in known for sign in each.signs}:
        having[sign] += 1

    def weight(signs: Signs | frozenset[str]) -> float:
        return sum(math.log((1 + len(faults)) / (1 + having[sign])) + 0.1 for sign in signs)

    best: dict[str, Likeness] = {}
    every: dict[str, list[float]] = {}
    for each in known:
        theirs = frozenset(sign for sign in each.signs if _call_of(sign) in asked and _is_asked(sign, asked))
        either = weight(seen | theirs)
        likeness = weight(seen & theirs) / either if either else 0.0
        every.setdefault(each.fault, []).append(likeness)
        if each.fault not in best or likeness > best[each.fault].likeness:
            best[each.fault] = Likeness(
                fault=each.fault, what=each.what, likeness=likeness, signs=len(seen & theirs), of=len(seen)
            )

    def rank(x: Likeness) -> tuple[float, float]:
        """Of two that are as like, the one that is so under more of its plans."""
        return -round(x.likeness, 3), -sum(every[x.fault]) / len(every[x.fault])

    tiny = all(step in ("tiny", "none") for step in (s.rpartition(":")[2] for s in seen if ":size:" in s))
    least = LIKE_IF_TINY if tiny else LIKE
    return [x for x in sorted(best.values(), key=rank)[:MOST] if x.likeness >= least]


def _call_of(sign: str) -> str:
    return sign.partition(":")[0]


def _is_asked(sign: str, asked: frozenset[str]) -> bool:
    return ":lse" not in sign or "lse" in asked


@cache
def library() -> tuple[Known, ...]:
    """The signs of every fault that shows here, under several plans, as `computed_library` found them."""
    stored = json.loads(files("verify.diff").joinpath(STORED).read_text(encoding="utf-8"))
    words, what = stored["signs"], {fault.name: fault.what for fault in FAULTS}
    return tuple(
        Known(name, what[name], frozenset(words[i] for i in signs))
        for name, each in stored["faults"].items()
        for signs in each
        if name in what
    )


def stored_form(known: Sequence[Known]) -> str:
    """The text of `STORED`: each sign once, and by number where it is met."""
    words = sorted({sign for each in known for sign in each.signs})
    number = {sign: i for i, sign in enumerate(words)}
    faults: dict[str, list[list[int]]] = {}
    for each in known:
        faults.setdefault(each.fault, []).append(sorted(number[sign] for sign in each.signs))
    lines = [f'"{name}": {json.dumps(each)}' for name, each in faults.items()]
    text = ",\n".join(lines)
    return f'{{"signs": {json.dumps(words)},\n"faults": {{\n{text}\n}}}}\n'


def computed_library(names: Sequence[str] | None = None) -> tuple[Known, ...]:
    """The same from the faults themselves; those of equal signs once. names: of some faults alone."""
    found: dict[tuple[str, Signs], Known] = {}
    for fault in FAULTS:
        if fault.needs or fault.probes != "standard" or (names is not None and fault.name not in names):
            continue
        first = fault.build()
        assert isinstance(first, TileKernel)
        for kernel in (first, *under_plans(first, _PLANS)):
            if signs := signs_of(kernel):
                found[fault.name, signs] = Known(fault.name, fault.what, signs)
    return tuple(found.values())


def under_plans(kernel: TileKernel, plans: Sequence[Mapping[str, Any]]) -> Iterator[TileKernel]:
    """The same fault under other plans, where it can be."""
    for plan in plans:
        options: dict[str, Any] = {"kv": kernel.plan.kv.value, "block": kernel.plan.block, **plan}
        if kernel.plan.kv.value > 1 and options["kv"] == 1:
            # What is wrong with a merge is not there without one.
            continue
        if kernel.plan.heads is not None:
            options["heads"] = kernel.plan.heads
        try:
            yield type(kernel)(kernel.spec, **options)
        except TypeError:
            # One that has a plan of its own.
            continue


@cache
def _calls(device: str) -> tuple[tuple[str, Call, AttentionOutput], ...]:
    """The small calls, and what is due: rows inside a tile, at its edge, one beyond, one key, none."""
    plain = InputSizes(n_kv=(193, 97, 64, 33, 1), heads=Heads(12, 2, 64, 64), edges=(64, 128))
    empty = replace(plain, n_kv=(97, 0))
    found = []
    for family in ("needles", "gaps", "peaked", "rising", "one-sign", "near-overflow"):
        found.append((family, draw(family, plain, 0, device=device)))
    for family in ("sinks", "window", "softcap", "alibi"):
        found.append((family, draw(family, replace(plain, n_kv=(193, 97)), 0, device=device)))
    found.append(("empty", draw("gaussian", empty, 0, device=device)))
    found.append(("window-empty", draw("window", replace(plain, n_kv=(193, 40)), 3, device=device)))
    found.append(("prefill", draw("needles", replace(plain, path="prefill"), 1, device=device)))
    found.append(("size-32", draw("needles", replace(plain, heads=Heads(12, 2, 32, 32)), 2, device=device)))
    found.append(("batch", draw("peaked", replace(plain, batch=2, n_kv=(130, 70)), 4, device=device)))
    found.append(("long", draw("gaussian", replace(plain, n_kv=(700, 257)), 5, device=device)))
    found.append(("strided", strided_one_hot(replace(plain, n_kv=(97,)), device=device).call))
    return tuple((name, call, exact_attention(call)) for name, call in found)


def asked_of(has: Capabilities) -> frozenset[str]:
    """Names of the calls that a kernel takes."""
    names = {name for name, call, _ in _calls("cpu") if not _refused(has, call)}
    return frozenset(names | ({"lse"} if has.lse else set()))


def _refused(has: Capabilities, call: Call) -> bool:
    return replace(has, strided=True).refuses(call) is not None


def signs_of(kernel: Kernel, device: torch.device | str = "cpu") -> Signs:
    """What is wrong with it, as signs `CALL:KIND:VALUE`. None where nothing is."""
    found: set[str] = set()
    ran: list[tuple[str, Call, AttentionOutput, AttentionOutput]] = []
    for name, call, due in _calls(str(device)):
        if _refused(kernel.capabilities(), call):
            continue
        try:
            ran.append((name, call, kernel.run(call), due))
        except KernelFailure as failure:
            if failure.kind != "unsupported":
                found.add(f"{name}:fails:{failure.kind}")
    errors = [(name, _relative(call, result, due, kernel)) for name, call, result, due in ran]
    every = torch.cat([x.flatten() for name, x in errors] or [torch.zeros(1)])
    usual, largest = float(every.nanmedian()), float(every.amax())
    # No less than what rounding a result to its type leaves of a row: 2^-9 of bfloat16.
    rounding = max((FLOAT_TYPES[kernel.result_type(call)].u for _, call, _, _ in ran), default=0.0)
    least = max(_STEPS[0], rounding)
    if largest >= _STEPS[1]:
        # Coarse types err everywhere, and that is no sign of a fault that errs much somewhere.
        least = min(max(least, NOISE * usual), _STEPS[2] / 2)
    for (name, call, result, due), (_, relative) in zip(ran, errors, strict=True):
        found |= {f"{name}:{sign}" for sign in _of_call(call, result, due, kernel, relative, least)}
    return frozenset(found)


def _relative(call: Call, result: AttentionOutput, due: AttentionOutput, kernel: Kernel) -> torch.Tensor:
    """Error over result [B, T, Hq]; infinite where it is not finite, 0 where a row is not its business."""
    relative = (result.out.double() - due.out).norm(dim=-1) / due.out.norm(dim=-1).clamp(min=1e-6)
    relative = torch.where(torch.isfinite(result.out).all(-1), relative, math.inf)
    if not kernel.capabilities().zero_for_empty_rows:
        nothing = (call.kv_len == 0)[..., None].expand_as(relative) & torch.isinf(due.lse)
        relative = torch.where(nothing, 0.0, relative)
    return relative


def _of_call(
    call: Call,
    result: AttentionOutput,
    due: AttentionOutput,
    kernel: Kernel,
    relative: torch.Tensor,
    least: float,
) -> Iterator[str]:
    """least: a relative error below which nothing is wrong."""
    error, broken = result.out.double() - due.out, torch.isinf(relative)
    if bool((relative > least).any()):
        yield f"size:{_step(float(relative.amax()))}"
        for n in call.kv_len.unique().tolist():
            own = relative[(call.kv_len == n)[..., None].expand_as(relative)]
            yield f"row {n}:{_step(float(own.amax())) if float(own.amax()) > least else 'none'}"
        finite = relative[torch.isfinite(relative)]
        wrong = relative > max(least, float(finite.amax()) / 8 if finite.numel() else 0.0)
        heads = wrong.flatten(0, 1).any(0)
        yield f"heads:{''.join('x' if h else '.' for h in heads.tolist())}"
        if bool(broken.any()):
            yield "not finite"
        yield from _where(call, error, relative, due, least)
    lse_error = result.lse.double() - due.lse
    if kernel.capabilities().lse:
        same = result.lse.double() == due.lse
        near = torch.isfinite(due.lse) & (lse_error.abs() <= 2.0**-9 * (1 + due.lse.abs()))
        off = ~same & ~near
        if bool(off.any()):
            ratio = (result.lse.double() / due.lse)[off]
            base2 = bool(((ratio * math.log(2.0) - 1).abs() < 0.01).all())
            kind = (
                "base 2"
                if base2
                else "not finite"
                if not bool(torch.isfinite(result.lse[off]).all())
                else "off"
            )
            yield f"lse:{kind}"
            if not base2:
                larger = bool((lse_error[off].nan_to_num(0.0) > 0).all())
                yield f"lse:{'larger' if larger else 'smaller'}"


def _step(x: float) -> str:
    """An error as one of a few words."""
    if not math.isfinite(x):
        return "not finite"
    return ("none", "tiny", "small", "large")[sum(x > step for step in _STEPS)]


def _where(
    call: Call, error: torch.Tensor, relative: torch.Tensor, due: AttentionOutput, least: float
) -> Iterator[str]:
    """Columns, a common factor, and the key that the worst row is wrong about."""
    finite = torch.where(torch.isfinite(relative), relative, -1.0)
    if float(finite.max()) <= least:
        return
    # The worst row of several keys, by its length first: a row of one key says little.
    lengths = call.kv_len[..., None].expand_as(relative)
    told = torch.where(lengths > 1, finite, -1.0)
    if float(told.max()) <= least:
        told = finite
    at = torch.unravel_index(told.argmax(), told.shape)
    b, t, h = (int(i) for i in at)
    wrong, exact = error[b, t, h], due.out[b, t, h]
    columns = wrong.abs() > 0.05 * wrong.abs().max()
    quarter = len(columns) // 4
    share = [bool(columns[i * quarter : (i + 1) * quarter].any()) for i in range(4)]
    yield f"columns:{''.join('x' if x else '.' for x in share)}"
    factor = float(wrong @ exact) / max(float(exact @ exact), 1e-300)
    left = float((wrong - factor * exact).square().sum()) / max(float(wrong.square().sum()), 1e-300)
    if left < 1 - _EXPLAINED:
        yield f"factor:{'up' if factor > 0 else 'down'} {_step(abs(factor))}"
    else:
        yield "factor:none"
    n = int(call.kv_len[b, t])
    if n > 1 and (key := _key(call, b, t, h, wrong, exact)):
        yield f"key:{key}"


def _key(call: Call, b: int, t: int, h: int, wrong: torch.Tensor, exact: torch.Tensor) -> str:
    """What one key explains, as a word: lost or twice, and which."""
    row, size, n = RowWeights(call, b, t, h), float(wrong.square().sum()), int(call.kv_len[b, t])
    away = row.v - exact
    for word, factor in (("lost", -row.p / (1 - row.p).clamp(min=1e-9)), ("twice", row.p / (1 + row.p))):
        left = (wrong - factor[:, None] * away).square().sum(-1) / max(size, 1e-300)
        key = int(left.argmin())
        if float(left[key]) < 1 - _EXPLAINED:
            place = "last" if key == n - 1 else "first" if key == 0 else "inside"
            return f"{place} {word}"
    if n < call.shape.keys:
        # One beyond the row: its weight is what the error says.
        kv = h // call.shape.ratio
        beyond = call.v[b, n, kv].double() - exact
        share = float(wrong @ beyond) / max(float(beyond @ beyond), 1e-300)
        if float((wrong - share * beyond).square().sum()) < (1 - _EXPLAINED) * size:
            return "beyond seen"
    return ""
