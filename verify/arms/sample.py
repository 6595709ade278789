"""The windows of a long text on which kernels are measured: in place, with frozen casts, and the floor arm.

Perplexity is taken over every window. What a kernel errs by itself is known well from some tens of them:
the distance ratio of 64 windows resolves a few percent, and a window that is measured costs twice another.
"""

from __future__ import annotations

# Tokens that are measured by default, and the fewest windows: enough for an interval over windows.
MEASURED_TOKENS, FEWEST_WINDOWS = 1 << 15, 16


def default_measured(n_ctx: int) -> int:
    """Windows of n_ctx tokens that are measured where nothing is said."""
    return max(MEASURED_TOKENS // n_ctx, FEWEST_WINDOWS)


class Sample:
    """Runs of `at_once` consecutive windows, as a device computes them together, spread evenly over the text.

    windows: of the whole text; measured: how many are wanted, rounded up to whole runs; 0: all.
    """

    def __init__(self, windows: int, *, measured: int = 0, at_once: int = 1) -> None:
        self._windows, self._at_once = windows, at_once
        runs = -(-windows // at_once)
        wanted = min(-(-measured // at_once), runs) if measured else runs
        # The middles of `wanted` equal parts of the text.
        self._ordinals = {(2 * i + 1) * runs // (2 * wanted): i for i in range(wanted)}

    def __contains__(self, window: int) -> bool:
        return window // self._at_once in self._ordinals

    def __len__(self) -> int:
        """Windows that are measured."""
        return sum(min(self._at_once, self._windows - run * self._at_once) for run in self._ordinals)

    @property
    def runs(self) -> int:
        return len(self._ordinals)

    def ordinal(self, window: int) -> int:
        """The number, among the runs that are measured, of the one that holds this window."""
        return self._ordinals[window // self._at_once]
