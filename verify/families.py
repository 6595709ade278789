"""Inputs on which attention kernels differ: as tensors, and as strategies of hypothesis.

    inputs = verify.families.draw("needles", "8/2x64", n_kv=300)
    out = my_kernel(inputs.q, inputs.k, inputs.v, ...)

Random normal numbers give every key the same weight and hide almost every fault. A family puts the weight,
the running maximum, the magnitudes or an option of the call where kernels go wrong; a probe is an input whose
right answer is known to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from verify.diff.inputs import DiffSettings, sizes_of_cell
from verify.diff.probing import PROBES
from verify.kernels.call import AttentionPath, Call
from verify.kernels.errors import nearest
from verify.kernels.foreign.forms import CALL_FORMS
from verify.kernels.judging.families import CALLS, FAMILIES, FORMS
from verify.kernels.judging.families import draw as draw_call
from verify.kernels.judging.probes import probe_makers
from verify.machine.errors import UsageError

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

# Of the draws of a strategy; smaller ones come first.
LENGTHS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 130, 300)
SHAPES = ("1/1x16", "2/1x32", "4/2x64", "6/1x64")
# Kinds of numbers, then kinds and forms of calls.
_KNOWN = FAMILIES | CALLS | FORMS
# Only its plan's cuts matter, where inputs lie at them: none is known of a function.
_ANY_FUNCTION = "py:mine.py::attend"


class DrawnInputs(NamedTuple):
    """One call's tensors, in the order of dimensions bshd."""

    q: torch.Tensor  # [B, T, Hq, Dk]
    k: torch.Tensor  # [B, S, Hkv, Dk]
    v: torch.Tensor  # [B, S, Hkv, Dv]
    kv_len: torch.Tensor  # [B, T] int32: keys that each row sees; what lies beyond is poison, and finite
    scale: float  # of the logits
    # sliding_window, softcap, sinks [Hq] or alibi_slopes [Hq], where the family has one; block_table,
    # cu_seqlens, mask or keys of a form: then q, k, v and kv_len are as it has them (docs/contract.md).
    options: dict[str, Any]


def names() -> tuple[str, ...]:
    """The families, the plainest first; at the end kinds of calls, and forms that not every kernel takes.

    >>> names()[:3]
    ('gaussian', 'needles', 'gaps')
    >>> names()[-5:]
    ('far-pages', 'no-tokens', 'tree', 'unlike-rows', 'key-list')
    """
    return tuple(_KNOWN)


def summary(family: str) -> str:
    """What a family is, in a few words. Raises UsageError for one that is not known.

    >>> summary("peaked")
    'a few keys hold all the weight'
    """
    return _KNOWN[_known(family)].summary


def draw(
    family: str,
    shape: str = "4/2x64",
    *,
    n_kv: int = 300,
    rows: int = 32,
    seed: int = 0,
    path: AttentionPath = "decode",
    dtype: str = "f16",
    baseline: str = "flash",
    device: str | torch.device = "cpu",
    n_q: int = 0,
    sequences: int = 1,
) -> DrawnInputs:
    """The tensors that `check_attention` and `verify diff` draw; the same bits on every device.

    shape: "Hq/HkvxD" or a name. n_kv: keys of the longest row; rows: T, at least 2; kinds of calls have a few
    of their own. path: "decode" (every row sees n_kv keys, the second 37 fewer), "prefill" or "several" (one
    more key a row). dtype: "f16", "bf16", "f32". baseline: inputs that lie where plans cut lie where its plan
    does. n_q: T on the paths prefill (default rows) and several (default 4, at most 16). sequences: B.

    Raises UsageError for an unknown family, SpecError for a shape that cannot be read.

    >>> x = draw("needles", "4/2x16", n_kv=40, rows=2)
    >>> x.q.shape, x.kv_len.tolist(), x.q.dtype
    (torch.Size([1, 2, 4, 16]), [[40, 3]], torch.float16)
    >>> draw("softcap", "4/2x16", n_kv=40, rows=2).options
    {'softcap': 5.0}
    """
    settings = _settings(
        shape, n_kv, rows=rows, path=path, dtype=dtype, baseline=baseline, n_q=n_q, sequences=sequences
    )
    sizes = sizes_of_cell(settings, shape, n_kv, _known(family))
    return _inputs(draw_call(family, sizes, seed, device=device))


def probe(
    name: str,
    shape: str = "4/2x64",
    *,
    n_kv: int = 300,
    path: AttentionPath = "decode",
    dtype: str = "f16",
    baseline: str = "flash",
    device: str | torch.device = "cpu",
) -> DrawnInputs:
    """The tensors of a probe, by the name that a report gives it ("last key", "window 1", "constant V", ...).

    Arguments as of `draw`. Raises UsageError for a probe that there is not at this shape.

    >>> x = probe("last key", "4/2x16", n_kv=40)
    >>> x.q.shape, x.kv_len.tolist()
    (torch.Size([1, 1, 4, 16]), [[40]])
    """
    settings = _settings(shape, n_kv, rows=2, path=path, dtype=dtype, baseline=baseline)
    known = []
    for make in probe_makers(sizes_of_cell(settings, shape, n_kv, PROBES), device=device):
        made = make()
        if made.name == name:
            return _inputs(made.call)
        known.append(made.name)
    raise UsageError(
        f"probe {name!r}: there is none of this name at {shape}, {n_kv} keys{nearest(name, known)} (known:"
        f" {', '.join(known)})"
    )


def strategy(
    families: tuple[str, ...] | None = None,
    *,
    lengths: tuple[int, ...] = LENGTHS,
    shapes: tuple[str, ...] = SHAPES,
    dtypes: tuple[str, ...] = ("f16",),
    paths: tuple[AttentionPath, ...] = ("decode",),
) -> SearchStrategy[DrawnInputs]:
    """A strategy of hypothesis for the tensors of a call; what fails shrinks to few keys, heads and rows.

    families: default those without an option of the call. lengths: keys of the longest row.
    Raises UsageError for an unknown family.

    >>> from hypothesis import given, settings
    >>> @settings(max_examples=5, database=None, deadline=None)
    ... @given(strategy(("gaussian", "peaked"), lengths=(1, 17)))
    ... def shapes_fit(x):
    ...     assert x.k.shape[1] >= int(x.kv_len.max())
    >>> shapes_fit()
    """
    from hypothesis import strategies as st

    plain = tuple(
        name for name in FAMILIES if not {"sinks", "window", "softcap", "alibi"} & {*name.split("+")}
    )
    chosen = [_known(name) for name in families or plain]

    def made(family: str, shape: str, n_kv: int, rows: int, seed: int, dtype: str, path: Any) -> DrawnInputs:
        return draw(family, shape, n_kv=n_kv, rows=rows, seed=seed, dtype=dtype, path=path)

    return st.builds(
        made,
        st.sampled_from(chosen),
        st.sampled_from(shapes),
        st.sampled_from(sorted(lengths)),
        st.integers(2, 4),
        st.integers(0, 999),
        st.sampled_from(dtypes),
        st.sampled_from(paths),
    )


def _known(family: str) -> str:
    if family not in _KNOWN:
        raise UsageError(
            f"family {family!r}: not known{nearest(family, _KNOWN)} (known: {', '.join(_KNOWN)})"
        )
    return family


def _settings(shape: str, n_kv: int, **asked: Any) -> DiffSettings:
    return DiffSettings(
        shapes=(shape,), n_kvs=(n_kv,), families=(), candidates=(_ANY_FUNCTION,), device="cpu", **asked
    )


def _inputs(call: Call) -> DrawnInputs:
    options = {
        name: x
        for name in ("sliding_window", "softcap", "sinks", "alibi_slopes", *CALL_FORMS)
        if (x := getattr(call, name)) is not None
    }
    return DrawnInputs(q=call.q, k=call.k, v=call.v, kv_len=call.kv_len, scale=call.scale, options=options)
