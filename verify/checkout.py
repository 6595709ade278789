"""Where `verify.kernels`, `verify.model` and `verify.data` lie when nobody installed them.

The checkout has the folders `kernels/`, `model/` and `data/` at its top level, beside `verify/`; a wheel has
them inside the package. In a checkout a finder maps exactly these three names to their folders. To put the
whole top level on `verify.__path__` would be wrong: `import verify.tests` or a second `verify.verify` would
work."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

FLOORS = ("kernels", "model", "data")


class FloorFinder:
    """A finder of `sys.meta_path` for the three floors of one checkout, and for nothing else."""

    def __init__(self, top: Path) -> None:
        self.folders = {f"verify.{floor}": top / floor for floor in FLOORS}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = self.folders.get(name)
        if folder is None:
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def find_floors() -> None:
    """Let the floors be found where this is a checkout of ours; do nothing in an installed package."""
    package = Path(__file__).parent
    if (package / "kernels").is_dir() or any(isinstance(finder, FloorFinder) for finder in sys.meta_path):
        return
    if is_ours(package.parent):
        # In front: an editable install of another checkout has a finder of its own for these names.
        sys.meta_path.insert(0, FloorFinder(package.parent))


def is_ours(top: Path) -> bool:
    """Whether a folder holds this project's own pyproject.toml and the three floors."""
    try:
        project = tomllib.loads((top / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    named = project.get("project", {}).get("name") == "fa-verify"
    return named and all((top / floor / "__init__.py").is_file() for floor in FLOORS)
