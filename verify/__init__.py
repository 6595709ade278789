"""Evidence that a changed attention kernel is still right: commands, experiments, verdicts and reports.

`verify.kernels`, `verify.model` and `verify.data` are the floors that it stands on. In a checkout their
folders lie beside this one, in an installed package inside it; the name is the same.
"""

from typing import TYPE_CHECKING, Any

from verify.checkout import find_floors

if TYPE_CHECKING:
    from verify.reference import reference_logits

__version__ = "0.1.0"
__all__ = ["reference_logits"]

find_floors()


def __getattr__(name: str) -> Any:
    """Public names, loaded with what they need when they are first asked for."""
    if name == "reference_logits":
        from verify.reference import reference_logits

        return reference_logits
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
