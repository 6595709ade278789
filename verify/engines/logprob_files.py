"""Logprobs of the same tokens by two programs, brought side by side: rollout and trainer, decode and prefill.

A file is one of three kinds, by what it knows of each position:

    full       every token of the vocabulary: a logits file of llama-perplexity, or .npz with `logprobs` or
               `logits` [N, V] (or [sequences, N, V]) and `tokens` [N] (or [sequences, N])
    top        the most likely tokens, and the one that came: JSON (`token_records`)
    sampled    the one that came

Two files are compared on what both know.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from verify.engines.conclusion import resolution_of
from verify.engines.divergence import check_same_text, score_pair
from verify.engines.logits_file import MAGIC, LogitsFile
from verify.engines.token_records import (
    LEAST_LOG,
    MOST_LOG,
    Name,
    TokenRecord,
    check_same_prompt,
    read_records,
)
from verify.machine.errors import UsageError

Kind = Literal["full", "top", "sampled"]
KINDS: tuple[Kind, ...] = ("full", "top", "sampled")
# What is left outside the listed tokens is not less than this: sums of printed digits may exceed 1.
_LEAST_REST = 1e-12


class Whole(Protocol):
    """A file that knows the whole vocabulary. rows: natural logarithms [n, V] of a sequence's positions."""

    def rows(self, sequence: int) -> np.ndarray: ...


@dataclass
class LogprobFile:
    """One file of logprobs, by sequence."""

    path: str  # as it was named
    kind: Kind  # what it holds of each position
    names: list[list[Name]]  # tokens
    chosen: list[np.ndarray]  # ln p of these tokens, [n]
    # By sequence: the most likely tokens of each position; the whole vocabulary; tokens before the first.
    top: list[list[dict[Name, float]]] | None = None
    whole: Whole | None = None  # the whole vocabulary, where it has it
    before: list[int] | None = None  # number of tokens before the first
    records: list[TokenRecord] | None = None  # as they were read, where they were
    logits: LogitsFile | None = None  # the logits file, where it is one

    @property
    def tokens(self) -> int:
        return sum(map(len, self.names))

    @cached_property
    def listed(self) -> int:
        """How many most likely tokens every position lists. Engines add the one that came where it is not."""
        return min((len(x) for position in self.top or () for x in position), default=0)

    def most_likely(self, sequence: int, position: int) -> dict[Name, float]:
        """The `listed` most likely tokens of a position."""
        assert self.top is not None
        found = self.top[sequence][position]
        if len(found) <= self.listed:
            return found
        return dict(sorted(found.items(), key=lambda x: -x[1])[: self.listed])


class Columns(NamedTuple):
    """Two files over the same tokens; lists by sequence, arrays [n]. p: the first file's, q: the second's."""

    kind: Kind  # what both files know
    # ln q - ln p of the token that came.
    moved: list[np.ndarray]
    # Estimates of the divergence KL(p, q), a position: exact where the kind is full, else without bias where
    # the tokens were sampled from p.
    divergence: list[np.ndarray]
    # A lower bound of it, from the listed tokens and one lump of all others; None for sampled tokens.
    bound: list[np.ndarray] | None
    # Probability that p gives to tokens that are not listed in both; None likewise.
    hidden: list[np.ndarray] | None
    # What two logits files' 16 bits could make of the mean divergence; None of other files.
    resolution: float | None = None


def open_logprobs(path: str) -> LogprobFile:
    """Raises UsageError naming the file, the record and the field."""
    try:
        with Path(path).open("rb") as f:
            head = f.read(len(MAGIC))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    if head == MAGIC:
        return _of_logits_file(path)
    if head[:2] == b"PK" or path.endswith(".npz"):
        return _of_arrays(path)
    return _of_records(path)


def check_same_tokens(a: LogprobFile, b: LogprobFile) -> None:
    """Raises UsageError with the first difference."""
    if a.logits is not None and b.logits is not None:
        check_same_text(a.logits, b.logits)
    if len(a.names) != len(b.names):
        raise UsageError(f"{b.path}: {len(b.names)} sequences, expected {len(a.names)} as in {a.path}")
    for i, (x, y) in enumerate(zip(a.names, b.names, strict=True), 1):
        for j, (p, q) in enumerate(zip(x, y, strict=False)):
            if p != q:
                unlike = type(p) is not type(q)
                why = ": one has ids, the other texts of tokens" if unlike else ""
                raise UsageError(
                    f"{b.path}: token {j} of sequence {i} is {q!r}, expected {p!r} as in {a.path}{why}"
                    " (texts that part: verify explain --texts)"
                )
        if len(x) != len(y):
            raise UsageError(f"{b.path}: sequence {i} has {len(y)} tokens, expected {len(x)} as in {a.path}")
    for record, other in zip(a.records or (), b.records or (), strict=False):
        check_same_prompt(record, other)
    for i, (m, n) in enumerate(zip(a.before or (), b.before or (), strict=False), 1):
        if m != n and m >= 0 and n >= 0:
            raise UsageError(f"{b.path}: the prompt of sequence {i} has {n} tokens, expected {m}")


def columns_of(a: LogprobFile, b: LogprobFile) -> Columns:
    """Both files on what both know."""
    kind = KINDS[max(KINDS.index(a.kind), KINDS.index(b.kind))]
    moved = [y - x for x, y in zip(a.chosen, b.chosen, strict=True)]
    if a.logits is not None and b.logits is not None:
        # The reader of such pairs knows their rounding and their clips.
        pair = score_pair(a.logits, b.logits).on_what_both_hold
        moved = list(pair.base.nll - pair.other.nll)
        zero = [np.zeros(len(x)) for x in pair.kld]
        unseen = resolution_of(pair).mean_kld
        kld = list(pair.kld)
        return Columns(kind="full", moved=moved, divergence=kld, bound=kld, hidden=zero, resolution=unseen)
    if kind == "sampled":
        one = [_sampled(-d) for d in moved]
        return Columns(kind=kind, moved=moved, divergence=one, bound=None, hidden=None)
    if kind == "full":
        assert a.whole is not None and b.whole is not None
        divergence = []
        for i in range(len(a.names)):
            p, q = a.whole.rows(i).astype(np.float64), b.whole.rows(i).astype(np.float64)
            if p.shape != q.shape:
                raise UsageError(
                    f"{b.path}: a vocabulary of {q.shape[1]}, expected {p.shape[1]} as in {a.path}"
                )
            divergence.append((np.exp(p) * np.where(np.isneginf(p), 0.0, p - q)).sum(1))
        none = [np.zeros(len(x)) for x in divergence]
        return Columns(kind=kind, moved=moved, divergence=divergence, bound=divergence, hidden=none)
    parts = [_top_of(a, b, i) for i in range(len(a.names))]
    divergence, bound, hidden = (list(x) for x in zip(*parts, strict=True))
    return Columns(kind=kind, moved=moved, divergence=divergence, bound=bound, hidden=hidden)


def _sampled(log_ratio: np.ndarray) -> np.ndarray:
    """ln(p/q) - 1 + q/p at a token drawn from p: its mean is KL(p, q), and none is negative."""
    return log_ratio - 1 + np.exp(-log_ratio)


def _top_of(a: LogprobFile, b: LogprobFile, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(estimate, bound, hidden) of a sequence.

    With S the tokens that both list, KL = sum_S (p ln(p/q) - p + q) + sum outside S of the same, and every
    term is at least 0. The second sum is the mean over tokens drawn from p of [outside S] (ln(p/q) - 1 +
    q/p); so S must not depend on the token that came. The bound lumps what is outside: sum_S p ln(p/q) +
    p' ln(p'/q') with p' = 1 - sum_S p.
    """
    found = []
    for j, name in enumerate(a.names[i]):
        first, second = _listed(a, b, i, j), _listed(b, a, i, j)
        shared = [n for n in first if n in second]
        log_p, log_q = (np.array([x[n] for n in shared]) for x in (first, second))
        p, q = np.exp(log_p), np.exp(log_q)
        head = float((p * (log_p - log_q) - p + q).sum())
        tail = 0.0 if name in shared else float(_sampled(a.chosen[i][j] - b.chosen[i][j]))
        rest_p, rest_q = (max(1 - float(x.sum()), _LEAST_REST) for x in (p, q))
        lump = float((p * (log_p - log_q)).sum()) + rest_p * float(np.log(rest_p / rest_q))
        found.append((head + tail, max(lump, 0.0), rest_p))
    columns = np.array(found).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]


def _listed(of: LogprobFile, beside: LogprobFile, i: int, j: int) -> dict[Name, float]:
    """What a file says at a position: its own list, or of a whole vocabulary what the other lists."""
    if of.top is not None:
        return of.most_likely(i, j)
    assert of.whole is not None
    row = of.whole.rows(i)[j]
    listed = beside.most_likely(i, j)
    return {n: float(row[n]) for n in listed if isinstance(n, int) and n < len(row)}


def _of_logits_file(path: str) -> LogprobFile:
    file = LogitsFile(path)
    names: list[list[Name]] = [[int(x) for x in row] for row in file.targets]
    whole = _Records(file)
    chosen = []
    for i, targets in enumerate(file.targets):
        rows = whole.rows(i)
        bad = ~np.isfinite(rows).all(1)
        if bad.any():
            at = file.layout.first_scored + int(bad.argmax())
            raise UsageError(
                f"{path}: window {i + 1}, position {at}: NaN or Inf, expected logarithms of probabilities"
                " (verify kld judges such files)"
            )
        chosen.append(rows[np.arange(len(targets)), targets].astype(np.float64))
    before = [file.layout.first_scored + 1] * len(names)
    return LogprobFile(
        path=path, kind="full", names=names, chosen=chosen, whole=whole, before=before, logits=file
    )


class _Records:
    """Rows of a logits file, a window at a time; the last is kept."""

    def __init__(self, file: LogitsFile) -> None:
        self.file, self.held = file, (-1, np.empty(0))

    def rows(self, sequence: int) -> np.ndarray:
        if self.held[0] != sequence:
            self.held = sequence, self.file.read(sequence, 0, self.file.layout.scored).log_probs()
        return self.held[1]


class _Arrays:
    """Rows of arrays [sequences, N, V], normalised."""

    def __init__(self, rows: np.ndarray) -> None:
        self.values = rows

    def rows(self, sequence: int) -> np.ndarray:
        x = self.values[sequence].astype(np.float64)
        m = x.max(1, keepdims=True)
        return x - m - np.log(np.exp(x - m).sum(1, keepdims=True))


def _of_arrays(path: str) -> LogprobFile:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise UsageError(f"{path}: is one array, expected .npz with 'logprobs' or 'logits' and 'tokens'")
        with loaded as file:
            arrays = {key: file[key] for key in file.files}
    except UsageError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read as .npz: {error}") from None
    key = next((k for k in ("logprobs", "logits", "log_probs") if k in arrays), None)
    tokens = next((arrays[k] for k in ("tokens", "token_ids", "ids", "targets") if k in arrays), None)
    if key is None or tokens is None:
        held = ", ".join(arrays) or "nothing"
        raise UsageError(f"{path}: holds {held}, expected 'logprobs' or 'logits' [N, V] and 'tokens' [N]")
    values, shapes = arrays[key], f"{key} {arrays[key].shape} and tokens {tokens.shape}"
    values, tokens = (values[None], tokens[None]) if values.ndim == 2 else (values, tokens)
    if values.ndim != 3 or tokens.shape != values.shape[:2] or not values.size:
        raise UsageError(f"{path}: {shapes}, expected [N, V] and [N]")
    if not np.issubdtype(values.dtype, np.floating):
        raise UsageError(f"{path}: {key} is of {values.dtype}, expected floating-point numbers")
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.min() < 0 or tokens.max() >= values.shape[2]:
        raise UsageError(f"{path}: tokens: expected whole numbers from 0 to {values.shape[2] - 1}")
    if np.isnan(values).any() or np.isposinf(values).any() or np.isneginf(values).all(2).any():
        raise UsageError(f"{path}: {key} holds NaN or Inf")
    whole = _Arrays(values)
    chosen = [whole.rows(i)[np.arange(len(t)), t] for i, t in enumerate(tokens)]
    for i, x in enumerate(chosen, 1):
        if not ((x >= LEAST_LOG) & (x <= MOST_LOG)).all():
            at = int((x < LEAST_LOG).argmax())
            raise UsageError(
                f"{path}: {key}: token {at} of sequence {i} has the logarithm {x[at]:g}, expected one of a"
                " probability: it came"
            )
    return LogprobFile(path, "full", [[int(x) for x in t] for t in tokens], chosen, whole=whole)


def _of_records(path: str) -> LogprobFile:
    records = read_records(path)
    for record in records:
        if record.logprobs is None or record.names is None:
            raise UsageError(
                f"{record.where}: has no logprobs, expected those of vLLM, SGLang, llama-server, OpenAI or a"
                " trainer (docs/logprobs.md)"
            )
    kept = [r for r in records if r.names]
    if not kept:
        raise UsageError(f"{path}: has no tokens")
    tops = all(r.top is not None for r in kept)
    return LogprobFile(
        path=path,
        kind="top" if tops else "sampled",
        names=[list(r.names or ()) for r in kept],
        chosen=[np.array(r.logprobs) for r in kept],
        top=[list(r.top or ()) for r in kept] if tops else None,
        before=[len(r.prompt_ids) if r.prompt_ids is not None else -1 for r in kept],
        records=kept,
    )
