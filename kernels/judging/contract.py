"""What the contract asks for and serving engines never do: a row that sees no key.

Such a row is 0, with an lse of -inf. A kernel that does not promise it (a user's, an engine's, by
`Capabilities.zero_for_empty_rows`) and gives NaN there is right wherever anybody calls it: a named finding,
which makes it `broken` only where that is asked for (`--strict`). So is NaN in keys that no row sees, which a
page that was another's may hold: 0 * NaN is NaN.
"""

from __future__ import annotations

import math

import torch

from verify.kernels.errors import KernelFailure
from verify.kernels.heads import Heads
from verify.kernels.judging.families import draw
from verify.kernels.judging.hidden_keys import HeldUnseen
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.probes import ProbeFailure
from verify.kernels.kernel import Kernel
from verify.kernels.merge import Part, empty_part


def empty_row_sentence(spec: str, got: str) -> str:
    """The finding, in words."""
    return (
        f"{spec}: contract: a row that sees no key (n_kv = 0) gives {got}, 0 with an lse of -inf is due;"
        " serving engines never ask for one, so it is no fault here (--strict makes it one)"
    )


def hidden_sentence(spec: str, held: HeldUnseen, got: str) -> str:
    """What is said of a kernel whose result shows what hidden keys hold."""
    return (
        f"{spec}: contract: {held.what} reach its result{got}; {held.promise}, so it is no fault here"
        " (--strict makes it one)"
    )


def of_empty_rows(failures: list[ProbeFailure]) -> tuple[list[ProbeFailure], list[ProbeFailure]]:
    """Failures of rows that see no key, and the others."""
    empty = [f for f in failures if f.n_kv == 0 and f.row >= 0]
    return empty, [f for f in failures if f not in empty]


def empty_row_finding(kernel: Kernel, *, device: torch.device | str = "cpu") -> str | None:
    """Asks a kernel for a row that sees no key beside one that sees some: the sentence if it is not right."""
    size = (kernel.capabilities().k_sizes or (64,))[0]
    sizes = InputSizes(n_kv=(3, 0), heads=Heads.grouped(kv=1, ratio=1, k_size=size, v_size=size), edges=())
    try:
        result = kernel.run(draw("gaussian", sizes, 0, device=device))
    except KernelFailure as failure:
        return None if failure.kind == "unsupported" else empty_row_sentence(kernel.spec, str(failure))
    out, lse = result.out[0, 1], result.lse[0, 1]
    if bool((out != 0).any()):
        return empty_row_sentence(kernel.spec, f"{float(out[out != 0][0]):.3g}")
    if kernel.capabilities().lse and not bool((lse == -math.inf).all()):
        return empty_row_sentence(kernel.spec, f"an lse of {float(lse[lse != -math.inf][0]):.3g}")
    return None


def empty_merge_finding(kernel: Kernel, *, device: torch.device | str = "cpu") -> str | None:
    """Asks a merge of others for two parts that see no key: the sentence if it does not give one."""
    merge = kernel.merger()
    if merge is None or not kernel.merges_pairs:
        return None
    nothing = empty_part(Part(torch.zeros(1, 1, 2, device=device), torch.zeros(1, 1, device=device)))
    merged = merge([nothing, nothing])
    if not bool(merged.out.any()) and bool(torch.isneginf(merged.lse).all()):
        return None
    got = f"{float(merged.out[0, 0, 0]):.3g} with an lse of {float(merged.lse[0, 0]):.3g}"
    return empty_row_sentence(kernel.spec, f"{got} where both its parts are empty")
