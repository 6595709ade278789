"""Measurements of `verify bench` as a table, sentences and a plot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from verify.bench import BenchResult, Measurement
from verify.machine.jsontext import to_json_text
from verify.machine.terminal import console_on, print_table_on
from verify.reports.tables import Column, table_of


class BenchScreen:
    """Results go to `to`, and what has been measured to stderr as it is."""

    def __init__(self, to: TextIO) -> None:
        self.to = to

    def begins(self, machine: str, read_gb_s: float) -> None:
        print(f"{machine}: reads {read_gb_s:.0f} GB/s", file=self.to, flush=True)

    def measured(self, one: Measurement) -> None:
        said = one.failed or f"{one.us:.1f} us"
        print(f"  {one.shape} n_kv {one.n_kv} {one.spec}: {said}", file=sys.stderr, flush=True)

    def outcome(self, result: BenchResult) -> None:
        """The table, where each kernel pays, and what must be known of them."""
        table(result.measurements, self.to)
        for line in crossover_lines(result.crossovers):
            print(line, file=self.to)
        for note in sorted({note for m in result.measurements for note in m.notes}):
            print(f"note: {note}", file=self.to)

    def written(self, files: Sequence[Path]) -> None:
        print(f"written: {', '.join(map(str, files))}", file=self.to)


def write_result(result: BenchResult, folder: Path) -> list[Path]:
    """`bench.json` and a plot, `bench.svg`; returns their paths."""
    files = [folder / "bench.json", folder / "bench.svg"]
    files[0].write_text(to_json_text(result.to_json()))
    plot(result.measurements, result.bandwidth_gb_s["read"], files[1])
    return files


def table(found: Sequence[Measurement], to: TextIO) -> None:
    """A row a shape, length and kernel."""
    columns: list[Column | str] = [
        Column("shape", "words"),
        "n_kv",
        Column("kernel", "words"),
        *("us", "GB/s", "of read bandwidth"),
        Column("launched", "words"),
    ]
    rows = []
    for m in found:
        figures = ["failed", "", "", m.failed or ""]
        if m.failed is None and m.us is not None and m.gb_s is not None and m.share is not None:
            figures = [f"{m.us:.1f}", f"{m.gb_s:.1f}", f"{m.share:.1%}", m.launched]
        rows.append([m.shape, str(m.n_kv), m.spec, *figures])
    print_table_on(console_on(to), table_of(columns, rows))


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
