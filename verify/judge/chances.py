"""Chances and quantiles of the normal distribution and of Student's t, of numbers and of arrays.

They are scipy's, which takes longer to load than a small command needs in all: the first question loads it.
"""

from __future__ import annotations

from typing import Any


def load_chances() -> None:
    """For the start of what takes long: an installation without scipy is said before anything is measured."""
    from scipy import special  # noqa: F401


def student_below(x: Any, degrees: Any) -> Any:
    """The chance that Student's t of so many degrees of freedom is below x; a float for two of them."""
    from scipy import special

    return _plain(special.stdtr(degrees, x))


def student_quantile(chance: Any, degrees: Any) -> Any:
    """Below which Student's t is with that chance; a float for two of them."""
    from scipy import special

    return _plain(special.stdtrit(degrees, chance))


def normal_quantile(chance: float) -> float:
    """Below which a standard normal number is with that chance."""
    from scipy import special

    return float(special.ndtri(chance))


def shift_that_exceeds(critical: float, chance: float, degrees: float) -> float:
    """How far Student's t must be moved (its noncentrality) to exceed `critical` with that chance."""
    from scipy import special

    return float(special.nctdtrinc(degrees, 1 - chance, critical))


def _plain(found: Any) -> Any:
    return found if getattr(found, "ndim", 0) else float(found)
