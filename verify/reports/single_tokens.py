"""How many query tokens a call had, in words: no share of the text stands for calls that were not made."""

from __future__ import annotations

from collections.abc import Iterator

from verify.arms.records import CoverageRecord
from verify.ppl.record import AloneRecord, PairRecord, PplRun
from verify.reports.templating import interval, is_known


def tokens_words(line: CoverageRecord) -> str:
    """The T of a line of `what ran`, or that it does not enter; pages and sequences where a call had them."""
    said = f"T = {line.tokens_a_call}" if line.tokens_a_call else "rows as if alone"
    said += f", {line.sequences} sequences a call" if line.sequences > 1 else ""
    return said + (f", pages of {line.page} keys" if line.page else "")


def changed_words(run: PplRun, pair: PairRecord, of: str, where: str = "") -> str:
    """Which share of the tokens went through the changed plan, and in calls of how many tokens.

    of: what they are called; where: at which n_kv.
    """
    said = f"{pair.coverage:.1%} of {of} went through the changed plan{where}"
    lines = [x for x in run.coverage if x.arm == pair.candidate and x.path == pair.path]
    many = sorted({x.tokens_a_call for x in lines if x.tokens_a_call is not None and x.tokens_a_call > 1})
    if not many:
        return said
    said += f", in calls of {' and '.join(map(str, many))} tokens"
    found = next((x for x in run.alone if x.arm == pair.candidate), None)
    if pair.path != "decode":
        return said
    if found is None:
        return f"{said}; one query token a call (T = 1) was not asked"
    return f"{said}; one query token a call (T = 1) was asked of {_share(found)} of the attention rows"


def _share(found: AloneRecord) -> str:
    share = found.calls / max(found.rows, 1)
    return f"{found.calls} ({share:.2g} of {found.rows})" if share < 0.001 else f"{share:.1%}"


def single_token_sentences(run: PplRun) -> Iterator[str]:
    """What single tokens showed, arm by arm."""
    total = sum(run.speed.seconds.values())
    for found in run.alone:
        said = (
            f"{found.arm}, one query token a call (T = 1, B = 1): {found.calls} calls, at least"
            f" {found.least} a layer and regime that is scored, n_kv {found.n_kv_min} to {found.n_kv_max}"
        )
        if is_known(found.seconds) and total:
            said += f"; {found.seconds / total:.1%} of the run's time"
        if found.left_out:
            said += f", for which {found.left_out} more were left out"
        said += f"; other bits than in calls of many tokens in {found.other_bits}"
        if is_known(found.against_many):
            said += f", rms error {found.against_many:.3g} times theirs"
        if found.errors.max_budget_ratio:
            said += f", err/budget {found.errors.max_budget_ratio:.2g}"
        each = [
            f"{one.ratio:.3g} ({interval(one.ratio_ci)}) to n_kv {one.n_kv}"
            + (f" for {one.heads}" if one.heads else "")
            for one in found.regimes
            if one.word != "equal"
        ]
        if each:
            said += f"; rms error over the baseline's {', '.join(each)}"
        yield said
