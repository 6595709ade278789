"""What `verify ppl` shows: progress on a terminal, the running line, the table, the verdict in one line."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from verify.arms.arm import Arm
from verify.machine.terminal import console_on, counted, on_terminal, print_table_on
from verify.model.runner import Progress as Step
from verify.ppl.evidence import PairSummary
from verify.ppl.experiment import Experiment, Outcome
from verify.ppl.perplexity import Perplexity, final_line, running_line
from verify.reports.split_mode import split_mode_sentence


class PplConsole:
    """Results go to `out`, progress and notices to stderr; with `--json` everything but the JSON does.

    silent: for a process that another speaks for.
    """

    def __init__(self, *, json: bool = False, silent: bool = False) -> None:
        self.silent = silent
        self.out: TextIO = sys.stderr if json else sys.stdout
        self._progress: Progress | None = None
        self._task = None
        self._line_open = False

    def notice(self, text: str) -> None:
        if self.silent:
            return
        self._end_line()
        print(f"verify: {text}", file=sys.stderr)

    def started(self, experiment: Experiment) -> None:
        if self.silent:
            return
        sizes, windows = experiment.architecture.sizes, experiment.windows
        shared_out = split_mode_sentence(experiment.tensor_parallel)
        print(
            f"model {experiment.file.path.name}: {experiment.file.architecture}, {sizes.layers} layers,"
            f" {sizes.heads} heads over {sizes.kv_heads} KV heads (r = {sizes.ratio}),"
            f" head size {sizes.k_size}",
            *([shared_out] if shared_out else []),
            f"text {experiment.corpus.name}: {windows.n_tokens_total} tokens,"
            f" {counted(windows.n_windows, 'window')} of {windows.n_ctx},"
            f" {windows.scored_per_window} scored in each",
            sep="\n",
            file=self.out,
            flush=True,
        )
        for note in experiment.notes:
            self.notice(note)
        if on_terminal(sys.stderr):
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()

    def progress(self, first: int, last: int, windows: int) -> Step:
        if self._progress is None:
            return _silent
        bar = self._progress
        for task in bar.task_ids:
            bar.remove_task(task)
        task = bar.add_task(f"windows {first + 1} to {last} of {windows}", total=None)

        def step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return step

    def windows_done(self, first: int, running: list[float]) -> None:
        print(running_line(running, first), end="", file=self.out, flush=True)
        self._line_open = True

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._end_line()

    def outcome(self, experiment: Experiment, outcome: Outcome, folder: Path) -> None:
        """The closing line of the baseline, the table, what ran, the verdict, and where the report lies."""
        self.stop()
        baseline = next(arm for arm in outcome.arms if arm.arm.role == "baseline")
        line = final_line(
            baseline.perplexity, n_ctx=experiment.windows.n_ctx, windows=experiment.windows.n_windows
        )
        print(line, file=self.out)
        console = console_on(self.out)
        print_table_on(console, _table(outcome))
        for text in _coverage(outcome):
            console.print(text, soft_wrap=True)
        print(_read(outcome), file=self.out)
        for line in _verdict(outcome):
            print(line, file=self.out)
        print(f"report: {folder / 'report.html'}", file=self.out, flush=True)

    def _end_line(self) -> None:
        if self._line_open:
            print(file=self.out)
            self._line_open = False


def _silent(done: int, total: int) -> None:
    return None


def _table(outcome: Outcome) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("arm", no_wrap=True)
    table.add_column("kernel", overflow="fold", min_width=12)
    numbers = ("PPL", "ln PPL - baseline", "KLD to exact", "casts frozen", "KLD to baseline", "top-1 changes")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    pairs = {pair.candidate.name: pair for pair in outcome.pairs}
    most = max(summary.perplexity.tokens for summary in outcome.arms)
    for summary in outcome.arms:
        arm, ppl = summary.arm, summary.perplexity
        pair = pairs.get(arm.name)
        finite = pair is not None and not math.isnan(pair.kld_mean)
        table.add_row(
            arm.name,
            arm.spec,
            "failed" if arm.failed else _perplexity(ppl) if ppl.tokens == most else "",
            f"{pair.difference.mean:+.2e} +/- {pair.difference.se:.1e}" if pair and finite else "",
            "" if arm.role == "exact" or math.isnan(summary.kld_to_exact) else f"{summary.kld_to_exact:.2e}",
            "" if math.isnan(summary.frozen_kld) else f"{summary.frozen_kld:.2e}",
            f"{pair.kld_mean:.2e}" if pair and finite else ("0, bits equal" if _control_holds(arm) else ""),
            f"{pair.top1_changes} of {pair.tokens}" if pair and pair.tokens else "",
        )
    return table


def _perplexity(ppl: Perplexity) -> str:
    return f"{ppl.ppl:.4f} +/- {ppl.se:.5f}"


def _control_holds(arm: Arm) -> bool:
    found = arm.findings
    return arm.role == "control" and not arm.failed and found.attention_equal and found.logits_equal


def _coverage(outcome: Outcome) -> list[str]:
    lines = ["what ran:"]
    for line in outcome.run["coverage"]:
        if line["arm"].startswith("control"):
            continue
        groups = "+".join(map(str, line["head_groups"])) or "not known"
        parts = line["parts"] or "not known"
        lines.append(
            f"  {line['arm']}: {line['kernel']}, head groups {groups}, KV parts {parts},"
            f" {line['rows']} attention rows, n_kv {line['n_kv_min']} to {line['n_kv_max']}"
        )
    return lines


def _read(outcome: Outcome) -> str:
    """How often the model was read, and how much of it."""
    speed, model = outcome.run["speed"], outcome.run["model"]
    groups = counted(speed["groups"], "group")
    read, size = speed["read_bytes"] / 1e6, model["bytes"] / 1e6
    windows = counted(speed["group_windows"], "window")
    return f"read: {read:.0f} MB of a model of {size:.0f} MB, in {groups} of {windows}"


def _verdict(outcome: Outcome) -> list[str]:
    """The verdict in one line, then each pair's own where there are several, and what would have shown."""
    several = len(outcome.pairs) > 1 and outcome.verdict is not None
    reasons = [f"the gravest of {len(outcome.pairs)} pairs"] if several else outcome.reasons
    # What did not run belongs to the verdict itself, not below it.
    lines = [f"verdict: {outcome.verdict or 'void'}: {'; '.join([*reasons, *outcome.run['notes']])}"]
    for pair in outcome.pairs if outcome.verdict is not None else []:
        if several:
            decision = pair.decision
            lines.append(f"{pair.candidate.name}: {decision.verdict}: {'; '.join(decision.reasons)}")
        if pair.distance is not None:
            lines.append(_seen(pair))
    return lines


def _seen(pair: PairSummary) -> str:
    """What this run would have seen of a pair."""
    assert pair.distance is not None
    least = pair.distance.detectable
    could = f"could have seen a distance ratio from {least:.3g}" if math.isfinite(least) else "no interval"
    return (
        f"  {could}, on {pair.measured_tokens} tokens, about {pair.distance.scope};"
        f" {pair.coverage.tokens:.1%} of them went through the changed plan"
    )
