"""A check in a cell of a notebook shows a table and a picture; where nbclient is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

CODE = """
import torch, verify

def wrong(q, k, v, *, kv_len, scale):
    k, v = (x.float().repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    s = torch.einsum("bthd,bshd->bths", q.float(), k) * scale
    hidden = torch.arange(k.shape[1]) >= (kv_len - 1)[:, :, None, None]
    return torch.einsum("bths,bshd->bthd", s.masked_fill(hidden, -torch.inf).softmax(-1), v)

verify.check_attention(wrong, n_kv=33, paths="decode", families=["gaussian", "needles"])
"""


@pytest.mark.pictures
def test_a_cell_shows_a_table_and_a_picture(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    nbclient.NotebookClient(
        book, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [out.data["text/html"] for out in book.cells[0].outputs if "text/html" in out.get("data", {})]
    assert len(shown) == 1 and "broken" in shown[0]
    assert "<table>" in shown[0] and "<figcaption>" in shown[0]
    assert shown[0].count("<svg") >= 2
