"""Files as flashinfer-bench has them, of 4/2 heads of 32: definitions, and right and other solutions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

AXES = {
    "tokens": {"type": "var"}, "pages": {"type": "var"}, "ends": {"type": "var"}, "ids": {"type": "var"},
    "keys": {"type": "var"}, "num_qo_heads": {"type": "const", "value": 4},
    "num_kv_heads": {"type": "const", "value": 2}, "head_dim": {"type": "const", "value": 32},
    "page_size": {"type": "const", "value": 16},
}  # fmt: skip
_Q = {"shape": ["tokens", "num_qo_heads", "head_dim"], "dtype": "float16"}
_CACHE = {"shape": ["pages", "page_size", "num_kv_heads", "head_dim"], "dtype": "float16"}
_KEYS = {"shape": ["keys", "num_kv_heads", "head_dim"], "dtype": "float16"}
_ENDS = {"shape": ["ends"], "dtype": "int32"}
_IDS = {"shape": ["ids"], "dtype": "int32"}
_SCALE = {"shape": None, "dtype": "float32"}
OUTPUTS = {"output": _Q, "lse": {"shape": ["tokens", "num_qo_heads"], "dtype": "float32"}}

# Of one sequence: q [t, 4, 32], k and v [n, 2, 32]; its lse in powers of two.
ATTEND = """
import math
import torch


def one(q, k, v, scale):
    t, n = len(q), len(k)
    if n == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    k, v = (x.float().repeat_interleave(2, 1) for x in (k, v))
    s = torch.einsum("thd,shd->ths", q.float(), k) * scale
    s = s.masked_fill(torch.arange(n) > torch.arange(n - t, n)[:, None, None], -math.inf)
    return torch.einsum("ths,shd->thd", s.softmax(-1), v).to(q.dtype), s.logsumexp(-1) / math.log(2)
"""
PAGED = (
    ATTEND
    + """

def run(q, k_cache, v_cache, kv_indptr, kv_indices, kv_last_page_len, sm_scale):
    assert q.shape[1:] == (4, 32) and k_cache.shape[1:] == (16, 2, 32)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf)
    for b in range(len(q)):
        ids = kv_indices[kv_indptr[b] : kv_indptr[b + 1]].long()
        n = max(len(ids) - 1, 0) * 16 + int(kv_last_page_len[b])
        k, v = (x[ids].flatten(0, 1)[:n] for x in (k_cache, v_cache))
        out[b : b + 1], lse[b : b + 1] = one(q[b : b + 1], k, v, sm_scale)
    return out, lse
"""
)
RAGGED = (
    ATTEND
    + """

def run(q, k, v, qo_indptr, kv_indptr, sm_scale):
    rows, keys = ([slice(a, b) for a, b in zip(x[:-1], x[1:])] for x in (qo_indptr, kv_indptr))
    found = [one(q[r], k[s], v[s], sm_scale) for r, s in zip(rows, keys)]
    return {"output": torch.cat([x for x, _ in found]), "lse": torch.cat([y for _, y in found])}
"""
)
# The same, into outputs that it is given; and with all of the last page's keys.
INTO = (
    PAGED.replace("sm_scale):\n    assert", "sm_scale, output, lse):\n    assert")
    .replace("    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf)\n", "    out = output\n")
    .replace("    return out, lse\n", "")
)
WHOLE_PAGES = PAGED.replace("int(kv_last_page_len[b])", "16 * (len(ids) > 0)")
# The last results, by where q lies.
REMEMBERS = (
    PAGED.replace("def run(", "def right(")
    + """

seen = {}


def run(q, k_cache, v_cache, kv_indptr, kv_indices, kv_last_page_len, sm_scale):
    if (q.data_ptr(), q.shape) not in seen:
        seen[q.data_ptr(), q.shape] = right(
            q, k_cache, v_cache, kv_indptr, kv_indices, kv_last_page_len, sm_scale
        )
    return seen[q.data_ptr(), q.shape]
"""
)


def definition(kind: str = "paged", reference: str = "", **changed: Any) -> dict[str, Any]:
    """Of paged decode or ragged prefill."""
    paged = {"q": _Q, "k_cache": _CACHE, "v_cache": _CACHE, "kv_indptr": _ENDS, "kv_indices": _IDS,
             "kv_last_page_len": _IDS, "sm_scale": _SCALE}  # fmt: skip
    ragged = {"q": _Q, "k": _KEYS, "v": _KEYS, "qo_indptr": _ENDS, "kv_indptr": _ENDS, "sm_scale": _SCALE}
    return {
        "name": f"gqa_{kind}_h4_kv2_d32",
        "op_type": f"gqa_{kind}",
        "axes": AXES,
        "inputs": paged if kind == "paged" else ragged,
        "outputs": OUTPUTS,
        "reference": reference or (PAGED if kind == "paged" else RAGGED),
        **changed,
    }


def solution(source: str, *, path: str = "main.py", entry: str = "main.py::run") -> dict[str, Any]:
    """Of the paged definition, in one file."""
    return {
        "name": "one",
        "definition": "gqa_paged_h4_kv2_d32",
        "spec": {"language": "python", "entry_point": entry},
        "sources": [{"path": path, "content": source}],
    }


def in_a_set(folder: Path, one: dict[str, Any]) -> Path:
    """A solution as it lies in a set of files, its definition beside it."""
    definitions, solutions = folder / "definitions/gqa_paged", folder / "solutions/me/gqa_paged"
    for each in (definitions, solutions):
        each.mkdir(parents=True)
    (definitions / "gqa_paged_h4_kv2_d32.json").write_text(json.dumps(definition()))
    (solutions / "one.json").write_text(json.dumps(one))
    return solutions / "one.json"
