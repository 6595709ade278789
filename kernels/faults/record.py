"""What is written down about a fault and about a clean variant. `fault` writes it beside what errs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from verify.kernels.call import AttentionPath
from verify.kernels.kernel import Kernel
from verify.kernels.plans.plan import Plan

if TYPE_CHECKING:
    from verify.kernels.faults.caches import OverCache
    from verify.kernels.faults.tile_kernel import TileKernel

Build = Callable[[], Kernel]
_NO_SIZES: Mapping[str, Any] = {}


class Fault(NamedTuple):
    """A known bug of a kernel."""

    name: str  # unique
    # One sentence.
    what: str
    # Issues or pull requests where it was seen, or `emulated`.
    references: tuple[str, ...]
    # The plan that it lives in, as in a specification.
    plan: str
    build: Build  # makes the kernel
    # What it cannot be there without.
    needs: Literal["", "cuda"] = ""
    # The probes that show it: the standard ones, or the one beyond 2^31 elements alone.
    probes: Literal["standard", "far offsets"] = "standard"
    # Of a fault of how calls are made, else empty: families that show it.
    families: tuple[str, ...] = ()
    paths: tuple[AttentionPath, ...] = ("decode",)  # on which they do
    sizes: Mapping[str, Any] = _NO_SIZES  # what of their sizes (`InputSizes`) it takes


class PlanFault(NamedTuple):
    """A known bug of a rule for cutting calls up. name; what: one sentence; references: see `Fault`; plan:
    options under which it shows; breaks: the plan of options, made the wrong one."""

    name: str
    what: str
    references: tuple[str, ...]
    plan: str
    breaks: Callable[[Plan], Plan]


class CacheFault(NamedTuple):
    """A known bug of a kernel over a cache. name; what: one sentence; references: see `Fault`; cache: one
    under which it shows; kind: of `caches.OverCache`, built with a specification and `cache=`."""

    name: str
    what: str
    references: tuple[str, ...]
    cache: str
    kind: type[OverCache]


class Variant(NamedTuple):
    """A correct kernel that rounds in its own way. name; what: one sentence; build; without: families of
    inputs that it is not made for (an accumulator in float16 cannot hold sums near 65504)."""

    name: str
    what: str
    build: Build
    without: tuple[str, ...] = ()


# In the order in which their modules declare them.
declared: list[Fault] = []
Kind = TypeVar("Kind", bound="type[TileKernel]")


def fault(
    name: str,
    what: str,
    *references: str,
    needs: Literal["", "cuda"] = "",
    probes: Literal["standard", "far offsets"] = "standard",
    families: tuple[str, ...] = (),
    paths: tuple[AttentionPath, ...] = ("decode",),
    sizes: Mapping[str, Any] = _NO_SIZES,
    **options: int | tuple[int, ...],
) -> Callable[[Kind], Kind]:
    """Declares a subclass of `TileKernel`, built with these options, as a known fault."""
    written = [f"{key}={'+'.join(map(str, x)) if isinstance(x, tuple) else x}" for key, x in options.items()]
    plan = ",".join(written) or "kv=1"

    def declare(kind: Kind) -> Kind:
        def build() -> Kernel:
            return kind(name, **options)  # type: ignore[arg-type]

        declared.append(
            Fault(
                name=name,
                what=what,
                references=references or ("emulated",),
                plan=plan,
                build=build,
                needs=needs,
                probes=probes,
                families=families,
                paths=paths,
                sizes=sizes,
            )
        )
        return kind

    return declare
