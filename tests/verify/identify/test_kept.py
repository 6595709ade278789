"""Readings are kept from run to run, and used where a call shows that the kernel has not changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from verify.identify.kept import folder, read_or_known
from verify.identify.learning import learn
from verify.identify.told import acc_contradictions
from verify.kernels.foreign.function_kernel import FunctionKernel
from verify.kernels.heads import Heads
from verify.kernels.identify.asking import Regime
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes

HEADS = Heads(4, 1, 64, 64)
REGIME = Regime(64, n_q=2, kv_heads=1)


class Counted:
    """A textbook kernel; p: type of P, which its source does not say; calls: that were made."""

    def __init__(self) -> None:
        self.p, self.calls = torch.float32, 0

    def attend(self, q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> torch.Tensor:
        self.calls += 1
        ratio = q.shape[2] // k.shape[2]
        s = scale * torch.einsum("bthd,bshd->bhts", q.float(), k.float().repeat_interleave(ratio, 2))
        s = s.masked_fill(torch.arange(k.shape[1]) >= kv_len[:, None, :, None], -torch.inf)
        p = torch.exp(s - s.amax(-1, keepdim=True))
        wide = v.float().repeat_interleave(ratio, 2)
        o = torch.einsum("bhts,bshd->bhtd", p.to(self.p).float(), wide) / p.sum(-1, keepdim=True)
        return o.transpose(1, 2)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VERIFY_CACHE", str(tmp_path / "readings"))
    return tmp_path / "readings"


def test_a_reading_is_used_again_after_one_call(kept: Path) -> None:
    counted = Counted()
    kernel = FunctionKernel(counted.attend)
    first, before = read_or_known(kernel, "decode", REGIME), counted.calls
    assert before > 30 and len(list(kept.iterdir())) == 1
    assert read_or_known(kernel, "decode", REGIME) == first and counted.calls == before + 1
    # Other sizes are another reading.
    read_or_known(kernel, "decode", REGIME._replace(n_kv=65))
    assert len(list(kept.iterdir())) == 2


def test_a_kernel_that_gives_other_bits_is_read_anew(kept: Path) -> None:
    counted = Counted()
    kernel = FunctionKernel(counted.attend)
    assert read_or_known(kernel, "decode", REGIME).p == "f32"
    counted.p = torch.bfloat16
    assert read_or_known(kernel, "decode", REGIME).p == "bf16"
    assert len(list(kept.iterdir())) == 1


def test_files_that_hold_nothing_of_ours_are_read_over(kept: Path) -> None:
    kernel = FunctionKernel(Counted().attend)
    first = read_or_known(kernel, "decode", REGIME)
    (file,) = kept.iterdir()
    for text in ("", "[]", '{"bits": "", "reading": {}}', '{"reading": 3}'):
        file.write_text(text)
        assert read_or_known(kernel, "decode", REGIME) == first
    assert "reading" in file.read_text()


def test_nothing_is_kept_where_nothing_can_be(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FunctionKernel(Counted().attend)
    monkeypatch.setenv("VERIFY_CACHE", "off")
    assert folder() is None and read_or_known(kernel, "decode", REGIME).p == "f32"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VERIFY_CACHE", str(tmp_path / "file"))
    assert read_or_known(kernel, "decode", REGIME).p == "f32"
    assert not kept.exists()


def test_what_is_stated_is_denied_from_the_length_on_where_it_is_not_so(kept: Path) -> None:
    one = read_or_known(FunctionKernel(Counted().attend), "decode", REGIME)
    lengths = [(64, "f32"), (4096, "f32"), (8192, "f16"), (16384, "f16")]
    seen = [replace(one, n_kv=n_kv, accumulator=acc) for n_kv, acc in lengths]
    says = "py:mine.py::attend,acc=f32"
    assert acc_contradictions(says, seen) == ["says acc=f32, sums in float16 from 8192 keys on"]
    assert acc_contradictions(says, seen[2:]) == ["says acc=f32, sums in float16 at 8192 keys"]
    assert acc_contradictions(says, seen[:2]) == acc_contradictions("py:mine.py::attend", seen) == []


def test_calls_of_one_token_and_of_many_are_readings_of_their_own(kept: Path) -> None:
    """P is bfloat16 of several query tokens; between the numbers that were read it is assumed no finer."""
    counted = Counted()

    def attend(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> torch.Tensor:
        counted.p = torch.bfloat16 if q.shape[1] > 1 else torch.float32
        return counted.attend(q, k, v, kv_len=kv_len, scale=scale)

    kernel = FunctionKernel(attend, spec="py:mine.py::attend,acc=f16", acc="f16")
    said = learn(
        kernel,
        [HEADS],
        [64],
        path="decode",
        dtype=torch.float16,
        device="cpu",
        calls=[("decode", 1), ("decode", 8)],
    )
    assert "says acc=f16, sums in float32 at 64 keys" in said[-1]
    for rows, p in ((1, "f32"), (2, "bf16"), (8, "bf16"), (20, "bf16")):
        call = draw("gaussian", InputSizes(n_kv=(64,) * rows, heads=HEADS, edges=()), 0)
        assert (kernel.arithmetic_of(call).p, kernel.arithmetic_of(call).identified) == (p, rows != 2)
