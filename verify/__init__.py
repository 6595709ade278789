"""Evidence that a changed attention kernel is still right: a library, commands, verdicts and reports.

    import verify

    verify.check_attention(my_kernel).raise_for_verdict()   # a kernel: inputs, verdict
    verify.assert_attention(q, k, v, out, causal=True)      # tensors at hand

`__all__` is what is public; names are loaded with what they need when they are first asked for. In a checkout
the floors that it stands on, `verify.kernels`, `verify.model` and `verify.data`, lie beside this folder, in
an installed package inside it; the name is the same.
"""

from __future__ import annotations

from importlib import import_module

from verify.checkout import find_floors

# Not that of `typing`, which takes as long to load as all else here: an interrupt meanwhile is a traceback.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from verify import families, laws
    from verify.at_hand import ExactAttention, assert_attention, budget, exact_attention, merge
    from verify.call_options import CallOptions
    from verify.check import AttentionMismatch, Report, WorstCase, check_attention
    from verify.families import DrawnInputs
    from verify.identify.tolerance import FamilyTolerance, Tolerances
    from verify.kernels.budget.arithmetic import Arithmetic
    from verify.kernels.budget.bound import Budget
    from verify.kernels.errors import SpecError
    from verify.machine.errors import UsageError
    from verify.reference import reference_logits
    from verify.tolerances import tolerance

__version__ = "0.1.0"
# Of what is public: one more when a name or a parameter goes or changes its meaning; new ones only add to it.
API_VERSION = 1
__all__ = [
    "API_VERSION",
    "Arithmetic",
    "AttentionMismatch",
    "Budget",
    "CallOptions",
    "DrawnInputs",
    "ExactAttention",
    "FamilyTolerance",
    "Report",
    "SpecError",
    "Tolerances",
    "UsageError",
    "WorstCase",
    "__version__",
    "assert_attention",
    "budget",
    "check_attention",
    "exact_attention",
    "families",
    "laws",
    "merge",
    "reference_logits",
    "tolerance",
]
# Where each of them is.
_PLACES = {
    "Arithmetic": "verify.kernels.budget.arithmetic",
    "AttentionMismatch": "verify.check",
    "Budget": "verify.kernels.budget.bound",
    "CallOptions": "verify.call_options",
    "DrawnInputs": "verify.families",
    "ExactAttention": "verify.at_hand",
    "FamilyTolerance": "verify.identify.tolerance",
    "Report": "verify.check",
    "SpecError": "verify.kernels.errors",
    "Tolerances": "verify.identify.tolerance",
    "UsageError": "verify.machine.errors",
    "WorstCase": "verify.check",
    "assert_attention": "verify.at_hand",
    "budget": "verify.at_hand",
    "check_attention": "verify.check",
    "exact_attention": "verify.at_hand",
    "merge": "verify.at_hand",
    "reference_logits": "verify.reference",
    "tolerance": "verify.tolerances",
}
# Modules that are public as they are.
_MODULES = ("families", "laws")

find_floors()


def __getattr__(name: str) -> Any:
    """Public names, loaded with what they need when they are first asked for."""
    if name in _MODULES:
        return import_module(f"verify.{name}")
    if name in _PLACES:
        found = getattr(import_module(_PLACES[name]), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
