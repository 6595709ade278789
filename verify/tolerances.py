"""`verify.tolerance`: the number to write into someone's test.

found = verify.tolerance(my_kernel, "8/2x64", n_kv=512)
torch.testing.assert_close(out, exact, rtol=0, atol=found.of("gaussian").absolute)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from verify.given import kernel_of
from verify.identify.tolerance import SEEDS, Tolerances, tolerances_of
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.foreign.forms import Wanted
from verify.machine.devices import chosen_device, default_device
from verify.stated import stated_arithmetic

DEFAULT_FAMILIES = ("gaussian", "needles", "peaked", "rising")


def tolerance(
    fn: Callable[..., Any] | str = "eager",
    shape: str = "8/2x64",
    *,
    n_kv: int = 512,
    families: Sequence[str] = DEFAULT_FAMILIES,
    arithmetic: str | Arithmetic | None = None,
    seeds: int = SEEDS,
    device: str | torch.device | None = None,
) -> Tolerances:
    """How large the errors of a right kernel are, and what the gates of others see of a wrong one.

    fn: a kernel that is taken to be right: a callable as `check_attention` takes it, or a specification of
        `verify list` ("eager:p=f16,acc=f32,out=f16"). shape: "Hq/HkvxD" or a name. n_kv: keys of every row.
    families: kinds of inputs, names of `verify.families.names()`. arithmetic: what fn is known to do, as of
        `check_attention`; default: it is read off it where it states nothing.
    seeds: calls of 16 query tokens, each a draw. device: default cuda where there is one.

    Of each family (`Tolerances.of`): errors that 99.9 % of draws stay below and what the budget allows, as
    NMSE, relative, absolute and cosine; the smallest common factor that each gate of others sees.
    Raises UsageError, SpecError; KernelFailure where fn fails.

    >>> found = tolerance("eager:out=f16", "2/1x16", n_kv=64, families=["gaussian"], seeds=1)
    >>> of = found.of("gaussian")
    >>> 0 < of.absolute <= of.absolute_most < 0.01, of.draws
    (True, 16)
    """
    on = str(chosen_device(str(device) if device is not None else default_device()))
    kernel = kernel_of(fn, Wanted(), None if arithmetic == "identify" else stated_arithmetic(arithmetic))
    try:
        return tolerances_of(kernel, shape, n_kv, families, seeds=seeds, device=on)
    finally:
        kernel.close()
