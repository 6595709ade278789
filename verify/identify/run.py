"""What `verify identify` is asked for, checked, and done."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from verify.identify.regimes import LONGEST, LONGEST_CUDA, Identified, identify, lengths_up_to
from verify.identify.told import contradictions
from verify.kernels.plans.shapes import shape_named
from verify.kernels.registry import build_kernel
from verify.machine.command_line import parse_lengths
from verify.machine.errors import UsageError

# Nothing could be read off the kernel.
EXIT_NOT_IDENTIFIABLE = 3


@dataclass
class IdentifyOutcome:
    """found: what was seen; contradictions: what the kernel states otherwise, in sentences."""

    found: Identified
    contradictions: list[str]
    device: str
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 0 if self.found.readings else EXIT_NOT_IDENTIFIABLE


def run_identify(
    spec: str,
    *,
    shape: str,
    n_kv: str,
    n_q: str,
    sequences: int,
    regimes: str,
    seconds: float,
    device: torch.device,
    tell: Callable[[str], None],
) -> IdentifyOutcome:
    """Raises UsageError, SpecError."""
    if regimes not in ("quick", "full"):
        raise UsageError(f"--regimes {regimes}: expected quick or full")
    if sequences < 1:
        raise UsageError(f"--sequences {sequences}: expected at least 1")
    if not seconds > 0:
        raise UsageError(f"--seconds {seconds}: expected more than 0")
    try:
        tokens = sorted({int(part) for part in n_q.split(",")})
    except ValueError:
        tokens = [0]
    if tokens[0] < 1:
        raise UsageError(f"--n-q {n_q}: expected query tokens from 1, comma between")
    named = shape_named(shape)
    if named.v_in_k:
        raise UsageError(
            f"--shape {shape}: values lie in the keys there, and cannot be chosen apart from them"
        )
    longest = LONGEST_CUDA if device.type == "cuda" else LONGEST
    lengths = parse_lengths(n_kv) if n_kv else lengths_up_to(longest)
    kernel = build_kernel(spec)
    try:
        found = identify(
            kernel,
            lengths,
            heads=named.heads,
            n_qs=tokens,
            batch=sequences,
            device=str(device),
            seconds=math.inf if regimes == "full" else seconds,
            full=regimes == "full",
            tell=tell,
        )
        odd = contradictions(kernel, found, named.heads)
    finally:
        kernel.close()
    # What it says of itself until somebody reads it is answered here.
    answered = kernel.until_read if found.readings else []
    notes = [note for note in kernel.notes if note not in answered]
    return IdentifyOutcome(found, odd, str(device), notes)
