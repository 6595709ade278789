"""Kernels of other libraries: against the oracle where they run, by what they are given where not."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from support.peer_checks import agrees_with_exact
from support.problems import problem
from verify.kernels.call import Call
from verify.kernels.capabilities import Capabilities
from verify.kernels.catalogue import CATALOGUE, LIBRARY_CAPABILITIES, SDPA_CAPABILITIES
from verify.kernels.errors import KernelFailure, SpecError
from verify.kernels.exact import exact_attention
from verify.kernels.heads import Heads
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.peers.libraries import LibraryKernel
from verify.kernels.peers.peer import PeerKernel, aligned
from verify.kernels.peers.sdpa import SdpaKernel
from verify.kernels.registry import BUILDERS, build_kernel


@pytest.mark.parametrize("spec", ["sdpa:math", "sdpa:flash", "flex"])
def test_on_the_cpu_they_are_attention(spec: str) -> None:
    kernel = agrees_with_exact(spec, torch.device("cpu"), n_kv=(300, 257))
    if spec == "flex":
        assert kernel.notes == ["the compiled kernel did not run: `flex` ran in plain torch (no CUDA device)"]


@pytest.mark.parametrize("path", ["decode", "prefill"])
def test_a_row_that_sees_nothing_is_refused_not_guessed(path: str) -> None:
    call = problem(rows=2, path=path)
    call.kv_len[0, 0] = 0
    with pytest.raises(KernelFailure, match="takes no row that sees no key") as caught:
        build_kernel("sdpa:math").run(call)
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("sdpa:math", {"softcap": 5.0}, "sdpa:math: has no softcap"),
        ("sdpa:flash", {"path": "prefill"}, "sdpa:flash: has no path prefill"),
        ("flex", {"sinks": torch.zeros(6)}, "flex: has no sinks"),
    ],
)
def test_what_they_lack_is_refused(spec: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(KernelFailure, match=said):
        build_kernel(spec).run(problem(rows=3, **options))


def test_what_torch_has_no_kernel_for_is_unsupported_in_its_own_words() -> None:
    """The capabilities would refuse it before: they are widened."""
    kernel = build_kernel("sdpa:flash")
    assert isinstance(kernel, PeerKernel)
    kernel._capabilities = Capabilities(lse=False)
    with pytest.raises(
        KernelFailure, match=r"sdpa:flash: torch has no kernel for this call: .*last dim"
    ) as got:
        kernel.run(
            draw(
                "gaussian",
                InputSizes(n_kv=(5,), heads=Heads.grouped(kv=2, ratio=6, k_size=64, v_size=32)),
                seed=0,
            )
        )
    assert got.value.kind == "unsupported"
    assert "disabled" not in str(got.value)


def test_a_backend_that_is_not_deterministic_is_let_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN is refused by torch where deterministic algorithms are demanded, as they are here."""
    seen: list[int] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> torch.Tensor:
        seen.append(torch.get_deterministic_debug_mode())
        return torch.zeros_like(q)

    monkeypatch.setattr("verify.kernels.peers.sdpa.F.scaled_dot_product_attention", attend)
    before = torch.get_deterministic_debug_mode()
    assert before
    for variant in ("cudnn", "math"):
        kernel = SdpaKernel(f"sdpa:{variant}", variant)
        kernel._capabilities = replace(kernel._capabilities, devices=("cpu",))
        kernel.run(problem(rows=1))
        assert torch.get_deterministic_debug_mode() == before
    assert seen == [0, before]
    assert SDPA_CAPABILITIES["cudnn"].lacks("deterministic")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("sdpa", "expected one of sdpa:flash, sdpa:cudnn, sdpa:math, sdpa:efficient"),
        ("sdpa:fast", "expected one of sdpa:flash"),
        ("flex:flash", "'flash' is not of the form option=value"),
        ("sdpa:math,heads=8+4", "unknown option 'heads'"),
    ],
)
def test_bad_specifications(spec: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        build_kernel(spec)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_what_needs_a_gpu_or_a_library_says_so() -> None:
    with pytest.raises(SpecError, match="'sdpa:cudnn': cannot run here: no CUDA device"):
        build_kernel("sdpa:cudnn")
    for name in LIBRARY_CAPABILITIES:
        reason = "no CUDA device" if importlib.util.find_spec(name) else "is not installed"
        with pytest.raises(SpecError, match=reason):
            build_kernel(name)


def test_limits_are_stated_before_anything_is_built() -> None:
    limits = {name: has.limits() for entry in CATALOGUE.values() for name, has in entry.limits.items()}
    assert "has only devices cuda" in limits["sdpa:cudnn"]
    assert "has only head sizes that are multiples of 8" in limits["sdpa:cudnn"]
    assert "returns no log-sum-exp" in limits["ggml"]
    assert "has only head sizes 64, 128, 256" in limits["flashinfer"]
    assert CATALOGUE.keys() == BUILDERS.keys()
    assert Capabilities().limits() == []
    assert Capabilities(paths=("decode",), ratios=(1, 2, 4)).limits() == [
        "has only paths decode", "has only ratios 1, 2, 4",
    ]  # fmt: skip


class Stand:
    """In the place of a library: exact attention behind its documented signature, and what it was given."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, ...]:
        """q [Hq, D], k and v [n, Hkv, D]; out [Hq, D], lse [Hq]."""
        ratio = q.shape[0] // k.shape[1]
        k, v = (x.float().repeat_interleave(ratio, 1) for x in (k, v))
        s = torch.einsum("hd,nhd->hn", q.float(), k) * scale
        return torch.einsum("hn,nhd->hd", s.softmax(-1), v).half(), s.logsumexp(-1)

    def single_decode_with_kv_cache(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sm_scale: float, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.given = more
        out, lse = self.attend(q, k, v, sm_scale)
        return out, lse / math.log(2.0)

    def flash_attn_with_kvcache(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.given = more
        n = int(more["cache_seqlens"][0])
        out, lse = self.attend(q[0, 0], k[0, :n], v[0, :n], softmax_scale)
        return out[None, None], lse[None, :, None]

    def memory_efficient_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        assert k.shape[2:] == q.shape[2:]
        out, _ = self.attend(q[0, 0].flatten(0, 1), k[0].flatten(1, 2), v[0].flatten(1, 2), scale)
        return out.view(q.shape)


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[LibraryKernel, Stand]]:
    """A library's kernel with a stand-in behind it; its tensors may lie on the CPU."""

    def build(name: str) -> tuple[LibraryKernel, Stand]:
        there = Stand()
        monkeypatch.setitem(sys.modules, name, there)  # type: ignore[arg-type]
        if name == "xformers":
            monkeypatch.setitem(sys.modules, "xformers.ops", there)  # type: ignore[arg-type]
        monkeypatch.setattr(
            "verify.kernels.peers.libraries.version_of", lambda distribution: distribution + " 1"
        )
        kernel = LibraryKernel(name, name)
        kernel._capabilities = Capabilities(
            **{**vars(LIBRARY_CAPABILITIES[name]), "devices": ("cpu",), "k_sizes": None}
        )
        return kernel, there

    return build


def ragged() -> Call:
    call = problem(batch=2, rows=4)
    call.kv_len.copy_(torch.tensor([[4, 1, 3, 2], [2, 2, 4, 1]], dtype=torch.int32))
    return call


@pytest.mark.parametrize("name", LIBRARY_CAPABILITIES)
def test_libraries_get_each_row_and_its_own_keys(name: str, stand: Any) -> None:
    kernel, _ = stand(name)
    call = ragged()
    found, due = kernel.run(call), exact_attention(call)
    assert (found.out - due.out).abs().max() < 2e-3
    if kernel.capabilities().lse:
        # FlashInfer's base-2 logarithm comes out as a natural one.
        assert (found.lse - due.lse).abs().max() < 1e-5
    else:
        assert bool(found.lse.isnan().all())
    assert sum(found.launched.rows.values()) == 8


@pytest.mark.parametrize(
    ("name", "option", "given"),
    [
        ("flashinfer", {"sliding_window": 3}, {"window_left": 2}),
        ("flashinfer", {"softcap": 4.0}, {"logits_soft_cap": 4.0, "window_left": -1}),
        ("flash_attn", {"sliding_window": 3}, {"window_size": (2, 0), "softcap": 0.0}),
        ("flash_attn", {"softcap": 4.0}, {"window_size": (-1, -1), "softcap": 4.0}),
    ],
)
def test_options_reach_the_library(
    name: str, option: dict[str, Any], given: dict[str, Any], stand: Any
) -> None:
    kernel, there = stand(name)
    kernel.run(problem(rows=1, **option))
    assert {key: there.given[key] for key in given} == given


def test_what_vector_loads_cannot_read_is_copied() -> None:
    whole = torch.arange(2 * 7 * 3 * 16, dtype=torch.float16).view(1, 14, 3, 16)
    assert aligned(whole) is whole
    assert aligned(whole[:, 3:]) is not None and aligned(whole[:, 3:]).data_ptr() == whole[:, 3:].data_ptr()
    shifted = whole.flatten()[1:513].view(1, 8, 4, 16)
    narrow = torch.zeros(1, 8, 3, 20, dtype=torch.float16)[..., :16]
    for x in (shifted, narrow):
        copy = aligned(x)
        assert torch.equal(copy, x) and copy.data_ptr() % 16 == 0
        assert all(step * copy.element_size() % 16 == 0 for step in copy.stride()[:-1])
