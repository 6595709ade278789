"""One-hot probes: every query asks for one key, and its result is that key's value, to the bit.

The query's logit with one key lies more than 104 + ln n nats above all others, so their weights are exactly 0
in float32 and the result is exactly that key's value. Keys are words of the Reed-Muller code RM(2, m) as +-1,
D = 2^m: distance D/4, and so a logit gap of 32 sqrt(D) at q = 64 * word and the usual scale D^-1/2; there are
enough words for millions of keys. Values are tags that name the key and the KV head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from verify.kernels.call import checked_call
from verify.kernels.judging.hidden_keys import POISON
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.probes.probe import AMPLITUDE, LOW, Probe, call_of

# Weights of exp(-GAP) are 0 in float32, even times 2^17 keys: 104 + ln n.
GAP = 116.0
# Columns that are needed for it.
SMALLEST_SIZE = 16
# Rows of the one-hot probe of strides.
STRIDED_ROWS = 128


def words_of(size: int) -> int:
    """How many words the code of a head size has: as many keys can be told apart."""
    m = size.bit_length() - 1
    return 1 << 1 + m + m * (m - 1) // 2


def asking_size(sizes: InputSizes) -> int:
    """Columns of K by which a key is asked for: all, or those beyond the values where V lies in K."""
    return sizes.heads.k_size - sizes.heads.v_size if sizes.v_in_k else sizes.heads.k_size


def why_not_one_hot(sizes: InputSizes) -> str | None:
    """Why no one-hot probe can be made of these sizes, or None if it can."""
    size = asking_size(sizes)
    if size < SMALLEST_SIZE:
        return f"{size} columns of K beside its values: at least {SMALLEST_SIZE} are needed to ask for a key"
    if sizes.keys > words_of(size):
        return f"head size {size} tells {words_of(size)} keys apart, not {sizes.keys}"
    return None


def code_words(count: int, size: int, *, first: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    """Words first .. first+count-1 of RM(2, m), 2^m <= size, as +-1 in [count, size], 0 beyond 2^m.

    Two words differ in at least 2^m / 4 places. Raises ValueError if the code has fewer words.
    """
    m = size.bit_length() - 1
    columns = torch.arange(1 << m, device=device)
    bits = (columns[:, None] >> torch.arange(m, device=device)) & 1  # [2^m, m]
    pairs = [bits[:, i] & bits[:, j] for i in range(m) for j in range(i)]
    rows = torch.stack([*bits.T, *pairs, torch.ones_like(columns)]).float()
    if first + count > words_of(size):
        raise ValueError(f"head size {size}: {words_of(size)} code words, expected {first + count}")
    index = torch.arange(first, first + count, device=device)
    chosen = ((index[:, None] >> torch.arange(len(rows), device=device)) & 1).float()
    words = torch.zeros(count, size, device=device)
    words[:, : 1 << m] = 1 - 2 * torch.remainder(chosen @ rows, 2)
    return words


def tags(keys: int, kv_heads: int, size: int, *, device: torch.device | str = "cpu") -> torch.Tensor:
    """Values that name their key and head, float32 [keys, kv_heads, size], whole numbers from -64 to 64.

    Columns repeat: key's low digit, high digit, rest, and head with column; exact in every type. Signs go
    + - - + over the keys, so that sums over neighbours stay small: weights are 0 in the end, but equal ones
    until then, and an accumulator in float16 would overflow at a thousand keys of one sign.
    """
    key = torch.arange(keys, device=device, dtype=torch.int32)[:, None]
    column = torch.arange(size, device=device, dtype=torch.int32)
    head = torch.arange(kv_heads, device=device, dtype=torch.int32)[:, None]
    kind = column % 4
    of_key = torch.where(kind == 0, key % 128, torch.where(kind == 1, key // 128 % 128, key // 128**2 + 1))
    of_head = (head * 16 + column // 4 % 16) % 128
    value = torch.where(kind == 3, of_head, of_key[:, None])
    sign = 1 - 2 * ((key + key // 2) % 2)
    return ((value - 64) * sign[..., None]).float()


def one_hot(
    sizes: InputSizes,
    *,
    device: torch.device | str = "cpu",
    strided: bool = False,
    most_rows: int | None = None,
    once: bool = False,
) -> Probe:
    """Every key of the longest row, by some query head of every KV head; demands bits.

    sizes.n_kv gives the longest row alone: the probe makes as many rows as the keys need, each head of a
    group asking for another key. Rows all see n_kv keys. most_rows: of more rows, about so many are taken,
    the first and the last among them, the others evenly between. once: each key by one KV head alone, and
    by that in one of the two layouts alone, in turn: with `strided` and without, all of them.
    """
    n, r, heads = max(sizes.n_kv), sizes.heads.ratio, sizes.heads.kv
    if once:
        wanted_once = _wanted_once(n, r, heads, strided=strided)[None].to(device)
        return _one_hot("one-hot", sizes, n, wanted_once, device, strided=strided)
    rows = torch.arange(-(-n // r), device=device)
    if most_rows is not None and len(rows) > most_rows:
        rows = torch.cat((rows[:: -(-len(rows) // most_rows)], rows[-1:])).unique()
    # Query (row t, head g) asks for key t * r + g, so neighbouring heads ask for neighbouring keys; the last
    # ones wrap round to the first keys.
    wanted = (rows[:, None] * r + torch.arange(r, device=device)) % n  # [T, r]
    return _one_hot("one-hot", sizes, n, wanted.repeat(1, heads)[None], device, strided=strided)


def _wanted_once(n: int, r: int, heads: int, *, strided: bool) -> torch.Tensor:
    """[T, heads * r]: r neighbouring keys a KV head and row. Who asks for which is drawn, so that no place of
    a tile is always the same one's."""
    kinds = 2 * heads
    rows = -(-n // (r * kinds))
    drawn = torch.rand((rows, kinds), generator=torch.Generator().manual_seed(0)).argsort(1)
    own = drawn[:, heads * strided : heads * (1 + strided)]
    first = (torch.arange(rows)[:, None] * kinds + own) * r
    return ((first[..., None] + torch.arange(r)) % n).flatten(1)


def one_hot_edges(
    sizes: InputSizes,
    edges: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    name: str = "one-hot edges",
) -> Probe:
    """Keys on both sides of each edge, the first and the last, by every query head; rows of each n_kv."""
    asked, lengths = [], []
    for n in sizes.n_kv:
        keys = sorted({k for e in (0, *edges, n) for k in (e - 1, e) if 0 <= k < n})
        for turn in range(len(keys)):
            asked.append([keys[(turn + h) % len(keys)] for h in range(sizes.heads.q)])
            lengths.append(n)
    wanted = torch.tensor(asked, device=device)[None].expand(sizes.batch, -1, -1)
    return _one_hot(name, replace(sizes, n_kv=tuple(lengths)), None, wanted, device)


def _one_hot(
    name: str,
    sizes: InputSizes,
    n_kv: int | None,
    wanted: torch.Tensor,
    device: torch.device | str,
    *,
    strided: bool = False,
) -> Probe:
    """wanted [B or 1, T, Hq]: the key that each query asks for."""
    keys, heads, r = sizes.keys, sizes.heads.kv, sizes.heads.ratio
    batch, rows = sizes.batch, wanted.shape[1]
    asking = asking_size(sizes)
    words = torch.zeros(keys, sizes.heads.k_size, dtype=sizes.dtype, device=device)
    words[:, sizes.heads.k_size - asking :] = code_words(keys, asking, device=device)
    m = 1 << (asking.bit_length() - 1)
    # The gap is amplitude * m / 2 * scale: beside many columns that do not ask, a larger amplitude.
    amplitude = AMPLITUDE
    while sizes.v_in_k and amplitude * m / 2 * sizes.scale < GAP:
        amplitude *= 2
    if amplitude * m / 2 * sizes.scale < GAP:
        raise ValueError(f"head size {asking}: expected at least {SMALLEST_SIZE} for a one-hot probe")
    # Sequences differ in their tags only, so that a key of another sequence shows.
    k = words[None, :, None].expand(batch, -1, heads, -1).contiguous()
    values = tags(keys, heads, sizes.heads.v_size, device=device).to(sizes.dtype)
    v = torch.stack([values.roll(b, 0) for b in range(batch)])
    longest = max(sizes.n_kv)
    # Beyond the longest row lie keys that would win against any other, with poison as values.
    k[:, longest:], v[:, longest:] = 0.0, POISON
    wanted = wanted.expand(batch, -1, -1)
    q = amplitude * words[wanted]
    head = torch.arange(heads * r, device=device) // r
    out = torch.stack([v[b][wanted[b], head] for b in range(batch)]).double()
    lengths = torch.tensor(sizes.n_kv) if n_kv is None else torch.full((rows,), n_kv)
    call = call_of(q, k, v, lengths.expand(batch, -1), sizes, device, strided=strided)
    return Probe(name=name, demand="bits", call=call, out=out, lse=None, keys=wanted)


def strided_one_hot(sizes: InputSizes, *, device: torch.device | str = "cpu", once: bool = False) -> Probe:
    """One-hot over K and V that lie head by head, two elements off alignment; demands bits.

    A wrong stride shows at nearly every key, so at most `STRIDED_ROWS` rows are asked; once: see `one_hot`.
    """
    probe = one_hot(sizes, device=device, strided=True, most_rows=STRIDED_ROWS, once=once)
    return replace(probe, name="one-hot strided")


def far_offsets(sizes: InputSizes, *, device: torch.device | str) -> Probe:
    """One-hot at the end of a K and a V of more than 2^31 elements, and beside it. Needs about 10 GB."""
    keys = (1 << 31) // (sizes.heads.kv * min(sizes.heads.k_size, sizes.heads.v_size)) + 64
    kinds = torch.full((1, keys, 1, 1), LOW, device=device, dtype=sizes.dtype)
    n = keys - 3
    k = kinds.expand(1, keys, sizes.heads.kv, sizes.heads.k_size).contiguous()
    v = torch.zeros(1, keys, sizes.heads.kv, sizes.heads.v_size, device=device, dtype=sizes.dtype)
    k[:, n - 1] = 0
    k[:, n:] = -LOW
    v[:, n - 1], v[:, n:] = 17, POISON
    heads = sizes.heads.q
    q = torch.full(
        (1, 1, heads, sizes.heads.k_size), 8.0 / sizes.heads.k_size**0.5, device=device, dtype=sizes.dtype
    )
    lengths = torch.full((1, 1), n, dtype=torch.int32, device=device)
    call = checked_call(q, k, v, kv_len=lengths, scale=sizes.scale, path=sizes.path)
    out = torch.full((1, 1, heads, sizes.heads.v_size), 17.0, device=device, dtype=torch.float64)
    wanted = torch.full((1, 1, heads), n - 1, device=device)
    return Probe(name="offsets beyond 2^31", demand="bits", call=call, out=out, lse=None, keys=wanted)
