"""Pictures that are not drawn: drawing them is a sixth of a run on a tiny model, writing them a third.

All that is worked out for a picture is: only matplotlib's axes are none, and the picture is blank. Tests that
are marked `pictures`, `slow` or `cuda` draw.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

import pytest

_BLANK = '<svg width="1" height="1"></svg>'


class _Nothing:
    """Takes every call, and gives what pictures ask axes for."""

    x0 = y0 = x1 = y1 = width = height = 0.5

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **how: object) -> _Nothing:
        return self

    def __getitem__(self, name: object) -> _Nothing:
        return self

    def get_xlim(self) -> tuple[float, float]:
        return 1.0, 10.0

    get_ylim = get_xlim

    def get_legend_handles_labels(self) -> tuple[list[object], list[str]]:
        return [], ["a line"]


class BlankPictures:
    """Takes the place of drawing, from now on, where `drawing` is not asked for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from matplotlib.figure import Figure

        self.draw = False
        axes, colorbar, savefig = Figure.add_axes, Figure.colorbar, Figure.savefig

        def add_axes(figure: Figure, *args: Any, **how: Any) -> Any:
            if self.draw:
                return axes(figure, *args, **how)
            blank.add(figure)
            return _Nothing()

        def add_colorbar(figure: Figure, *args: Any, **how: Any) -> Any:
            return colorbar(figure, *args, **how) if self.draw else _Nothing()

        def save(figure: Figure, to: IO[Any] | str | Path, *args: Any, **how: Any) -> None:
            if self.draw:
                savefig(figure, to, *args, **how)
            elif isinstance(to, io.StringIO):
                to.write(_BLANK)
            elif isinstance(to, io.BytesIO):
                to.write(b"blank")
            else:
                Path(to).write_text("blank")  # type: ignore[arg-type]

        all_axes, blank = Figure.axes.fget, WeakSet[Figure]()

        def axes_of(figure: Figure) -> Any:
            return [_Nothing()] if figure in blank else all_axes(figure)

        patch.setattr(Figure, "axes", property(axes_of))
        for name, does in (("add_axes", add_axes), ("colorbar", add_colorbar), ("savefig", save)):
            patch.setattr(Figure, name, does)

    @contextmanager
    def drawing(self, draw: bool = True) -> Iterator[None]:
        """Within it pictures are drawn."""
        before, self.draw = self.draw, draw
        try:
            yield
        finally:
            self.draw = before
