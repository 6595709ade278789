"""Measurements of `verify bench` as a table, sentences and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from verify.bench import Measurement
from verify.machine.terminal import console_on, print_table_on


def table(found: Sequence[Measurement], to: TextIO) -> None:
    """A row a shape, length and kernel."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    rows.add_column("shape", overflow="fold")
    rows.add_column("n_kv", justify="right", no_wrap=True)
    rows.add_column("kernel", overflow="fold")
    for name in ("us", "GB/s", "of read bandwidth"):
        rows.add_column(name, justify="right", no_wrap=True)
    rows.add_column("launched", overflow="fold")
    for m in found:
        if m.failed is not None or m.us is None or m.gb_s is None or m.share is None:
            rows.add_row(m.shape, str(m.n_kv), m.spec, "failed", "", "", m.failed or "")
            continue
        rows.add_row(
            m.shape, str(m.n_kv), m.spec, f"{m.us:.1f}", f"{m.gb_s:.1f}", f"{m.share:.1%}", m.launched
        )
    print_table_on(console_on(to), rows)


def crossover_lines(crossovers: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence a kernel: from which n_kv it pays, or that it never does."""
    lines = []
    for c in crossovers:
        speedups = ", ".join(f"{n_kv}: {ratio:.2f}x" for n_kv, ratio in sorted(c["speedup"].items()))
        pays = "never pays" if c["pays_from"] is None else f"pays from n_kv {c['pays_from']}"
        lines.append(f"{c['shape']}: {c['spec']} {pays} against {c['against']} ({speedups})")
    return lines


def plot(found: Sequence[Measurement], read_gb_s: float, path: Path) -> None:
    """GB/s against n_kv, a line a kernel, a panel a shape; the machine's read bandwidth dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(m.shape for m in found))
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(6 * len(shapes), 4), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        for spec in dict.fromkeys(m.spec for m in found):
            points = [(m.n_kv, m.gb_s) for m in found if (m.shape, m.spec) == (shape, spec) and m.gb_s]
            axis.plot([n for n, _ in points], [rate for _, rate in points], marker="o", label=spec)
        axis.axhline(read_gb_s, linestyle="--", color="gray", label="read bandwidth")
        axis.set(xscale="log", xlabel="n_kv", ylabel="GB/s of K and V", title=shape, ylim=(0, None))
        axis.legend(fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)
