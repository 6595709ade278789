"""Where `verify.kernels`, `verify.model` and `verify.data` lie when nobody installed them.

The checkout has the folders `kernels/`, `model/` and `data/` at its top level, beside `verify/`; a wheel has
them inside the package. In a checkout a finder maps exactly these three names to their folders. To put the
whole top level on `verify.__path__` would be wrong: `import verify.tests` or a second `verify.verify` would
work."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder

# ruff: noqa: PTH100, PTH112, PTH113, PTH118, PTH120, PTH123
# Nothing slow is imported here, pathlib neither: until the program's `main` is there, an interrupt is a
# traceback.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

FLOORS = ("kernels", "model", "data")
# The line of pyproject.toml that no other project has.
_OURS = 'name = "fa-verify"'


class FloorFinder:
    """A finder of `sys.meta_path` for the three floors of one checkout, and for nothing else."""

    def __init__(self, top: str) -> None:
        self.top = top

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, floor = name.rpartition(".")
        return PathFinder.find_spec(name, [self.top]) if package == "verify" and floor in FLOORS else None


def find_floors() -> None:
    """Let the floors be found where this is a checkout of ours; do nothing in an installed package."""
    package = os.path.dirname(os.path.abspath(__file__))
    if os.path.isdir(os.path.join(package, "kernels")):
        return
    if any(isinstance(finder, FloorFinder) for finder in sys.meta_path):
        return
    top = os.path.dirname(package)
    if is_ours(top):
        # In front: an editable install of another checkout has a finder of its own for these names.
        sys.meta_path.insert(0, FloorFinder(top))


def is_ours(top: str) -> bool:
    """Whether a folder holds this project's own pyproject.toml and the three floors."""
    try:
        with open(os.path.join(top, "pyproject.toml"), encoding="utf-8") as file:
            ours = any(line.strip() == _OURS for line in file)
    except (OSError, ValueError):
        return False
    return ours and all(os.path.isfile(os.path.join(top, floor, "__init__.py")) for floor in FLOORS)
