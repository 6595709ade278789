"""A function as a flashinfer-bench definition names its inputs, called as the contract calls a kernel.

Three kinds of definitions are attention: tokens one behind the other over keys in pages (one token a
sequence: decode; several: prefill), and over keys one behind the other (ragged). Offsets of sequences are
sums of lengths; of several tokens the last sees the last key. Heads and sizes of a definition are constants:
smaller calls are filled up with zeros, which change nothing. Runs in the worker too, and so imports torch and
the standard library alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch

# What lies behind a sequence's keys in its last page, as values: seen, it shows.
BEHIND = 6e4


class TokensAlike(NamedTuple):
    """Neighbouring tokens of one sequence, each of which sees one key more."""

    batch: int  # which sequence of the call
    tokens: int
    keys: int  # that the last of them sees


@dataclass(frozen=True)
class DefinedCall:
    """`run` of a definition, called with (q, k, v, *, kv_len, scale) -> (out, lse).

    Shapes as of the contract: q [B, T, Hq, Dk], k [B, S, Hkv, Dk], v [B, S, Hkv, Dv], kv_len [B, T].
    """

    # The function that is called.
    run: Callable[..., Any]
    # Names of its inputs, in the definition's order.
    inputs: Sequence[str]
    # Names of its outputs: the result, and its lse where there are two.
    outputs: Sequence[str]
    # Of queries.
    heads: int
    # Of keys and values.
    kv_heads: int
    # Numbers of a query or key.
    k_size: int
    # Numbers of a value.
    v_size: int
    # Keys a page; 0: keys lie one behind the other.
    page: int
    # Its lse is in powers of two.
    log2: bool = True

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        kv_len: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises NotImplementedError for sizes that the definition does not hold."""
        batch, rows, heads, size = q.shape
        kv_heads, v_size = k.shape[2], v.shape[3]
        ratio, most = heads // kv_heads, self.heads // self.kv_heads
        if kv_heads > self.kv_heads or ratio > most or size > self.k_size or v_size > self.v_size:
            raise NotImplementedError(
                f"defined for {self.heads}/{self.kv_heads} heads of {self.k_size} and {self.v_size}"
            )
        if "sm_scale" not in self.inputs and not math.isclose(scale, self.k_size**-0.5, rel_tol=1e-6):
            raise NotImplementedError(f"takes no scale, and {scale:g} is not {self.k_size**-0.5:g}")
        grouped = _filled(q.unflatten(2, (kv_heads, ratio)), 2, self.kv_heads, most, self.k_size)
        queries = grouped.flatten(2, 3).flatten(0, 1)
        wide_k = _filled(k, 2, self.kv_heads, self.k_size)
        wide_v = _filled(v, 2, self.kv_heads, self.v_size)
        sequences = list(self._sequences(kv_len.tolist()))
        given: dict[str, Any] = {"q": queries, "sm_scale": scale}
        if self.page:
            given |= self._in_pages(wide_k, wide_v, sequences)
        else:
            for name, x in (("k", wide_k), ("v", wide_v)):
                given[name] = torch.cat([x[s.batch, : s.keys] for s in sequences]) if sequences else x[0, :0]
            given["kv_indptr"] = _offsets([s.keys for s in sequences], q.device)
        given["qo_indptr"] = _offsets([s.tokens for s in sequences], q.device)
        sent = {name: given[name].clone() for name in ("k", "v", "k_cache", "v_cache") if name in given}
        out, lse = self._asked({name: given[name] for name in self.inputs}, queries)
        for name, before in sent.items():
            # What it wrote into a copy it would have written into its input.
            if not torch.equal(before, given[name]):
                (k if name[0] == "k" else v).add_(1)
        found = out.unflatten(0, (batch, rows)).unflatten(2, (self.kv_heads, most))
        found = found[:, :, :kv_heads, :ratio, :v_size].flatten(2, 3)
        if lse is None:
            return found, torch.full(found.shape[:3], math.nan, device=q.device)
        its = lse.float().unflatten(0, (batch, rows)).unflatten(2, (self.kv_heads, most))
        return found, its[:, :, :kv_heads, :ratio].flatten(2, 3) * (math.log(2) if self.log2 else 1.0)

    def _sequences(self, lengths: Sequence[Sequence[int]]) -> Iterator[TokensAlike]:
        """Tokens in their order; rows of a sequence together where each sees one key more than the last."""
        for b, of_rows in enumerate(lengths):
            n, rows = of_rows[-1] if of_rows else 0, len(of_rows)
            if "qo_indptr" in self.inputs and n >= rows and list(of_rows) == list(range(n - rows + 1, n + 1)):
                yield TokensAlike(b, rows, n)
            else:
                yield from (TokensAlike(b, 1, each) for each in of_rows)

    def _in_pages(
        self, k: torch.Tensor, v: torch.Tensor, sequences: Sequence[TokensAlike]
    ) -> dict[str, torch.Tensor]:
        """Keys and values in pages, a sequence's last one first, and which of them each sequence has."""
        each = -(-k.shape[1] // self.page)
        counts = [-(-s.keys // self.page) for s in sequences]
        if "kv_last_page_len" not in self.inputs and any(s.keys % self.page for s in sequences):
            raise NotImplementedError(f"takes whole pages of {self.page} keys alone")
        ids = [
            s.batch * each + each - 1 - i for s, n in zip(sequences, counts, strict=True) for i in range(n)
        ]
        last = [s.keys - (n - 1) * self.page if n else 0 for s, n in zip(sequences, counts, strict=True)]
        return {
            "k_cache": _paged(k, self.page, 0.0),
            "v_cache": _paged(v, self.page, BEHIND),
            "kv_indptr": _offsets(counts, k.device),
            "kv_indices": torch.tensor(ids, dtype=torch.int32, device=k.device),
            "kv_last_page_len": torch.tensor(last, dtype=torch.int32, device=k.device),
        }

    def _asked(self, given: dict[str, Any], q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Its result and lse; where it is given its outputs to write into they hold NaN before."""
        try:
            parameters = set(inspect.signature(self.run).parameters)
        except (TypeError, ValueError):
            parameters = set(given)
        shapes = ((len(q), self.heads, self.v_size), (len(q), self.heads))
        written = {}
        if set(self.outputs) <= parameters:
            types = (q.dtype, torch.float32)
            for name, shape, dtype in zip(self.outputs, shapes, types, strict=False):
                written[name] = torch.full(shape, math.nan, dtype=dtype, device=q.device)
        named = parameters >= set(given)
        found = self.run(**given, **written) if named else self.run(*given.values(), *written.values())
        if written:
            found = tuple(written.values())
        elif isinstance(found, dict):
            found = tuple(found[name] for name in self.outputs)
        elif isinstance(found, torch.Tensor):
            found = (found,)
        for x, shape in zip(found, shapes, strict=False):
            if tuple(x.shape) != shape:
                raise ValueError(f"an output has shape {list(x.shape)}, expected {list(shape)}")
        return found[0], found[1] if len(found) > 1 else None


def _filled(x: torch.Tensor, first: int, *sizes: int) -> torch.Tensor:
    """x with zeros up to these sizes of its dimensions from `first` on; as it is where it has them."""
    room = [n for size, has in zip(sizes, x.shape[first:], strict=True) for n in (size - has, 0)]
    return torch.nn.functional.pad(x, room[::-1]) if any(room) else x


def _paged(x: torch.Tensor, page: int, behind: float) -> torch.Tensor:
    """[B, S, H, D] as pages [B * ceil(S / page), page, H, D], a sequence's from the last to the first."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % page), value=behind)
    return padded.unflatten(1, (-1, page)).flip(1).flatten(0, 1).contiguous()


def _offsets(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """0, and the sums of all up to each."""
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
