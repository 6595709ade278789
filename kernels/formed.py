"""How whole windows are put to a kernel: so many query tokens a call, keys in pages, several sequences.

A window is one call of many rows, each computed as if alone. Engines make others: 2 to 16 new tokens a call
where drafts are checked (speculation), keys and values in a pool of pages, sequences of unlike length side by
side. `FormedKernel` makes those calls of a window and lays their results side by side, so that whoever
measures a kernel knows of one call a window.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import AttentionPath, Call, Result, Shape
from verify.kernels.capabilities import Capabilities
from verify.kernels.judging.other_forms import STALE, in_pages, packed
from verify.kernels.kernel import Kernel
from verify.kernels.lengths import RowLengths, keep_lengths, lengths_of
from verify.kernels.merge import Merge
from verify.kernels.plans.asked import MOST_SEVERAL, N_KV_PADDING
from verify.kernels.trace import Launched, RowKind

# Numbers of keys and values of the sequences of a call that share one window's.
_NUMBERS_AT_ONCE = 1 << 28


@dataclass(frozen=True)
class CallForm:
    """What calls are beside plain ones, of whole windows with all their rows as if alone."""

    n_q: int = 1  # query tokens of each sequence in a call, at most `MOST_SEVERAL`
    page: int = 0  # keys a page; 0: keys and values lie side by side
    sequences: int = 1  # windows in a call, of unlike length
    one_by_one: bool = False  # of n_q = 1: each row is a call of its own (T = 1), as text is written

    @property
    def is_plain(self) -> bool:
        return self == CallForm()

    @property
    def in_steps(self) -> bool:
        """Whether a window's rows go `n_q` at a time."""
        return self.n_q > 1 or self.sequences > 1 or self.one_by_one

    def calls_of(self, rows: int, path: AttentionPath = "decode") -> int:
        """How many calls a window of so many rows is part of."""
        if path == "prefill":
            return 2 if self.sequences > 1 else 1
        return -(-rows // self.n_q) if self.in_steps else 1

    def __str__(self) -> str:
        """In words: `calls of 4 tokens, pages of 16 keys, 2 sequences a call`."""
        said = [f"calls of {self.n_q} tokens"] if self.n_q > 1 else []
        said += ["calls of one token"] if self.one_by_one else []
        said += [f"pages of {self.page} keys"] if self.page else []
        said += [f"{self.sequences} sequences a call"] if self.sequences > 1 else []
        return ", ".join(said) or "plain calls"


PLAIN_CALLS = CallForm()
ONE_BY_ONE = CallForm(one_by_one=True)


def whole_path(path: AttentionPath) -> AttentionPath:
    """The path of a call of whole windows: that of some tokens is made of rows as if alone, below."""
    return "decode" if path == "several" else path


class _Piece(NamedTuple):
    """One call, and where the rows [N, t] of its result go: sequence and row of the whole call, of each."""

    call: Call
    sequence: torch.Tensor  # [N or 1, 1 or t]
    row: torch.Tensor  # [N, t]
    sequences: int  # in the call


class FormedKernel(Kernel):
    """A kernel that is asked whole windows in calls of another form.

    A call of the path decode is one of whole windows [B, T]: its rows go `n_q` at a time, each against the
    keys so far, rounded up as engines hold them; the rows that are left over come first. Of several sequences
    each is at another place of its window, so that no two of a call see as many keys. Of a prefill of several
    sequences each window is read in two pieces, cut at a place of its own: the first pieces are one call with
    packed tokens, of unlike length, the others the next. What has a form already, or is of the path
    `several`, is passed on.

    A kernel of ours, which gives a sequence the bits that it has in a call of its own, is asked the steps of
    a window as sequences of one call.
    """

    def __init__(self, inner: Kernel, form: CallForm) -> None:
        super().__init__(inner.spec)
        self.inner, self.form = inner, form
        self.notes, self.cache, self.until_read = inner.notes, inner.cache, inner.until_read
        self.as_if_alone = inner.as_if_alone
        self.binary: str = getattr(inner, "binary", "")

    def run(self, call: Call) -> Result:
        if self._is_formed(call):
            return self.inner.run(self._worded(call))
        out = call.q.new_empty((*call.q.shape[:3], call.shape.v_size), dtype=torch.float32)
        lse = call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
        ran: Counter[RowKind] = Counter()
        for piece in self._pieces(call):
            found = self.inner.run(piece.call)
            at = piece.sequence, piece.row
            out[at], lse[at] = found.out.to(out.dtype), found.lse.to(lse.dtype)
            for (_, n_kv, signature), rows in found.launched.rows.items():
                # Calls are made here, and so their form is known here.
                formed = signature._replace(page=self.form.page)
                if self._in_steps(call):
                    formed = formed._replace(tokens=piece.row.shape[1])
                if self._in_steps(call) or self._in_packs(call):
                    formed = formed._replace(sequences=piece.sequences)
                ran[self._path_of(call), n_kv, formed] += rows
        return Result(out, lse, Launched(ran))

    def refuses(self, call: Call) -> str | None:
        if self._is_formed(call):
            return self.inner.refuses(self._worded(call))
        return next(filter(None, (self.inner.refuses(piece.call) for piece in self._pieces(call))), None)

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return self.inner.arithmetic(shape, self._word(path))

    def arithmetic_of(self, call: Call) -> Arithmetic:
        """Of the calls that a window becomes: that of its last rows says what is said of all."""
        return self.inner.arithmetic_of(self._last(call))

    def result_type(self, call: Call) -> str:
        return self.inner.result_type(self._last(call))

    def capabilities(self) -> Capabilities:
        return self.inner.capabilities()

    def held(self, call: Call) -> Call:
        return self.inner.held(call)

    def budgets_follow(
        self, identified: Callable[[Call], Arithmetic | None], seen: Sequence[Arithmetic] = ()
    ) -> None:
        self.inner.budgets_follow(identified, seen)
        self.identified, self.seen, self.notes = self.inner.identified, seen, self.inner.notes

    def merger(self) -> Merge | None:
        return self.inner.merger()

    def forgive(self) -> None:
        self.inner.forgive()

    def close(self) -> None:
        self.inner.close()

    @staticmethod
    def _is_formed(call: Call) -> bool:
        return call.path == "several" or call.block_table is not None or call.cu_seqlens is not None

    def _in_steps(self, call: Call) -> bool:
        """Whether rows go some at a time."""
        return call.path == "decode" and self.form.in_steps

    def _in_packs(self, call: Call) -> bool:
        """Whether sequences lie one behind the other."""
        return call.path == "prefill" and self.form.sequences > 1

    def _path_of(self, call: Call) -> AttentionPath:
        """What traces call the path of a window's rows."""
        return "several" if call.path == "decode" and self.form.n_q > 1 else call.path

    def _word(self, path: AttentionPath) -> AttentionPath:
        """The path by which a kernel is asked for some tokens: one that has no other has them by prefill."""
        has = self.inner.capabilities().paths
        return "prefill" if path == "several" and path not in has and "prefill" in has else path

    def _worded(self, call: Call) -> Call:
        return replace(call, path=self._word(call.path))

    def _last(self, call: Call) -> Call:
        """The last of the calls that the first of some windows becomes."""
        if self._is_formed(call):
            return self._worded(call)
        own = _of_sequences(call, range(1))
        some = _paged(own, self.form.page)
        rows = torch.arange(own.q.shape[1], device=own.q.device)
        if self._in_packs(call):
            last = packed(some)
        else:
            if self._in_steps(call):
                rows = rows[-self.form.n_q :]
            last = self._piece(some, call, range(1), rows[None]).call
        return replace(last, told_sequences=self.form.sequences)

    def _pieces(self, call: Call) -> Iterator[_Piece]:
        """The calls that a call of whole windows becomes; together they have each of its rows once."""
        batch, count = call.q.shape[:2]
        device = call.q.device
        at_once = self.form.sequences if self._in_steps(call) or self._in_packs(call) else batch
        for first in range(0, batch, at_once):
            own = range(first, min(first + at_once, batch))
            some = _paged(_of_sequences(call, own), self.form.page)
            if self._in_packs(call):
                yield from _packs(some, own)
                continue
            if not self._in_steps(call):
                rows = torch.arange(count, device=device).expand(len(own), -1)
                yield self._piece(some, call, own, rows)
                continue
            n_q = self.form.n_q
            left, steps = count % n_q, count // n_q
            if left:
                yield self._piece(some, call, own, torch.arange(left, device=device).expand(len(own), -1))
            if self._side_by_side(call):
                yield from self._steps_side_by_side(some, call, own, left)
                continue
            # Sequence i is i / N of its window ahead of the first.
            ahead = torch.tensor([i * steps // len(own) for i in range(len(own))], device=device)
            for step in range(steps):
                starts = left + (ahead + step) % steps * n_q
                yield self._piece(some, call, own, starts[:, None] + torch.arange(n_q, device=device))

    def _side_by_side(self, call: Call) -> bool:
        """Whether the steps of a window may be sequences of one call: each has the bits that it has in a call
        of its own, by how the kernel is built. A call a step is hundreds of launches for a short window."""
        alone = self.inner.as_if_alone and self.inner.capabilities().row_alone
        return alone and self.form.sequences == 1 and call.mask is None

    def _steps_side_by_side(self, some: Call, call: Call, own: range, left: int) -> Iterator[_Piece]:
        """The steps of one window as sequences that share its keys, as many at once as `_NUMBERS_AT_ONCE`
        allow, should the kernel copy those for each. Rows before `left` are left out."""
        count, n_q = some.q.shape[1], self.form.n_q
        shape, known = some.shape, lengths_of(call.kv_len)
        lengths = known.of_first or RowLengths(known.of_rows[own.start * count : own.stop * count])
        numbers = max(shape.keys * shape.kv_heads * (shape.k_size + shape.v_size), 1)
        rows_at_once = max(_NUMBERS_AT_ONCE // numbers, 1) * n_q
        for first in range(left, count, rows_at_once):
            chosen = range(first, min(first + rows_at_once, count))
            rows, kv_len = _steps(lengths, chosen, n_q, some.kv_len.dtype, some.q.device)
            k, v, table, columns = some.k, some.v, some.block_table, some.v_in_k
            if table is None:
                room = -(-max(lengths_of(kv_len).greatest, 1) // N_KV_PADDING) * N_KV_PADDING
                k, v = (x[:, :room].expand(len(rows), -1, -1, -1) for x in (k, v))
                v = v if columns is None else k[..., slice(*columns)]
            else:
                table = _with_stale_ends(table, kv_len.amax(1), k.shape[1])
            steps = replace(
                some,
                q=some.q[0, rows],
                k=k,
                v=v,
                kv_len=kv_len,
                keys=None if some.keys is None else some.keys[0, rows],
                block_table=table,
                path=self._word(self._path_of(call)),
            )
            yield _Piece(steps, torch.tensor([[own.start]], device=rows.device), rows, 1)

    def _piece(self, some: Call, call: Call, own: range, rows: torch.Tensor) -> _Piece:
        """Rows [N, t] of the sequences `own` of a call; some: these alone, in pages where they are to be."""
        of_whole = torch.tensor(own, device=rows.device)[:, None]
        told = len(own) if self._in_steps(call) else 1
        path = self._word(self._path_of(call))
        if rows.shape[1] == some.q.shape[1]:
            return _Piece(replace(some, path=path, told_sequences=told), of_whole, rows, len(own))
        at = torch.arange(len(own), device=rows.device)[:, None], rows
        kv_len = some.kv_len[at]
        longest = lengths_of(kv_len).greatest
        k, v, table = some.k, some.v, some.block_table
        if table is None:
            # An engine's cache has room for more, up to a multiple of this.
            room = -(-max(longest, 1) // N_KV_PADDING) * N_KV_PADDING
            columns = some.v_in_k
            k = k[:, :room]
            v = v[:, :room] if columns is None else k[..., slice(*columns)]
        else:
            table = _with_stale_ends(table, kv_len.amax(1), k.shape[1])
        return _Piece(
            replace(
                some,
                q=some.q[at],
                k=k,
                v=v,
                kv_len=kv_len,
                keys=None if some.keys is None else some.keys[at],
                block_table=table,
                path=path,
                told_sequences=told,
            ),
            of_whole,
            rows,
            len(own),
        )


@functools.lru_cache(maxsize=64)
def _steps(
    lengths: RowLengths, chosen: range, n_q: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a window, n_q a step, and their visible keys: [steps, n_q] each. Kept: the layers of a model
    ask for the same."""
    rows = torch.arange(chosen.start, chosen.stop, device=device).view(-1, n_q)
    kv_len = torch.tensor(lengths[chosen.start : chosen.stop], dtype=dtype).view(-1, n_q).to(device)
    return rows, keep_lengths(kv_len)


def in_form(kernel: Kernel, form: CallForm) -> Kernel:
    """The kernel, asked in calls of this form. Raises ValueError for more tokens than a call has."""
    if not 1 <= form.n_q <= MOST_SEVERAL:
        raise ValueError(f"n_q: expected 1 to {MOST_SEVERAL} query tokens a call, got {form.n_q}")
    return kernel if form.is_plain else FormedKernel(kernel, form)


def _of_sequences(call: Call, own: range) -> Call:
    """Some sequences of a call whose rows lie in the batch."""
    if len(own) == len(call.q):
        return call
    at, columns = slice(own.start, own.stop), call.v_in_k
    k = call.k[at]
    return replace(
        call,
        q=call.q[at],
        k=k,
        v=call.v[at] if columns is None else k[..., slice(*columns)],
        kv_len=call.kv_len[at],
        keys=None if call.keys is None else call.keys[at],
        mask=call.mask if call.mask is None or len(call.mask) == 1 else call.mask[at],
    )


def _packs(some: Call, own: range) -> Iterator[_Piece]:
    """The two calls of a prefill of some sequences, which are `own` of a whole call."""
    count, device = some.q.shape[1], some.q.device
    cuts = [(i + 1) * count // (len(own) + 1) for i in range(len(own))]
    for pieces in ([range(cut) for cut in cuts], [range(cut, count) for cut in cuts]):
        lengths = torch.tensor([len(rows) for rows in pieces])
        if not int(lengths.sum()):
            continue
        of_some = torch.repeat_interleave(torch.arange(len(own)), lengths)[None].to(device)
        row = torch.tensor([i for rows in pieces for i in rows], device=device)[None]
        at, table = (of_some, row), some.block_table
        if table is not None:
            n_kv = [int(some.kv_len[i, rows[-1]]) if rows else 0 for i, rows in enumerate(pieces)]
            table = _with_stale_ends(table, torch.tensor(n_kv, device=device), some.k.shape[1])
        call = replace(
            some,
            q=some.q[at],
            kv_len=some.kv_len[at],
            keys=None if some.keys is None else some.keys[at],
            block_table=table,
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32),
            told_sequences=len(own),
        )
        yield _Piece(call, of_some + own.start, row, len(own))


def _paged(call: Call, page: int) -> Call:
    """The same in a pool of pages in a drawn order, with NaN in all that is not to be read."""
    return in_pages(call, page, seed=call.layer or 0) if page else call


def _with_stale_ends(table: torch.Tensor, n_kv: torch.Tensor, page: int) -> torch.Tensor:
    """A table [N, pages] of sequences that see n_kv [N] keys: what is behind their last page is anything."""
    places = torch.arange(table.shape[1], device=table.device)
    stale = torch.tensor(STALE, dtype=table.dtype, device=table.device)[places % len(STALE)]
    return torch.where(places < -(-n_kv // page)[:, None], table, stale)
