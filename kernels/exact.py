"""The oracle: softmax(scale * Q K^T) V in float64, nothing cut, nothing approximated.

`reference_attention` is the formula to read; `exact_attention` is what runs, the same in steps of rows.

s_j = scale * <q, k_j>                                 logits, in float64
s_j = softcap * tanh(s_j / softcap)                    if a softcap is given
s_j = s_j + alibi_slope[h] * (j - (n_kv - 1))          if ALiBi slopes are given: 0 at the newest key
s_j = s_j + mask[h, t, j]                              if a mask of numbers is given
visible: n_kv - sliding_window <= j < n_kv             the newest `sliding_window` keys; of these, what a mask
                                                       of truth values and a list of keys leave
L = ln(sum_j exp(s_j) + exp(sink[h]))                  the sink is one more key whose value is 0
o = sum_j exp(s_j - L) v_j
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import PATHS, AttentionOutput, AttentionPath, Call, Result, Shape, checked_call
from verify.kernels.capabilities import Capabilities
from verify.kernels.exact_fused import can_run, fused_attention, has_fused_form
from verify.kernels.exponentials import flushed_exp_
from verify.kernels.heads import Heads
from verify.kernels.kernel import Kernel
from verify.kernels.lengths import first_sequence, lengths_of, unseen_keys
from verify.kernels.oracle_products import PRODUCTS, Product, products_in_use
from verify.kernels.sequences import sequences
from verify.kernels.trace import Launched, Signature

# Two ways of the same float64 sums lie no farther apart, relative to the norm of the result.
FUSED_AGREES = 1e-13
# Logits held at once, in elements. A fixed rule of shapes and device, so that no bit depends on free memory.
_LOGITS_AT_ONCE, _LOGITS_AT_ONCE_CUDA = 1 << 23, 1 << 26
# Of float64 logits on a CPU, for its caches: heads go one after another where all hold more.
_LOGITS_IN_CACHE = 1 << 17
# Calls of at least so many rows go in steps of rows, which leave out most keys that no row sees; on a GPU
# with several sequences at once.
_ROWS_OF_MANY, _ROW_STEPS, _ROW_STEPS_CUDA = 64, 4, 2


def reference_attention(call: Call) -> AttentionOutput:
    """out [B, T, Hq, Dv] and lse [B, T, Hq] in float64, all logits of a sequence at once: slow, but to be
    read."""
    out, lse = _nothing_seen(call)
    for sequence in sequences(call):
        k, v = (x.double().repeat_interleave(call.shape.ratio, dim=1) for x in (sequence.k, sequence.v))
        s = call.scale * torch.einsum("thd,shd->ths", sequence.q.double(), k)
        if call.softcap is not None:
            s = call.softcap * torch.tanh(s / call.softcap)
        j, n_kv = torch.arange(len(k), device=s.device), sequence.kv_len[:, None, None]
        if call.alibi_slopes is not None:
            s = s + call.alibi_slopes.double()[:, None] * (j - (n_kv - 1))
        hidden = (j >= n_kv) | (j < n_kv - (call.sliding_window or len(k)))
        if (mask := sequence.mask) is not None:
            seen = mask if mask.dtype == torch.bool else ~torch.isneginf(mask)
            s = s if mask.dtype == torch.bool else s + mask.double().transpose(0, 1)
            hidden = hidden | ~seen.transpose(0, 1)
        s = s.masked_fill(hidden, -math.inf)
        sink = s.new_tensor(-math.inf) if call.sinks is None else call.sinks.double()
        its_lse = torch.logaddexp(torch.logsumexp(s, -1), sink)
        # A row that sees no key: exp(-inf) = 0, and not exp(-inf + inf).
        p = torch.exp(s - its_lse.clamp(min=-1e300)[..., None])
        out[sequence.at], lse[sequence.at] = torch.einsum("ths,shd->thd", p, v), its_lse
    return AttentionOutput(out, lse)


def _nothing_seen(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of rows that see nothing, to be filled."""
    out = call.q.new_zeros((*call.q.shape[:3], call.shape.v_size), dtype=torch.float64)
    return out, call.q.new_full(call.q.shape[:3], -math.inf, dtype=torch.float64)


def exact_attention(call: Call, bmm: Product | None = None, *, with_lse: bool = True) -> AttentionOutput:
    """out [B, T, Hq, Dv] and lse [B, T, Hq] in float64; lse is NaN without `with_lse`, which is faster.

    bmm: how float64 matrices are multiplied; None: as this process does on the call's device.
    """
    if bmm is None:
        bmm = PRODUCTS[products_in_use(call.q.device)]
    shape = call.shape
    fused = bmm is torch.bmm and shape.rows >= _ROWS_OF_MANY and has_fused_form(call)
    if fused and can_run(call.q.device) and _fused_agrees(call.q.device, shape.heads):
        return fused_attention(call)
    logits = shape.q_heads * shape.keys * -(-shape.rows // _ROW_STEPS_CUDA)
    if not call.q.is_cuda or shape.rows < _ROWS_OF_MANY or 2 * logits > _LOGITS_AT_ONCE_CUDA:
        return _attention(call, bmm, with_lse)
    lengths = lengths_of(call.kv_len)
    if lengths.of_first is None or call.has_forms:
        return _attention(call, bmm, with_lse)
    count = 1 << (_LOGITS_AT_ONCE_CUDA // logits).bit_length() - 1
    return _sequences_together(call, count, bmm, with_lse)


@functools.cache
def _fused_agrees(device: torch.device, heads: Heads) -> bool:
    """Whether exact attention in one launch compiles for these heads, and says what `_attention` says: asked
    once a process, of a drawn call."""
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int, count: int, size: int) -> torch.Tensor:
        return torch.randn((2, rows, count, size), generator=generator, dtype=torch.float64).to(device)

    keys = 3 * _ROWS_OF_MANY
    q, k, v = (
        drawn(_ROWS_OF_MANY + 1, heads.q, heads.k_size),
        drawn(keys, heads.kv, heads.k_size),
        drawn(keys, heads.kv, heads.v_size),
    )
    kv_len = torch.arange(keys - 2 * _ROWS_OF_MANY - 1, keys, 2, dtype=torch.int32, device=device)
    call = checked_call(q, k, v, kv_len=kv_len.expand(2, -1).contiguous(), scale=heads.k_size**-0.5)
    try:
        found = fused_attention(call)
    except Exception:
        # Whatever it is: matrix products are there.
        return False
    due = _attention(call, torch.bmm, with_lse=True)
    pairs = (found.out, due.out), (found.lse, due.lse)
    return all(bool((mine - its).norm() <= FUSED_AGREES * its.norm()) for mine, its in pairs)


def _sequences_together(
    call: Call, count: int, bmm: Product = torch.bmm, with_lse: bool = True
) -> AttentionOutput:
    """Sequences of equal lengths, `count` at a time, as further KV heads of one.

    There are always `count`, the last ones repeated if need be: a product of fewer could have other bits.
    """
    outs, lses, kv_len = [], [], first_sequence(call.kv_len)
    for first in range(0, call.shape.batch, count):
        which = torch.arange(first, first + count, device=call.q.device).clamp(max=call.shape.batch - 1)
        q, k, v = (x[which].transpose(0, 1).flatten(1, 2)[None] for x in (call.q, call.k, call.v))
        sinks, slopes = (
            None if given is None else given.repeat(count) for given in (call.sinks, call.alibi_slopes)
        )
        together = replace(call, q=q, k=k, v=v, kv_len=kv_len, sinks=sinks, alibi_slopes=slopes)
        found = _attention(together, bmm, with_lse)
        wanted = slice(0, min(count, call.shape.batch - first))
        outs.append(found.out[0].unflatten(1, (count, -1)).transpose(0, 1)[wanted])
        lses.append(found.lse[0].unflatten(1, (count, -1)).transpose(0, 1)[wanted])
    return AttentionOutput(torch.cat(outs), torch.cat(lses))


def _attention(call: Call, bmm: Product, with_lse: bool) -> AttentionOutput:
    q, scale, shape = call.q, call.scale, call.shape
    # A power of two multiplies without rounding: the queries, of which there are fewer than logits. What is
    # multiplied in slices is as it was.
    of_queries = scale if bmm is torch.bmm and math.frexp(scale)[0] == 0.5 else 1.0
    scale = scale / of_queries
    sinks = None if call.sinks is None else call.sinks.to(torch.float64)
    r, heads = shape.ratio, shape.kv_heads
    out, lse = _nothing_seen(call)
    at_once = _LOGITS_AT_ONCE_CUDA if q.is_cuda else _LOGITS_AT_ONCE
    chunk = max(at_once // max(shape.q_heads * shape.keys, 1), 1)
    if shape.rows >= _ROWS_OF_MANY:
        chunk = min(chunk, -(-shape.rows // (_ROW_STEPS_CUDA if q.is_cuda else _ROW_STEPS)))
    query_heads = torch.arange(shape.q_heads, device=q.device).view(heads, r)
    for sequence in sequences(call):
        keys = sequence.k.to(torch.float64).permute(1, 2, 0)  # [Hkv, Dk, S]
        values = sequence.v.to(torch.float64).permute(1, 0, 2)  # [Hkv, S, Dv]
        b, own = sequence.at
        before, _ = unseen_keys(sequence.lengths, len(sequence.k), call.sliding_window)
        if before.stop:
            # 0 * NaN is NaN: a page before the window may be another's by now.
            values = values.clone()
            values[:, before] = 0.0
        for first in range(own.start, own.stop, chunk):
            rows = slice(first, min(first + chunk, own.stop))
            within = slice(rows.start - own.start, rows.stop - own.start)
            n_kv, visible = sequence.kv_len[within], sequence.lengths[within]
            least, last = min(visible), max(*visible, 1)
            queries = sequence.q[within].to(torch.float64) * of_queries  # [t, Hq, Dk]
            t = queries.shape[0]
            grouped = queries.view(t, heads, r, -1).permute(1, 0, 2, 3).reshape(heads, t * r, -1)
            positions = torch.arange(last, device=q.device)
            mask = sequence.mask_of(within, slice(0, last), query_heads, kv_heads=heads)
            options = (call.softcap, call.alibi_slopes, call.sliding_window, mask)
            plain = all(option is None for option in options)
            # All rows see the first `least` keys.
            hidden = positions[least:] >= n_kv.view(-1, 1, 1)
            together = heads
            if plain and bmm is torch.bmm and not q.is_cuda:
                together = min(max(_LOGITS_IN_CACHE // (t * r * last), 1), heads)
            for its in (slice(h, min(h + together, heads)) for h in range(0, heads, together)):
                count = its.stop - its.start
                s = bmm(grouped[its], keys[its, :, :last])
                s = (s if scale == 1.0 else s.mul_(scale)).view(count, t, r, last)
                if plain:
                    _hide(s[..., least:], hidden)
                else:
                    s = finish_logits(s, n_kv, positions, call, mask)
                at = rows, slice(its.start * r, its.stop * r)
                if q.is_cuda and not with_lse and sinks is None and mask is None and least > 0:
                    # The same, in one pass over the logits.
                    o = bmm(s.softmax(-1).view(count, t * r, last), values[its, :last])
                    out[b][at] = o.view(count, t, r, -1).permute(1, 0, 2, 3).reshape(t, count * r, -1)
                    lse[b][at] = math.nan
                    continue
                top = s.amax(-1)
                of_sinks = None if sinks is None else sinks.view(heads, 1, r)[its]
                if of_sinks is not None:
                    top = torch.maximum(top, of_sinks)
                shift = torch.where(torch.isneginf(top), 0.0, top)
                p = s.sub_(shift[..., None])
                # Where keys are hidden e^x underflows, which costs more: by themselves.
                for columns in (p[..., :least], p[..., least:]):
                    flushed_exp_(columns)
                total = p.sum(-1)
                if of_sinks is not None:
                    total = total + torch.exp(of_sinks - shift)
                o = bmm(p.view(count, t * r, last), values[its, :last]).view(count, t, r, -1)
                empty = total == 0
                o = o / torch.where(empty, 1.0, total)[..., None]
                log = torch.where(empty, -math.inf, shift + torch.log(total))
                out[b][at] = o.permute(1, 0, 2, 3).reshape(t, count * r, -1)
                lse[b][at] = log.permute(1, 0, 2).reshape(t, count * r)
    return AttentionOutput(out, lse)


def finish_logits(
    s: torch.Tensor,
    n_kv: torch.Tensor,
    positions: torch.Tensor,
    call: Call,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled products [Hkv, t, r, n] of t rows with keys `positions` [n], made into masked logits.

    n_kv [t]: keys up to each row's last; softcap, ALiBi slopes and sliding window are the call's; mask: of
    these rows and keys, in a shape that broadcasts to s. Works in the dtype of `s`; keys that a row does not
    see become -inf.
    """
    heads, _, r, _ = s.shape
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    n_kv = n_kv.view(1, -1, 1, 1)
    if call.alibi_slopes is not None:
        s = s + call.alibi_slopes.to(s.dtype).view(heads, 1, r, 1) * (positions - (n_kv - 1)).to(s.dtype)
    hidden = positions >= n_kv
    if call.sliding_window is not None:
        hidden = hidden | (positions < n_kv - call.sliding_window)
    if mask is not None:
        if mask.dtype == torch.bool:
            hidden = hidden | ~mask
        else:
            s = s + mask.to(s.dtype)
    return _without(s, hidden)


def _hide(s: torch.Tensor, hidden: torch.Tensor) -> None:
    """s = -inf in place where a mask that broadcasts to it says so."""
    if s.is_cuda:
        s.masked_fill_(hidden, -math.inf)
    else:
        s.copy_(_without(s, hidden))


def _without(s: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """s with -inf where a mask that broadcasts to it says so."""
    if not s.is_cuda and hidden.numel() < s.numel():
        # An addition is a tenth of a choice on a CPU; it makes NaN of what is not finite, and then shows it.
        without = s + torch.zeros(hidden.shape, dtype=s.dtype).masked_fill_(hidden, -math.inf)
        if not bool(torch.isnan(without.amax())):
            return without
    return s.masked_fill(hidden, -math.inf)


class ExactKernel(Kernel):
    """`exact`: the oracle behind the contract, rounded once to float32.

    acc: `float64`; `int8` or `double-float32`, whose products are sums of products of slices
    (`int8_products`, `sliced_products`); None: what this process uses.
    """

    as_if_alone = True

    def __init__(self, spec: str, acc: str | None = None) -> None:
        super().__init__(spec)
        self.acc = acc

    def run(self, call: Call) -> Result:
        acc = self.acc or products_in_use(call.q.device)
        result = exact_attention(call, PRODUCTS[acc])
        signature = Signature("exact", acc, (), (), "one")
        launched = Launched.every_row(call.path, call.n_kv, signature)
        return Result(result.out.float(), result.lse.float(), launched)

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        # Only the rounding of the result to float32 is left.
        return Arithmetic(p="f32", block=max(shape.keys, 1), cuts_at=lambda n_kv: (0, n_kv))

    def capabilities(self) -> Capabilities:
        # Products of many rows at once: other shapes, other bits.
        return Capabilities(
            plans=False, head_groups=False, row_alone=False, paths=PATHS, paged=True, packed=True,
            mask=True, key_list=True,
        )  # fmt: skip
