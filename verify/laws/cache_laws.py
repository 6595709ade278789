"""Laws of caches: attention over what a cache holds, and proof that it holds what it is said to.

They are asked of kernels that take `cache=` in their specification, each over one of those that it states.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from verify.kernels.budget.bound import error_budget
from verify.kernels.cache_types import MAINLINE_BLOCK, parse_cache
from verify.kernels.call import Call
from verify.kernels.judging.figures import another_origin
from verify.kernels.judging.readback import look
from verify.kernels.numbers import FP8_TYPES, U_F32, type_of
from verify.laws.cases import Problem
from verify.laws.draws import problems
from verify.laws.law import Cases, LawBroken, Subject, laws, reads_no_cache
from verify.laws.tolerance import Seen, against_exact, agree, seen

OVER = "the kernel's own error budget (kernels/budget/bound.py), the cache's numbers taken as exact"
law = laws("cache", OVER, unless=reads_no_cache)


def over_caches(*, only: str = "", without: tuple[str, ...] = ()) -> Cases:
    """Problems with a cache; only: those whose text begins so; without: families."""

    def drawn(subject: Subject) -> SearchStrategy[Problem]:
        caches = [cache for cache in subject.capabilities.caches if cache.startswith(only)]

        def with_cache(problem: Problem, cache: str) -> Problem:
            least = MAINLINE_BLOCK if "rotate" in cache else parse_cache(cache).size_multiple
            return replace(
                problem,
                cache=cache,
                k_size=max(problem.k_size // least, 1) * least,
                v_size=max(problem.v_size // least, 1) * least,
            )

        families = ("near-overflow", *without)
        return st.builds(with_cache, problems(subject, without=families), st.sampled_from(caches))

    return drawn


def _call(problem: Problem, subject: Subject) -> Call:
    """The problem's call; keys that no row sees are like others: what a cache makes of 6e4 is not asked."""
    call = problem.call(subject.device)
    k, v = call.k.clone(), call.v.clone()
    for b, rows in enumerate(call.kv_len.tolist()):
        k[b, max(rows) :], v[b, max(rows) :] = 3.0, 3.0
    return replace(call, k=k, v=v)


@law("caches", over_caches())
def caches(subject: Subject, problem: Problem) -> float:
    """Attention over a cache is attention over the numbers that it holds."""
    kernel = subject.variant({"cache": problem.cache})
    return against_exact(kernel, _call(problem, subject), lse=subject.capabilities.lse)


def no_rotation(subject: Subject) -> str | None:
    """Of a law that asks for a rotated cache which holds numbers as they are."""
    if (why := reads_no_cache(subject)) is not None:
        return why
    rotated = any(cache.startswith("f16+rotate") for cache in subject.capabilities.caches)
    return None if rotated else "has no rotated cache in float16"


@law(
    "rotation",
    over_caches(only="f16+rotate=", without=("denormal", "tiny")),
    tolerance="both results' own error budgets, and one rounding of rotated keys and values",
    unless=no_rotation,
)
def rotation(subject: Subject, problem: Problem) -> float:
    """Q and K rotated, V rotated before it is kept and the result once more: only rounding changes."""
    call = _call(problem, subject)
    kernel, has_lse = subject.variant({"cache": problem.cache}), subject.capabilities.lse
    plain, result = seen(subject.variant({}), call), kernel.run(call)
    kind = type_of(call.q.dtype)
    u = U_F32 if kind is None or kind.name == "f32" else kind.u
    own = kernel.arithmetic_of(call)
    budget = error_budget(call, replace(own, u_k=own.u_k + u, u_v=own.u_v + u))
    lse = budget.lse if another_origin(call, result.lse, budget) else result.lse.double()
    turned = Seen(result.out.double(), lse, budget.bound, budget.lse_bound)
    return agree("rotated", plain, turned, lse=has_lse)


def no_fp8(subject: Subject) -> str | None:
    """Of a law about numbers that types of 8 bits do not have."""
    if (why := reads_no_cache(subject)) is not None:
        return why
    return None if _OF_RANGE & set(subject.capabilities.caches) else "has no cache of 8-bit floating point"


# Caches whose scale is 1, so that numbers beyond the type's range are there to be kept.
_OF_RANGE = set(FP8_TYPES)


def _of_range(subject: Subject) -> SearchStrategy[Problem]:
    kinds = sorted(_OF_RANGE & set(subject.capabilities.caches))
    return st.builds(
        lambda problem, cache, twist: replace(problem, cache=cache, twist=twist),
        problems(subject, only=["gaussian"]),
        st.sampled_from(kinds),
        st.sampled_from((9, -9, -16)),
    )


@law("cache-range", _of_range, unless=no_fp8)
def cache_range(subject: Subject, problem: Problem) -> float:
    """Values beyond the largest number of a type become that number, small ones its least number or 0."""
    call = _call(problem, subject)
    call = replace(call, v=call.v * 2.0**problem.twist)
    return against_exact(subject.variant({"cache": problem.cache}), call, lse=subject.capabilities.lse)


@law("cache-layers", over_caches(), tolerance=OVER)
def cache_layers(subject: Subject, problem: Problem) -> float:
    """A layer that is named has its own cache, and the layers beside it do not."""
    call = _call(problem, subject)
    text = problem.cache if "@" in problem.cache else f"{problem.cache}@1-1:f16"
    kernel = subject.variant({"cache": text})
    margins = [
        against_exact(kernel, replace(call, layer=layer), lse=subject.capabilities.lse) for layer in range(3)
    ]
    return max(margins)


@law(
    "cache-read-back",
    over_caches(),
    tolerance="2^-9 of a head's largest number; 2^-7 for results in bfloat16",
)
def cache_read_back(subject: Subject, problem: Problem) -> float:
    """Read key by key, a cache holds what its codec makes of each key."""
    call = _call(problem, subject)
    text = problem.cache
    kernel = subject.variant({"cache": text})
    margin = 0.0
    for layer in range(3) if "@" in text else (None,):
        found = look(kernel, replace(call, layer=layer))
        if (fault := found.fault) is not None:
            raise LawBroken(fault)
        margin = max(margin, *(x.asked / found.tolerance for x in (found.k, found.v) if x is not None))
    return margin
