"""Asking laws in tests, and subjects that no specification names: faults, the flash kernel interpreted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from verify.kernels.cache_types import parse_cache
from verify.kernels.call import Call
from verify.kernels.faults import PlanFault
from verify.kernels.faults.caches import OverCache
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.foreign.function_kernel import FunctionKernel
from verify.kernels.kernel import Kernel
from verify.kernels.plans.spec import Spec, parse_plan
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.stored import held
from verify.laws import Law, Subject, subject_of
from verify.laws.cases import Problem
from verify.laws.law import Options
from verify.laws.run import kept_examples, run_law

CACHE = "q8_0"


def assert_keeps(law: Law, subject: Subject, *, examples: int | None = None) -> None:
    """The law holds, unless the kernel says that it lacks what it needs; else the shrunk case and what was
    found are the message."""
    due = "holds" if law.not_applicable(subject) is None else "not applicable"
    result = run_law(law, subject, examples=examples, database=kept_examples())
    assert result.state == due, f"{law.name} of {subject.spec}: {result.reason}: {result.case}"


def _plan_options(options: Options) -> dict[str, str]:
    return {key: value for key, value in options.items() if key != "cache"}


def tile_subject(build: Callable[[], Kernel]) -> Subject:
    """A fault or a clean variant that is a `TileKernel`; its own plan stays where options leave it open."""
    kernel = build()
    assert isinstance(kernel, TileKernel)
    own = kernel.plan

    def plan(options: Options):  # type: ignore[no-untyped-def]
        asked = parse_plan(Spec(kernel.spec, "tile", "", _plan_options(options)))
        return replace(
            own,
            heads=asked.heads if "heads" in options else own.heads,
            kv=asked.kv if "kv" in options else own.kv,
            block=asked.block if "block" in options else own.block,
        )

    def variant(options: Options) -> Kernel:
        other = copy.copy(kernel)
        other.plan = plan(options)
        if "cache" in options:
            run = other.run
            other.held = lambda call: _cached(call, options["cache"])  # type: ignore[method-assign]
            other.run = lambda call: run(other.held(call))  # type: ignore[method-assign]
        return other

    has = replace(kernel.capabilities(), caches=(CACHE,), ratios=own.ratios)
    return Subject(
        spec=kernel.spec, kernel=kernel, variant=variant, capabilities=has, merge=kernel.merger(), plan=plan
    )


def _cached(call: Call, cache: str) -> Call:
    one = parse_cache(cache).at(call.layer)
    return call if one.as_given else held(call, one)


def cache_subject(kind: type[OverCache], cache: str) -> Subject:
    """A kernel over a cache, right or with a fault, which is asked for this cache alone."""
    plain = TileKernel("tile")

    def variant(options: Options) -> Kernel:
        return kind("tile", cache=parse_cache(options.get("cache", "f16"))) if "cache" in options else plain

    has = replace(plain.capabilities(), caches=(cache,), plans=False, head_groups=False)
    return Subject(spec="tile", kernel=plain, variant=variant, capabilities=has, merge=None, plan=None)


def plan_subject(fault: PlanFault) -> Subject:
    """`eager` whose plans are broken."""
    return subject_of("eager").with_plans(fault.breaks)


def function_subject(function: Callable[..., Any]) -> Subject:
    """A function of this process whose sums are stated to be float32."""
    kernel = FunctionKernel(function, acc="f32")
    kernel.run(Problem().call())  # shows whether it returns an lse
    return kernel_subject(kernel)


def kernel_subject(kernel: Kernel) -> Subject:
    """A kernel that no specification names, and that has no options."""
    return Subject(
        spec=kernel.spec,
        kernel=kernel,
        variant=lambda _: kernel,
        capabilities=kernel.capabilities(),
        merge=None,
        plan=None,
    )


def flash_subject(device: torch.device | str = "cpu", **options: str) -> Subject:
    """The flash kernel itself: on the CPU it is interpreted."""
    built: dict[tuple[tuple[str, str], ...], Kernel] = {}

    def plan(given: Options):  # type: ignore[no-untyped-def]
        return parse_plan(Spec("flash", "flash", "", _plan_options({**options, **given})))

    def variant(given: Options) -> Kernel:
        key = tuple(sorted(given.items()))
        if key not in built:
            built[key] = FlashKernel(
                "flash", TileOptions(plan=plan(given)), cache=parse_cache(given.get("cache", "f16"))
            )
        return built[key]

    kernel = variant({})
    return Subject(
        spec="flash",
        kernel=kernel,
        variant=variant,
        capabilities=kernel.capabilities(),
        merge=kernel.merger(),
        plan=plan,
        device=torch.device(device),
    )
