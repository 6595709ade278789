"""What `verify sweep` prints and draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from verify.engines.plans import Setting
from verify.engines.sweep import COLUMNS, Column, ColumnComparison, FittedLine, SplitStart, medians
from verify.engines.sweep_log import SweepLog
from verify.kernels.plans.policy import Policy
from verify.reports.tables import print_table


def print_times(logs: Sequence[SweepLog], compared: Sequence[ColumnComparison], to: TextIO) -> None:
    """A row a depth: times of every file, and their ratios to the first's."""
    names = ["N_KV"]
    columns: list[dict[int, str]] = []
    for column, name in COLUMNS.items():
        for log in logs:
            times = medians(log, column)
            if times:
                names.append(f"{name} {log.label}")
                columns.append({n: f"{t:.3f}" for n, t in times.items()})
        for c in compared:
            if c.column == column:
                names.append("ratio")
                columns.append({n: f"{r:.4f}" for n, r in zip(c.depths, c.ratios, strict=True)})
    depths = sorted({row.n_kv for log in logs for row in log.rows})
    print_table(names, [[str(n), *(c.get(n, "") for c in columns)] for n in depths], to, words=0)
    for log in logs:
        repeats = len(log.rows) - len({row.n_kv for row in log.rows})
        if repeats:
            print(f"{log.label}: {repeats} rows are repeats; medians are shown", file=to)


def note_lines(logs: Sequence[SweepLog], pairs: Sequence[tuple[SweepLog, SweepLog]]) -> list[str]:
    """What was left out of each log, and which logs are compared with none."""
    lines = [f"{log.label}: {note}" for log in logs for note in log.notes]
    for log in logs:
        if len(logs) > 1 and not any(log in pair for pair in pairs):
            pp, tg = log.work
            lines.append(f"{log.label}: other work (PP {pp}, TG {tg}) or other depths: compared with none")
    return lines


def line_text(label: str, column: Column, line: FittedLine) -> str:
    """The fitted line of one file in one sentence; the slope by 1000 cached tokens."""
    return (
        f"{label}: {COLUMNS[column]} = {line.a:.2f} s ({line.a_low:.2f} to {line.a_high:.2f})"
        f" + {1e3 * line.b:.4f} s ({1e3 * line.b_low:.4f} to {1e3 * line.b_high:.4f}) per 1000 cached tokens"
    )


def compared_lines(c: ColumnComparison) -> list[str]:
    """What the ratio of one file does, in sentences."""
    name = f"{COLUMNS[c.column]} {c.label} / {c.against}"
    lines = [f"{name}: mean {c.mean:.4f} (99 % interval {c.mean_low:.4f} to {c.mean_high:.4f})"]
    change = c.change
    if change is None:
        lines.append(f"{name}: too few depths for a change point, or no difference at all")
    elif change.believed:
        before = [r for n, r in zip(c.depths, c.ratios, strict=True) if n < change.n_kv]
        off = max(abs(r - 1) for r in before)
        lines.append(
            f"{name}: change point at N_KV = {change.n_kv}: within {off:.1%} of 1 below,"
            f" {change.first - 1:+.1%} there, {change.last - 1:+.1%} at {c.depths[-1]}"
            f" ({100 * change.by_chance:.1g}% of noise shows as much; BIC {change.bic:.0f} below a line's)"
        )
    else:
        depth, ratio = c.peak
        last = c.depths[-1]
        later = [r for n, r in zip(c.depths, c.ratios, strict=True) if n > depth]
        back = min(later, key=lambda r: abs(r - 1)) if later else ratio
        after = "" if depth == last else f" and falls again, to {back:.3f}"
        lines.append(
            f"{name}: no change point; the ratio peaks at {ratio:.3f} at N_KV = {depth}{after}"
            f" (the best candidate, {change.n_kv}: {'; '.join(change.reasons)})"
        )
    if c.slower:
        lines.append(f"{name}: significantly slower")
    return lines


def policy_lines(
    policy: Policy, setting: Setting, starts: Sequence[SplitStart], compared: Sequence[ColumnComparison]
) -> list[str]:
    """Whether the changes of generation's speed lie where a policy changes its plan."""
    where = (
        f"{policy.name} on {setting.shape.name}, {setting.gpus} GPUs, split mode {setting.split_mode},"
        f" {setting.kv_heads_a_gpu} KV heads a GPU"
    )
    if not starts:
        return [f"{where}: one plan at every length; a change of speed has another cause"]
    lines = [
        f"{where}: from n_kv {s.stretch.padded} on {s.stretch.name}, before {s.before.name}" for s in starts
    ]
    rows = {s.row for s in starts}
    for c in compared:
        if c.column != "t_tg" or c.change is None or not c.change.believed:
            continue
        at = c.change.n_kv
        if at in rows:
            lines.append(
                f"{c.label}: T_TG changes at N_KV = {at}: this is where"
                f" {setting.kv_heads_a_gpu} KV heads a GPU start the split"
            )
        else:
            expected = (
                ", ".join(str(r) for r in sorted(r for r in rows if r is not None)) or "none of its rows"
            )
            lines.append(
                f"{c.label}: T_TG changes at N_KV = {at}, and the policy's plan at {expected}:"
                " the split does not explain it"
            )
    return lines


def plot(
    logs: Sequence[SweepLog], compared: Sequence[ColumnComparison], starts: Sequence[SplitStart], path: Path
) -> None:
    """Speed against N_KV above, ratios of times below; generation left, prompt processing right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    for (column, name), work, (speed, ratio) in zip(COLUMNS.items(), ("tg", "pp"), axes.T, strict=True):
        for log in logs:
            tokens = {row.n_kv: getattr(row, work) for row in log.rows}
            times = medians(log, column)
            if not times:
                continue
            speed.plot(list(times), [tokens[n] / t for n, t in times.items()], marker="o", label=log.label)
        for c in compared:
            if c.column != column:
                continue
            (drawn,) = ratio.plot(c.depths, c.ratios, marker="o", label=f"{c.label} / {c.against}")
            if c.change is not None and c.change.believed:
                ratio.axvline(c.change.n_kv, linestyle=":", color=drawn.get_color(), label="change point")
        ratio.axhline(1, color="gray", linewidth=1)
        for s in starts if column == "t_tg" else ():
            ratio.axvline(s.stretch.padded, linestyle="--", color="gray", label=s.stretch.name)
        speed.set(title="generation" if column == "t_tg" else "prompt processing", ylabel="tokens / s")
        ratio.set(xlabel="N_KV", ylabel=f"ratio of {name}")
        speed.legend(fontsize="small")
        if compared:
            ratio.legend(fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)
