"""The words of reports and pages: what each means, and a page with those that it uses folded at its end.

docs/glossary.md is this list, for who reads the documentation; a test holds them together.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from html import escape
from typing import NamedTuple

from markupsafe import Markup


class Word(NamedTuple):
    """A word, or words that are told of together."""

    name: str
    means: str
    forms: tuple[str, ...] = ()  # regular expressions of what stands for it in a report; none: the name


GLOSSARY = (
    Word("PPL", "perplexity: exp of the mean NLL of the scored tokens; lower is a better guess"),
    Word("NLL", "negative log-likelihood of the token that came, in nats"),
    Word("r", "query heads that read one KV head", (r"r(?= = \d)",)),
    Word("n_kv", "keys that a row sees"),
    Word("n_q", "query tokens in a call"),
    Word("row", "one query token of one sequence", ("rows?",)),
    Word(
        "decode, several, prefill",
        "one query token a call; the newest 2 to 16, as speculation has them; a whole prompt",
        ("decode", "prefill"),
    ),
    Word(
        "head groups",
        "how many of the r query heads one program handles; `heads=split` is the powers of two that sum to"
        " r, largest first (12: 8+4, 3: 2+1)",
        ("head groups?",),
    ),
    Word(
        "KV parts",
        "pieces of the key range that are computed apart and merged, none smaller than a tile of 64 keys",
        ("KV parts?",),
    ),
    Word("plan", "head groups and KV parts of a row: a rule of its own n_kv", ("plans?",)),
    Word("policy", "the plan that a version of an engine chooses", ("policy", "policies")),
    Word("exact", "float64 softmax(QK)V, the oracle"),
    Word(
        "floor",
        "exact attention with one rounding of noise: what the smallest change does to a model",
        ("floors?",),
    ),
    Word(
        "baseline, candidate",
        "what a change is compared with; the change",
        ("baseline", "candidates?"),
    ),
    Word("control", "the baseline a second time: it must have the same bits"),
    Word(
        "arm",
        "one pass of the model with one kernel: exact, floor, baseline, control, candidate or noise",
        ("arms?",),
    ),
    Word(
        "budget",
        "the most that rounding can be off by, derived for each element from the kernel's arithmetic;"
        " an error beyond it (err/budget above 1) is a bug",
        ("budgets?",),
    ),
    Word(
        "expected size",
        "what rounding is off by as a rule, likewise derived; rms/expected is the error's root mean square"
        " over it",
        ("expected size", "expected"),
    ),
    Word("rms ratio", "the candidate's root mean square error over the baseline's, on the same inputs"),
    Word("gain", "how much too long results are, 0 if they are not: sum <err, o> / sum <o, o>"),
    Word("KLD", "divergence of an arm's next-token distribution from `exact`'s, in nats a token"),
    Word(
        "casts frozen",
        "all roundings but the kernel's own held fixed: the part of a divergence that the kernel itself"
        " makes",
    ),
    Word(
        "distance",
        "how far an arm is from exact: its KLD with casts frozen, in a diff the error of its results; the"
        " distance ratio is the candidate's over the baseline's",
        ("distance ratio", "distance"),
    ),
    Word("top-1", "the most likely next token; a change of it shows in greedy text"),
    Word(
        "stratum",
        "one length, one family of inputs, heads that differ: what is compared as one",
        ("stratum", "strata"),
    ),
    Word(
        "family",
        "a kind of inputs: needles, peaked rows, one sign, near overflow, ...",
        ("family", "families"),
    ),
    Word("law", "two results that exact arithmetic makes equal", ("laws?",)),
    Word("probe", "inputs whose result is known to the bit", ("probes?",)),
)

# A heading tells where one is, code is to be copied, and a picture has its caption.
_UNLINKED = {"svg", "code", "pre", "a", "h1", "h2", "summary"}
# No line ends within an option.
_OPTION, _WHOLE = re.compile(r"(?<![\w-])--[a-z][\w-]*"), r'<span class="option">\g<0></span>'
_TAG = re.compile(r"(<[^>]+>)")
_OF = [(form, word) for word in GLOSSARY for form in word.forms or (re.escape(word.name),)]


def _cased(form: str) -> str:
    """At the beginning of a sentence too; PPL and KV parts are in one spelling only, and r is none of R."""
    return f"(?i:{form})" if form == form.lower() and not form.startswith("r(?") else form


# A group each, the longer form of a word first: "distance ratio" is one.
_FORMS = re.compile("|".join(rf"(?<![\w-])({_cased(form)})(?![\w-])" for form, _ in _OF))


def glossary_screen(width: int = 78) -> str:
    """What `verify help words` prints."""
    indent = " " * 4
    told = (
        textwrap.fill(word.means, width, initial_indent=indent, subsequent_indent=indent) for word in GLOSSARY
    )
    return "\n".join(f"{word.name}\n{means}" for word, means in zip(GLOSSARY, told, strict=True))


def glossary_table() -> str:
    """The table of docs/glossary.md."""
    rows = "\n".join(f"| {word.name} | {word.means} |" for word in GLOSSARY)
    return f"| word | meaning |\n|---|---|\n{rows}\n"


def with_words(body: str) -> Markup:
    """A page's HTML whose words lead, each where it first stands, to their meanings folded at its end.

    It works from a file on a disk: nothing is fetched, and a browser opens a folded part that a link leads
    into.

    >>> print(with_words("<p>no gain; a <code>law</code></p>").partition("<details")[0].strip())
    <p>no <a class="word" href="#word-gain" title="how much too long results are, 0 if they are not: \
sum &lt;err, o&gt; / sum &lt;o, o&gt;">gain</a>; a <code>law</code></p>
    """
    used: dict[str, Word] = {}
    inside: list[str] = []

    def linked(found: re.Match[str]) -> str:
        assert found.lastindex is not None
        word = _OF[found.lastindex - 1][1]
        if word.name in used:
            return found.group()
        used[word.name] = word
        means = escape(word.means)
        return f'<a class="word" href="#{_anchor(word)}" title="{means}">{found.group()}</a>'

    pieces = []
    for piece in _TAG.split(body):
        if piece.startswith("<"):
            _enter_or_leave(piece, inside)
            pieces.append(piece)
        else:
            pieces.append(piece if inside else _FORMS.sub(linked, _OPTION.sub(_WHOLE, piece)))
    return Markup("".join(pieces) + _folded(used))


def _enter_or_leave(tag: str, inside: list[str]) -> None:
    name = re.sub(r"[^\w].*", "", tag.lstrip("</"), flags=re.DOTALL)
    if name not in _UNLINKED:
        return
    if tag.startswith("</"):
        inside.remove(name)
    elif not tag.endswith("/>"):
        inside.append(name)


def _anchor(word: Word) -> str:
    return "word-" + re.sub(r"\W+", "-", word.name)


def _folded(used: Mapping[str, Word]) -> str:
    if not used:
        return ""
    rows = "".join(
        f'<dt id="{_anchor(word)}">{word.name}</dt><dd>{_told(word.means)}</dd>\n'
        for word in GLOSSARY
        if word.name in used
    )
    return f'\n<details><summary>Words</summary>\n<dl class="words">\n{rows}</dl>\n</details>\n'


def _told(means: str) -> str:
    """Escaped, what is in backquotes as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(means))
