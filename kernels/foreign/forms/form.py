"""A form: how a callable is called, and its result read. Calls of the contract become calls of the callable.

Other orders of dimensions, other names, no lengths (every key is seen, or a causal triangle), a mask in their
place, pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise, zip_longest
from typing import Any

import torch

# What a callable is given only if it asks for it; without it, a call that needs it is refused.
OPTIONAL = ("path", "sliding_window", "softcap", "sinks", "alibi_slopes")
# Forms of a call (`docs/contract.md`) that a callable with lengths is given where it takes them. One that
# cannot do without is given every call so.
CALL_FORMS = ("block_table", "cu_seqlens", "mask", "keys")
# Keys a page of a call that has none, for a callable that needs pages; what lies behind its keys there.
PAGE, BEHIND = 16, 6e4
LAYOUTS = ("bshd", "bhsd", "thd")
# Which keys a callable without lengths sees: all that it is given, or those up to a row's own.
MASKS = ("none", "causal")
DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
SCALE_NAMES = ("scale", "sm_scale", "softmax_scale", "scaling")
MASK_NAMES = ("attn_mask", "attention_mask", "mask")
CAUSAL_NAMES = ("is_causal", "causal")
PACKED_NAMES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


class FormError(Exception):
    """The callable cannot be used as it is: the message is the whole story."""


class FormFailure(Exception):
    """What it returned is not attention. kind: as of `KernelFailure`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Wanted:
    """What the owner says: layout and mask of the above, dtype (f16, bf16, f32), keywords for the callable;
    empty where it is left to be found."""

    layout: str = ""
    mask: str = ""
    dtype: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """A callable and how it is called; `run` computes a call of the contract."""

    # What is called.
    function: Callable[..., Any]
    # What messages call it.
    name: str
    # kv_len: it is given lengths; mask: a mask of them; none, causal: it sees all keys, or a triangle whose
    # last row sees the last key; square: a triangle of as many rows as keys.
    way: str = "kv_len"
    # Order of dimensions of q, k, v and the result: of LAYOUTS.
    layout: str = "bshd"
    # Its names of scale, mask and the switch of a triangle; empty where it has none.
    names: Mapping[str, str] = field(default_factory=lambda: {"scale": "scale"})
    # Which of OPTIONAL it takes.
    takes: tuple[str, ...] = ()
    # Why it does not take others, where it had to be asked.
    left_out: Mapping[str, str] = field(default_factory=dict)
    # Keywords that its owner gives it.
    options: Mapping[str, Any] = field(default_factory=dict)
    # It has no keywords: lengths and scale by position.
    by_position: bool = False
    # Types that it takes, by torch's names; empty: any.
    dtypes: tuple[str, ...] = ()
    # It has no heads that share keys.
    one_head_each: bool = False
    # Which of CALL_FORMS it takes.
    forms: tuple[str, ...] = ()
    # Which of them it cannot do without.
    needs: tuple[str, ...] = ()
    # It was asked, and was right in no form: it runs in this one.
    never_right: bool = False
    # What a reader must know of all this.
    said: tuple[str, ...] = ()

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        kv_len: torch.Tensor,
        scale: float,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """out [B, T, Hq, Dv] in the callable's own type, and lse [B, T, Hq] or None.

        options: those of OPTIONAL and CALL_FORMS that it takes; packed tokens are [1, sum T, ...] here.
        Raises FormFailure for a result of another shape or kind, NotImplementedError for a call that this
        form cannot be given.
        """
        form = {name: options[name] for name in CALL_FORMS if options.get(name) is not None}
        given = {name: x for name, x in options.items() if name in self.takes}
        if not self.names.get("scale") and not self.by_position:
            own = q.shape[-1] ** -0.5
            if abs(scale - own) > 1e-6 * own:
                raise NotImplementedError(f"{self.name}: takes no scale, and {scale:g} is not {own:g}")
        if self.way == "kv_len":
            return self._formed(q, k, v, kv_len, form, scale=scale, **given)
        if self.way == "mask":
            return self._once(q, k, v, kv_len=kv_len, scale=scale, seen=form.get("mask"), **given)
        if "packed" in self.names and self.way != "square":
            return self._packed_pieces(q, k, v, kv_len, scale, given)
        outs, lses = [], []
        together = bool((kv_len == kv_len[:1]).all()) and self.layout != "thd"
        for b in [slice(None)] if together else [slice(i, i + 1) for i in range(len(q))]:
            out, lse = self._sequences(q[b], k[b], v[b], kv_len[b][0].tolist(), scale, given)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), None if lses[0] is None else torch.cat(lses)  # type: ignore[arg-type]

    def _formed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_len: torch.Tensor,
        form: dict[str, torch.Tensor],
        **given: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A call in the form that it has, or in the one that the callable cannot do without."""
        batch, rows, keys = q.shape[0], q.shape[1], k.shape[1]
        if "block_table" in form:
            keys *= form["block_table"].shape[1]
        if "mask" in self.needs and "mask" not in form:
            form["mask"] = torch.ones((1, 1, rows, keys), dtype=torch.bool, device=q.device)
        if "keys" in self.needs and "keys" not in form:
            places = torch.arange(max(keys, 1), dtype=torch.int32, device=q.device)
            form["keys"] = torch.where(places < kv_len[..., None], places, -1)
        if "block_table" in self.needs and "block_table" not in form:
            form["block_table"] = table_of(len(k), keys, q.device)
            k, v = in_pages(k, behind=0.0), in_pages(v, behind=BEHIND)
            if "mask" in form:
                room = form["block_table"].shape[1] * PAGE
                form["mask"] = torch.nn.functional.pad(form["mask"], (0, room - keys))
        packs = "cu_seqlens" in self.needs and "cu_seqlens" not in form
        if packs:
            form["cu_seqlens"] = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * rows
            q, kv_len = q.flatten(0, 1)[None], kv_len.flatten()[None]
            if "keys" in form:
                form["keys"] = form["keys"].flatten(0, 1)[None]
            if "mask" in form:
                spread = form["mask"].expand(batch, -1, -1, -1).transpose(1, 2).flatten(0, 1)
                form["mask"] = spread.transpose(0, 1)[None]
        packed = "cu_seqlens" in form
        for name, x in form.items():
            given[self.names["mask"] if name == "mask" else name] = x[0] if name == "keys" and packed else x
        out, lse = self._once(q, k, v, kv_len=kv_len, packed=packed, **given)
        if packs:
            out = out[0].unflatten(0, (batch, rows))
            lse = None if lse is None else lse[0].unflatten(0, (batch, rows))
        return out, lse

    def _sequences(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: list[int],
        scale: float,
        given: Mapping[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sequences whose rows see equal numbers of keys, of a callable that takes no lengths."""
        out = lse = None
        for rows, n in pieces(lengths, self.way):
            if n == 0:
                continue
            asked = q[:, rows]
            if self.way == "square":
                asked = torch.cat((q.new_zeros((len(q), n - asked.shape[1], *q.shape[2:])), asked), 1)
            some, its = self._once(asked, k[:, :n], v[:, :n], kv_len=None, scale=scale, **given)
            own = slice(asked.shape[1] - q[:, rows].shape[1], None)
            some, its = some[:, own], None if its is None else its[:, own]
            if out is None:
                out = some.new_zeros((len(q), len(lengths), *some.shape[2:]))
                lse = None if its is None else its.new_full(out.shape[:3], -math.inf)
            out[:, rows] = some
            if its is not None and lse is not None:
                lse[:, rows] = its
        if out is None:
            out = q.new_zeros((*q.shape[:3], v.shape[-1]))
        return out, lse

    def _packed_pieces(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_len: torch.Tensor,
        scale: float,
        given: Mapping[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The first pieces of all sequences in one call, queries and keys packed one behind the other; then
        the second ones."""
        out, lse = q.new_zeros((*q.shape[:3], v.shape[-1])), None
        waiting = [[piece for piece in pieces(own, self.way) if piece[1]] for own in kv_len.tolist()]
        # A row by itself sees all keys: of a triangle it is asked without the rows that have one.
        alone = [[piece for piece in own if not isinstance(piece[0], slice)] for own in waiting]
        triangles = [[piece for piece in own if isinstance(piece[0], slice)] for own in waiting]
        for of_kind in (alone, triangles):
            for wave in zip_longest(*of_kind):
                some = [(b, *piece) for b, piece in enumerate(wave) if piece is not None]
                asked = torch.cat([q[b, rows] for b, rows, _ in some])[None]
                keys, values = (torch.cat([x[b, :n] for b, _, n in some])[None] for x in (k, v))
                counts = [len(q[b, rows]) for b, rows, _ in some], [n for _, _, n in some]
                found, its = self._once(asked, keys, values, kv_len=None, scale=scale, counts=counts, **given)
                if out.dtype != found.dtype:
                    out = out.to(found.dtype)
                if its is not None and lse is None:
                    lse = its.new_full(out.shape[:3], -math.inf)
                for (b, rows, _), part in zip(some, found[0].split(counts[0]), strict=True):
                    out[b, rows] = part
                if its is not None and lse is not None:
                    for (b, rows, _), part in zip(some, its[0].split(counts[0]), strict=True):
                        lse[b, rows] = part
        return out, lse

    def _once(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, packed: bool = False, **given: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One call of the callable, its result in our order of dimensions; keywords as of `native`."""
        expected = [*q.shape[:3], v.shape[-1]]
        native, words = self.native(q, k, v, packed=packed, **given)
        with torch.no_grad():
            found = self.function(*native, **words)
        return self.result(found, expected, q.device, packed=packed)

    def native(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        kv_len: torch.Tensor | None,
        scale: float,
        seen: torch.Tensor | None = None,
        packed: bool = False,
        counts: tuple[list[int], list[int]] | None = None,
        **given: Any,
    ) -> tuple[list[Any], dict[str, Any]]:
        """What one call is given: q, k, v in the callable's order of dimensions (lengths and scale behind
        them where it has no keywords), and keywords.

        seen: a mask that the call has; packed: q is [1, sum T, ...], of which the callable gets [sum T, ...];
        counts: query tokens and keys of each sequence, where q, k and v hold some one behind the other.
        """
        words: dict[str, Any] = {**self.options, **given}
        lengths = kv_len[0] if packed and kv_len is not None else kv_len
        if self.way == "kv_len" and not self.by_position:
            words["kv_len"] = lengths
        if name := self.names.get("scale"):
            words[name] = scale
        if self.way == "mask":
            assert kv_len is not None
            words[self.names["mask"]] = self._seen(k, kv_len, seen)
        if self.way in ("causal", "square") and (name := self.names.get("causal")):
            # One row sees all keys: some, torch's among them, count a triangle from the first key on.
            words[name] = (q.shape[1] if counts is None else max(counts[0])) > 1
        if "packed" in self.names:
            each = counts or ([q.shape[1]], [k.shape[1]])
            ends = [torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=q.device) for n in each]
            words |= dict(zip(PACKED_NAMES, (*ends, *map(max, each)), strict=True))
        native = [q[0] if packed else self._given(q), self._given(k), self._given(v)]
        return [*native, lengths, scale] if self.by_position else native, words

    def canonical(self, x: torch.Tensor) -> torch.Tensor:
        """q, k or v in the callable's order of dimensions, back in ours."""
        return self._ours(x)

    @staticmethod
    def _seen(k: torch.Tensor, kv_len: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Lengths and the call's own mask as one."""
        seen = torch.arange(k.shape[1], device=k.device) < kv_len[:, None, :, None]
        if mask is None:
            return seen
        return seen & mask if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)

    def _given(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H, D] in the order of dimensions that the callable has."""
        if self.layout == "bhsd":
            return x.transpose(1, 2).contiguous()
        if self.layout == "thd":
            if len(x) > 1:
                raise NotImplementedError(f"{self.name}: layout thd, and no lengths: one sequence a call")
            return x[0]
        return x

    def result(
        self, found: Any, expected: list[int], device: torch.device, *, packed: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = found, None
        if isinstance(found, (tuple, list)):
            if len(found) == 2:
                out, lse = found
            elif found:
                out = found[0]
        batch, rows, heads, size = expected
        if packed:
            # Packed tokens: [sum T, Hq, Dv] in any order of dimensions.
            form = replace(self, layout="thd", names={k: n for k, n in self.names.items() if k != "packed"})
            return form.result(found, expected, device)
        if not isinstance(out, torch.Tensor):
            raise FormFailure("shape", f"out is a {type(out).__name__}, expected a tensor")
        theirs = {"bshd": expected, "bhsd": [batch, heads, rows, size], "thd": expected[1:]}
        if list(out.shape) != theirs[self.layout]:
            others = [name for name in LAYOUTS if list(out.shape) == theirs[name]]
            hint = f": what layout={others[0]} has" if others else ""
            raise FormFailure(
                "shape", f"out has shape {list(out.shape)}, expected {theirs[self.layout]}{hint}"
            )
        out = self._ours(out)
        if lse is not None:
            if not isinstance(lse, torch.Tensor):
                raise FormFailure("shape", f"lse is a {type(lse).__name__}, expected a tensor")
            by_row, by_head = [batch, rows, heads], [batch, heads, rows]
            if self.layout == "thd":
                lse = lse[None]
            # Of [B, H, T] some say it whatever the order of their other dimensions.
            if list(lse.shape) == by_head and (self.layout == "bhsd" or by_head != by_row):
                lse = lse.transpose(1, 2)
            if list(lse.shape) != by_row:
                raise FormFailure("shape", f"lse has shape {list(lse.shape)}, expected {by_row}")
        for name, x in (("out", out), ("lse", lse)):
            if x is None:
                continue
            if not x.dtype.is_floating_point:
                raise FormFailure("dtype", f"{name} is {x.dtype}, expected a float dtype")
            if x.device != device:
                raise FormFailure("device", f"{name} is on {x.device}, expected {device}")
        return out, lse

    def _ours(self, out: torch.Tensor) -> torch.Tensor:
        if self.layout == "thd":
            return out[None]
        return out.transpose(1, 2) if self.layout == "bhsd" else out


def pieces(lengths: list[int], way: str) -> Iterator[tuple[slice | list[int], int]]:
    """Rows that one call of a callable without lengths can answer, and the keys that it is given.

    >>> list(pieces([3, 3, 2], "none"))
    [([0, 1], 3), ([2], 2)]
    >>> list(pieces([3, 4, 5], "causal"))
    [(slice(0, 3, None), 5)]
    >>> list(pieces([5, 5], "causal"))
    [([0], 5), ([1], 5)]
    """
    triangle = all(b - a == 1 for a, b in pairwise(lengths))
    if way != "none" and triangle and (len(lengths) > 1 or way == "square"):
        yield slice(0, len(lengths)), lengths[-1]
        return
    if way == "square":
        raise NotImplementedError("as many rows as keys: rows that see other keys than a triangle's")
    by_length: dict[int, list[int]] = {}
    for row, n in enumerate(lengths):
        by_length.setdefault(n, []).append(row)
    for n, rows in by_length.items():
        for some in [rows] if way == "none" else [[row] for row in rows]:
            yield some, n


def table_of(sequences: int, keys: int, device: torch.device) -> torch.Tensor:
    """The table of `in_pages`: [B, pages] int32, pages of a sequence from the last to the first."""
    pages = -(-keys // PAGE)
    ids = torch.arange(sequences * pages, dtype=torch.int32, device=device).view(sequences, pages)
    return ids.flip(1)


def in_pages(x: torch.Tensor, *, behind: float) -> torch.Tensor:
    """[B, S, H, D] as pages [B * ceil(S / PAGE), PAGE, H, D] in the order of `table_of`; `behind` fills."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % PAGE), value=behind)
    return padded.unflatten(1, (-1, PAGE)).flip(1).flatten(0, 1).contiguous()


def text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return "(its text cannot be had)"
