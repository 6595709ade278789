"""What each verdict means to a person, what it does not say, and what to do next."""

from __future__ import annotations

import textwrap
from typing import NamedTuple


class VerdictWord(NamedTuple):
    """A verdict for people: its exit code, what it means, what it does not say, and what to do next."""

    code: int
    means: str
    not_said: str
    next_step: str


VERDICTS: dict[str, VerdictWord] = {
    "identical": VerdictWord(
        0,
        "every bit is equal, though another plan or kernel ran",
        "that other lengths, shapes or types are: it holds for what the run asked",
        "nothing",
    ),
    "round-off": VerdictWord(
        0,
        "the output differs, every error is within its budget, and the candidate is no farther from exact"
        " attention than the baseline by more than the margin",
        "that texts stay the same: a greedy text changes where two tokens are nearly tied",
        "merge it; quote the distance ratio with its interval",
    ),
    "improved": VerdictWord(
        0,
        "no fault, and significantly closer to exact attention than the baseline",
        "that perplexity falls: rounding moves it both ways",
        "merge it; say in the change that outputs move because they are more precise",
    ),
    "degraded": VerdictWord(
        1,
        "no fault, but significantly farther from exact attention than the baseline, by more than --margin",
        "that it is wrong: it may be the price of speed, such as a result in float16",
        "read at which lengths and inputs; --margin 2 accepts a price that you have decided to pay",
    ),
    "broken": VerdictWord(
        1,
        "NaN or Inf, an error beyond what rounding can make, a kernel that fails or is not steady: a bug",
        "which line of the kernel: the report names row, head and key",
        "run the command that the report gives for the worst element; verify props shrinks it to a few keys",
    ),
    "inconclusive": VerdictWord(
        3,
        "the path under test did not run, both specifications are the same, or there is too little data for"
        " the margin",
        "that the kernel is right",
        "do what the verdict's sentence asks for: another length, or as many more windows as it says",
    ),
    "void": VerdictWord(
        4,
        "nothing was measured: the control is not its baseline to the bit, or exact attention is not finite",
        "anything about the candidate",
        "look at the model and at the machine; verify doctor",
    ),
}


# Of logits and logprob files of two programs, beside which nothing exact stands.
VERDICTS_OF_FILES: dict[str, VerdictWord] = VERDICTS | {
    "identical": VerdictWord(0, "every number is equal", "that it is right", "nothing"),
    "round-off": VerdictWord(
        0,
        "the files differ by no more than they can hold, than a repeat does, or than you allow",
        "which of the two is nearer to exact attention",
        "quote the mean KLD with its interval",
    ),
    "improved": VerdictWord(
        0,
        "the second file predicts this text better, or lies nearer to exact attention, beyond chance",
        "why: verify ppl --against sets a file beside exact attention",
        "say in the change that outputs move, and by how much",
    ),
    "degraded": VerdictWord(
        1,
        "the second file predicts this text worse, or lies farther than you allow, or than the first from"
        " exact attention",
        "whether it is a bug: a coarser cache or quantised weights do that too",
        "lay it on a ladder of known changes: verify explain --logits A B -m MODEL.gguf",
    ),
    "broken": VerdictWord(
        1,
        "a record holds NaN or Inf, or a build fails in a window",
        "which operation made it",
        "look at the window and position that are named",
    ),
    "inconclusive": VerdictWord(
        3,
        "the files differ by more than they can hold, or there is nothing to compare",
        "that something is wrong: two files cannot say which is nearer to exact",
        "do what the verdict's sentence asks for, or lay it on a ladder: verify explain",
    ),
}

# Of laws: whether they hold for a kernel.
LAW_WORDS: dict[str, VerdictWord] = {
    "holds": VerdictWord(
        0,
        "no case that was tried breaks a law of attention",
        "that none does: cases are drawn at random, and rows are short",
        "verify diff, for errors at the lengths that matter",
    ),
    "broken": VerdictWord(
        1,
        "a law of attention does not hold: the kernel computes something else",
        "which line of the kernel: the smallest case that still breaks the law is below",
        "run the command below the law, or keep its test",
    ),
    "nothing shown": VerdictWord(
        3,
        "no law applies to this kernel",
        "that the kernel is right",
        "read why each law does not apply",
    ),
}

# Of a kernel nobody trusts.
JUDGE_WORDS: dict[str, VerdictWord] = VERDICTS | {
    "passed": VerdictWord(
        0,
        "errors are within their budgets, laws hold, and no way to look right without being it was caught",
        "that it is fast, or right for calls that were not tried",
        "verify ppl, for what it does to a model",
    ),
    "cheats": VerdictWord(
        1,
        "it looks right without being it: its results do not follow from its inputs as attention's do",
        "that this is on purpose",
        "read the check that caught it",
    ),
}

# Of an arithmetic that is read off a kernel.
IDENTIFY_WORDS: dict[str, VerdictWord] = {
    "identified": VerdictWord(
        0,
        "the arithmetic was read off the kernel's results, at the lengths that were asked",
        "that it is right: verify diff holds its errors against the budget of this arithmetic",
        "verify diff; a kernel that states nothing is held to what is read here",
    ),
    "contradicts itself": VerdictWord(
        0,
        "the kernel states another arithmetic than its results show",
        "which of the two was meant",
        "correct what is stated, or the kernel",
    ),
    "not identifiable": VerdictWord(
        3,
        "its results do not answer the questions that tell arithmetics apart",
        "that it is wrong",
        "verify props and verify diff, with its arithmetic stated by hand",
    ),
}

# Of speed logs.
SWEEP_WORDS: dict[str, VerdictWord] = {
    "slower": VerdictWord(
        1,
        "a file is significantly slower than the one it is compared with",
        "why: a change of plan shows as a change point at the length where it begins",
        "verify plan, for where each version changes its plan",
    ),
    "not slower": VerdictWord(
        0,
        "no file is significantly slower than the one it is compared with",
        "that the outputs are alike: speed says nothing of them",
        "verify engines, for what the outputs do",
    ),
}

# Of one kernel's perplexity, which nothing stands beside.
ONLY_WORDS: dict[str, VerdictWord] = {
    "measured": VerdictWord(
        0,
        "the perplexity of these models with this kernel; models on the same tokens are compared in pairs",
        "whether the kernel is right: perplexity does not see what a kernel errs by",
        "verify ppl --candidate SPEC, which sets a kernel beside exact attention",
    ),
}

_OF_COMMANDS = {
    "ppl --only": ONLY_WORDS,
    "props": LAW_WORDS,
    "judge": JUDGE_WORDS,
    "identify": IDENTIFY_WORDS,
    "sweep": SWEEP_WORDS,
    "kld": VERDICTS_OF_FILES,
    "logprobs": VERDICTS_OF_FILES,
}


def words_of(command: str) -> dict[str, VerdictWord]:
    """What the outcomes of a command mean."""
    return _OF_COMMANDS.get(command, VERDICTS)


def verdict_page(width: int = 80) -> str:
    """Every verdict with its exit code, its meaning and the next step, as text."""
    lines = []
    for name, word in VERDICTS.items():
        lines.append(f"{name} (exit code {word.code})")
        for label, text in (
            ("means", word.means),
            ("does not say", word.not_said),
            ("next", word.next_step),
        ):
            lines += textwrap.wrap(
                f"{label}: {text}",
                width - 2,
                initial_indent="  ",
                subsequent_indent="    ",
                break_on_hyphens=False,
            )
    lines.append("")
    lines.append("Exit code 2: bad input, one line says which.")
    lines.append("Exit code 128 + n: ended by signal n (130: Ctrl-C); what was finished is kept.")
    lines.append("Of several candidates the gravest verdict is the run's.")
    return "\n".join(lines)


def next_line(word: VerdictWord) -> str:
    """What to do now, one line for below a verdict."""
    return f"next: {word.next_step} (verify help verdicts)"
