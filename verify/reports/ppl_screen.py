"""What `verify ppl` shows: progress on a terminal, the running line, the table, the verdict in one line."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from rich.progress import Progress
from rich.table import Table

from verify.arms.records import ModelRecord, TensorParallelRecord
from verify.judge.run_verdict import VOID
from verify.kernels.said import visible
from verify.machine.terminal import console_on, counted, on_terminal, print_table_on, say
from verify.model.runner import Progress as Step
from verify.ppl.evidence.foresight import foresight
from verify.ppl.evidence.judged_calls import steady_sentence
from verify.ppl.perplexity import final_line, running_line
from verify.ppl.record import CorpusRecord, PairRecord, PplRun
from verify.ppl.runfolder import PAGE
from verify.reports.caches import COLUMNS, cache_rows
from verify.reports.path_alone import path_alone_sentence
from verify.reports.progress import Foretelling, progress_bar
from verify.reports.single_tokens import changed_words, single_token_sentences, tokens_words
from verify.reports.split_mode import split_mode_sentence
from verify.reports.tables import Column, table_of
from verify.reports.templating import is_known, says_something
from verify.reports.verdict_lines import print_verdict


class PplConsole:
    """Results go to `out`, progress and notices to stderr; with `--json` everything but the JSON does.

    silent: for a process that another speaks for.
    """

    def __init__(self, *, json: bool = False, silent: bool = False) -> None:
        self.silent = silent
        self.out: TextIO = sys.stderr if json else sys.stdout
        self._progress: Progress | None = None
        self._foretold = Foretelling()
        self._line_open = False

    def notice(self, text: str) -> None:
        if self.silent:
            return
        self._end_line()
        if self._progress is not None:
            # Above the bar.
            self._progress.console.print(f"verify: {text}", markup=False, highlight=False)
            return
        say(f"verify: {text}", to=sys.stderr)

    def started(
        self,
        model: ModelRecord,
        corpus: CorpusRecord,
        shares: TensorParallelRecord | None,
        notes: Sequence[str],
    ) -> None:
        if self.silent:
            return
        shared_out = split_mode_sentence(shares)
        say(
            f"model {visible(Path(model.path).name)}: {model.architecture}, {model.layers} layers,"
            f" {model.heads} heads over {model.kv_heads} KV heads (r = {model.ratio}),"
            f" head size {model.head_size}",
            *([shared_out] if shared_out else []),
            f"text {visible(corpus.name)}: {corpus.tokens} tokens,"
            f" {counted(corpus.windows, 'window')} of {corpus.n_ctx},"
            f" {corpus.scored_per_window} scored in each",
            foresight(corpus.measured_windows, corpus.scored_per_window),
            to=self.out,
        )
        for note in notes:
            self.notice(note)
        self.begin_bar()

    def begin_bar(self, of: str = "all") -> None:
        """One bar over all windows, where stderr is a terminal. of: what they are of."""
        self._foretold = Foretelling(of=of)
        bar = progress_bar()
        if not bar.disable:
            self._progress = bar
            bar.add_task("windows", total=None)
            bar.start()

    def progress(self, first: int, last: int, windows: int) -> Step:
        if self.silent:
            return _silent
        self._foretold.begins(first)

        def step(done: int, total: int) -> None:
            # The bar and its time are those of the whole run, whatever the groups are.
            so_far = first + (last - first) * done / total
            if self._progress is not None:
                what = f"windows {first + 1} to {last} of {windows}"
                task = self._progress.task_ids[0]
                self._progress.update(task, completed=so_far, total=windows, description=what)
            if said := self._foretold.said(so_far, windows):
                self.notice(said)

        return step

    def windows_done(self, first: int, running: list[float]) -> None:
        line = running_line(running, first)
        if self._progress is not None and on_terminal(self.out):
            # A bar that is drawn anew would write into a line that is not ended.
            self._progress.stop()
            # Folded between two windows, where the line is longer than the terminal's.
            say(line.replace(",[", ", ["), to=self.out)
            self._progress.start()
            return
        print(line, end="", file=self.out, flush=True)
        self._line_open = True

    def stop(self) -> None:
        if self._progress is not None:
            bar, self._progress = self._progress, None
            # A bar that an interrupt met while it began or ended cannot be ended: what follows must be said.
            with suppress(Exception):
                bar.stop()
        self._end_line()

    def outcome(self, run: PplRun, folder: Path) -> None:
        """The closing line of the baseline, the table, what ran, the verdict, and where the report lies."""
        self.stop()
        baseline = next(arm for arm in run.arms if arm.role == "baseline")
        corpus = run.corpus
        closing = final_line(baseline.perplexity, n_ctx=corpus.n_ctx, windows=corpus.windows)
        say(closing, to=self.out)
        console = console_on(self.out)
        print_table_on(console, _table(run))
        if of_caches := cache_rows(run):
            kinds = [
                Column(name, "words" if name in ("cache", "read back") else "figure") for name in COLUMNS
            ]
            print_table_on(console, table_of(kinds, of_caches))
        say(*_coverage(run), to=self.out)
        say(_read(run), *_pairs(run), to=self.out)
        several = len(run.pairs) > 1 and run.verdict != VOID
        reasons = [f"the gravest of {len(run.pairs)} pairs"] if several else run.reasons
        # What did not run belongs to the verdict itself.
        print_verdict(run.verdict, reasons, self.out, run.notes)
        print(f"report: {visible(str(folder / PAGE))}", file=self.out, flush=True)

    def _end_line(self) -> None:
        if self._line_open:
            print(file=self.out)
            self._line_open = False


def _silent(done: int, total: int) -> None:
    return None


def _table(run: PplRun) -> Table:
    columns: list[Column | str] = [
        *(Column("arm", "word"), Column("kernel", "words", min_width=12)),
        *("PPL", "ln PPL - baseline", "KLD to exact", "casts frozen", "KLD to baseline", "top-1 changes"),
    ]
    rows = []
    pairs = {pair.candidate: pair for pair in run.pairs}
    most = max(arm.tokens for arm in run.arms)
    for arm in run.arms:
        pair = pairs.get(arm.name)
        finite = pair is not None and is_known(pair.kld_mean)
        ppl = f"{arm.ppl:.4f} +/- {arm.ppl_se:.5f}" if arm.tokens == most else ""
        to_exact = "" if arm.role == "exact" else _kld(arm.kld_to_exact_mean)
        to_baseline = "0, bits equal" if arm.holds else ""
        row = (
            arm.name,
            f"{arm.spec} ({arm.calls})" if arm.calls else arm.spec,
            "failed" if arm.failure is not None else ppl,
            f"{pair.dlnppl:+.2e} +/- {pair.dlnppl_se:.1e}" if pair and finite else "",
            to_exact,
            _kld(arm.frozen.kld_to_exact_mean) if arm.frozen else "",
            f"{pair.kld_mean:.2e}" if pair and finite else to_baseline,
            f"{pair.top1_changes} of {pair.tokens}" if pair and pair.tokens else "",
        )
        rows.append(row)
    return table_of(columns, rows)


def _kld(nats: float) -> str:
    return "" if math.isnan(nats) else f"{nats:.2e}"


def _coverage(run: PplRun) -> list[str]:
    lines = ["what ran:"]
    for line in run.coverage:
        if line.arm.startswith("control"):
            continue
        groups = "+".join(map(str, line.head_groups)) or "not known"
        parts = line.parts or "not known"
        lines.append(
            f"  {line.arm}: {line.kernel}, head groups {groups}, KV parts {parts}, {tokens_words(line)},"
            f" {line.rows} attention rows, n_kv {line.n_kv_min} to {line.n_kv_max}"
        )
    lines += [f"  {said}" for said in single_token_sentences(run)]
    return lines + [path_alone_sentence(found) for found in run.path_alone]


def _read(run: PplRun) -> str:
    """How often the model was read, and how much of it."""
    groups = counted(run.speed.groups or 0, "group")
    read, size = run.speed.read_bytes / 1e6, run.model.bytes / 1e6
    windows = counted(run.speed.group_windows, "window")
    return f"read: {read:.0f} MB of a model of {size:.0f} MB, in {groups} of {windows}"


def _pairs(run: PplRun) -> list[str]:
    """Each pair's own verdict where there are several, and what would have shown."""
    lines = []
    for pair in [] if run.verdict == VOID else run.pairs:
        if len(run.pairs) > 1:
            lines.append(f"{pair.candidate}: {pair.verdict}: {'; '.join(pair.reasons)}")
        if pair.distance_ratio is not None:
            lines.append(_could_have_seen(run, pair))
    return lines


def _could_have_seen(run: PplRun, pair: PairRecord) -> str:
    """What this run would have seen of a pair."""
    least = pair.detectable_distance_ratio
    could = "no interval"
    if is_known(least):
        seen = f"a distance ratio from {least:.3g}" if says_something(least) else "no distance ratio"
        could = f"could have seen {seen}"
    calls = f"; {steady_sentence(pair.judged_calls)}" if pair.judged_calls is not None else ""
    return (
        f"{pair.candidate} {could}, on {pair.measured_tokens} tokens, about {pair.distance_scope};"
        f" {changed_words(run, pair, 'them')}{calls}"
    )
