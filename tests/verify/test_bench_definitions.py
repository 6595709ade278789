"""flashinfer-bench's definitions and solutions, judged as kernels nobody trusts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support import flashinfer_bench_files as files
from support.cli import verify
from verify.distrust.bench_definitions import to_judge
from verify.distrust.judging import judge
from verify.kernels.exact import exact_attention
from verify.kernels.foreign.bench_call import DefinedCall
from verify.kernels.heads import Heads
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.registry import build_kernel
from verify.machine.errors import UsageError


def defined(kind: str, source: str, **more: Any) -> DefinedCall:
    """A function of the planted files, in this process."""
    scope: dict[str, Any] = {}
    exec(source, scope)  # the files are ours
    one = files.definition(kind)
    return DefinedCall(
        run=scope["run"], inputs=list(one["inputs"]), outputs=list(one["outputs"]), heads=4, kv_heads=2,
        k_size=32, v_size=32, page=16 if kind == "paged" else 0, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "source"), [("paged", files.PAGED), ("paged", files.INTO), ("ragged", files.RAGGED)]
)
@pytest.mark.parametrize("heads", [Heads(4, 2, 32, 32), Heads(2, 1, 16, 16), Heads(1, 1, 32, 16)])
@pytest.mark.parametrize("n_kv", [(33, 34, 35), (50, 16, 1), (0, 7, 48)])
def test_calls_of_the_contract_are_those_of_a_definition(
    kind: str, source: str, heads: Heads, n_kv: tuple[int, ...]
) -> None:
    """Of its heads and of fewer, of one token a sequence and of several, of lengths that end in a page."""
    call = draw("gaussian", InputSizes(n_kv=n_kv, heads=heads, batch=2, fewer=(0, 1), edges=()), 0)
    out, lse = defined(kind, source)(call.q, call.k, call.v, kv_len=call.kv_len, scale=call.scale)
    exact = exact_attention(call)
    assert out.shape == exact.out.shape and bool(((out - exact.out).abs() < 2e-3).all())
    both = torch.isfinite(exact.lse)
    assert torch.equal(both, torch.isfinite(lse)) and bool((lse - exact.lse)[both].abs().max() < 1e-4)


def test_what_a_definition_does_not_hold_is_refused_and_writes_are_seen() -> None:
    call = draw("gaussian", InputSizes(n_kv=(20,), heads=Heads(6, 2, 32, 32), edges=()), 0)
    with pytest.raises(NotImplementedError, match="4/2 heads"):
        defined("paged", files.PAGED)(call.q, call.k, call.v, kv_len=call.kv_len, scale=call.scale)
    writes = files.PAGED.replace("    return out, lse\n", "    v_cache.mul_(2)\n    return out, lse\n")
    call = draw("gaussian", InputSizes(n_kv=(20,), heads=Heads(4, 2, 32, 32), edges=()), 0)
    before = call.v.clone()
    defined("paged", writes)(call.q, call.k, call.v, kv_len=call.kv_len, scale=call.scale)
    assert not torch.equal(before, call.v)


def test_a_reference_and_a_function_stand_behind_one_specification(tmp_path: Path) -> None:
    one, mine = tmp_path / "one.json", tmp_path / "mine.py"
    one.write_text(json.dumps(files.definition("ragged")))
    mine.write_text(files.RAGGED)
    for target, given in ((str(one), None), (f"{mine}::run", str(one))):
        with to_judge(target, given) as made:
            assert (made.shape, made.dtype) == ("4/2x32", "f16")
            kernel = build_kernel(made.spec)
            call = draw("gaussian", InputSizes(n_kv=(9, 10), heads=Heads(4, 2, 32, 32), edges=()), 1)
            result = kernel.run(call)
            kernel.close()
            assert bool((result.lse - exact_attention(call).lse).abs().max() < 1e-4)


def test_a_page_that_ends_in_a_sequence_shows_a_solution_that_sees_all_of_it() -> None:
    for n_kv, is_right in ((48, True), (33, False)):
        call = draw("gaussian", InputSizes(n_kv=(n_kv,), heads=Heads(4, 2, 32, 32), edges=(), spare=0), 0)
        wrong = defined("paged", files.WHOLE_PAGES)
        out, _ = wrong(call.q, call.k, call.v, kv_len=call.kv_len, scale=call.scale)
        assert bool(((out - exact_attention(call).out).abs() < 2e-3).all()) == is_right


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "outcome"),
    [(files.WHOLE_PAGES, "broken"), (files.REMEMBERS, "cheats"), (files.INTO, "passed")],
)
def test_the_whole_of_it(tmp_path: Path, source: str, outcome: str) -> None:
    """Families, laws, cheats, and where all of that is passed a time."""
    found = judge(str(files.in_a_set(tmp_path, files.solution(source))), n_kv=(33,), examples=2)
    assert found.outcome == outcome and found.spec.endswith("one.json"), found.reasons
    assert (found.seconds is not None) == (outcome == "passed")
    if outcome == "passed":
        assert sum(r.state == "holds" for r in found.laws) >= 5, [(r.law.name, r.state) for r in found.laws]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"reference": None}, "definition: expected a text"),
        ({"inputs": {"A": {}}}, "inputs: A are not those of attention"),
        ({"axes": {**files.AXES, "page_size": {"type": "var"}}}, "axes.page_size: expected a constant"),
        ({"reference": files.PAGED.replace("softmax(-1)", "softmax(1)")}, "reference: it is not attention"),
        ({"reference": "def run(q): pass"}, "reference: it fails"),
        ({"outputs": {}}, "outputs: expected a result"),
    ],
)
def test_definitions_that_are_none_of_attention_are_refused(
    tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    one = tmp_path / "one.json"
    one.write_text(json.dumps({k: x for k, x in (files.definition() | changed).items() if x is not None}))
    with pytest.raises(UsageError) as caught, to_judge(str(one), None):
        pass
    assert words in str(caught.value) and "one.json" in str(caught.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"path": "../main.py"}, "sources[0].path"),
        ({"entry": "main.cu::run"}, "spec.entry_point"),
        ({"entry": "other.py::run"}, "spec.entry_point"),
    ],
)
def test_solutions_that_cannot_be_run_are_refused(tmp_path: Path, more: dict[str, str], words: str) -> None:
    file = files.in_a_set(tmp_path, files.solution(files.PAGED, **more))
    with pytest.raises(UsageError) as caught, to_judge(str(file), None):
        pass
    assert words in str(caught.value)


def test_the_command_says_what_a_definition_says_itself(tmp_path: Path) -> None:
    one = tmp_path / "one.json"
    one.write_text(json.dumps(files.definition()))
    done = verify("judge", str(one), "--shape", "8/2x64")
    assert done.returncode == 2 and "--shape 8/2x64: a definition says it" in done.stderr
    lost = verify("judge", str(tmp_path / "no.json"))
    assert lost.returncode == 2 and "no.json" in lost.stderr and "Traceback" not in lost.stderr
