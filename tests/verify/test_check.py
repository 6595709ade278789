"""`verify.check_attention`: verdicts, the worst case made again, forms, and one process or two."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import verify
from support.mypkg import ops
from support.named import named
from support.other_device import other_device
from verify.diff.run import run_diff
from verify.kernels.exact import exact_attention
from verify.kernels.judging.families import FAMILIES
from verify.kernels.judging.hidden_keys import POISON

SMALL: dict[str, Any] = {"n_kv": 65, "paths": "decode", "families": ["probes", "gaussian", "needles"]}


def sdpa(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> Any:
    seen = torch.arange(k.shape[1], device=k.device) < kv_len[:, None, :, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True).transpose(
        1, 2
    )


def newest_key_lost(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> Any:
    return sdpa(q, k, v, kv_len=kv_len - (kv_len > 64).int(), scale=scale)


def test_a_right_kernel_with_the_defaults() -> None:
    report = verify.check_attention(sdpa)
    assert report.verdict == "round-off" and report.exit_code == 0 and report.ok
    report.raise_for_verdict()
    assert {line["path"] for line in report.table} == {"decode", "prefill"}
    # Nothing is compiled for it; float16 came back, so it answers in that.
    assert report.baseline == "eager:out=f16"
    assert report.detectable is not None and 1 < report.detectable < 3


def test_small_steps_have_one_thread_and_the_callable_its_callers() -> None:
    """Two threads took eight times the processor's time on a busy machine."""
    threads, seen = torch.get_num_threads(), set()

    def attend(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> Any:
        seen.add(torch.get_num_threads())
        return sdpa(q, k, v, kv_len=kv_len, scale=scale)

    judged: list[int] = []

    def counted(*given: Any, **more: Any) -> Any:
        judged.append(torch.get_num_threads())
        return run_diff(*given, **more)

    try:
        torch.set_num_threads(3)
        with mock.patch("verify.check.run_diff", counted):
            verify.check_attention(attend, **{**SMALL, "families": ["gaussian"]}, baseline=ops.attend)
        assert (seen, judged, torch.get_num_threads()) == ({3}, [1], 3)
    finally:
        torch.set_num_threads(threads)


def test_a_gpus_kernel_is_called_there_and_judged_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is not there: nothing but the callable's own calls lies on it."""
    called: list[str] = []

    def attend(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> Any:
        called.append(str(q.device))
        assert q.device == k.device == v.device == kv_len.device
        return newest_key_lost(q, k, v, kv_len=kv_len, scale=scale)

    # What asks a GPU for its name.
    monkeypatch.setenv("VERIFY_CACHE", "off")
    monkeypatch.setattr("verify.machine.environment.describe", lambda device: {"device": device})
    with other_device() as device:
        monkeypatch.setattr("verify.check.chosen_device", lambda name: device)
        monkeypatch.setattr("verify.arms.model_facts.free_memory", lambda device: 1 << 40)
        report = verify.check_attention(attend, **SMALL, device="cuda")
        worst, smallest = report.worst, report.smallest
        assert report.verdict == "broken" and worst is not None and smallest is not None
        assert worst.q.device == smallest.k.device == worst.call.kv_len.device == device
    # Before that it was asked how it is called, on what there is.
    assert called.count(str(device)) > 10 and set(called[-10:]) == {str(device)}
    outcome = report.outcomes["decode"]
    assert outcome.run["environment"]["device"] == str(device)
    assert outcome.candidates[0].cells[0].inputs.call.q.device.type == "cpu"


def test_a_wrong_kernel_names_where_and_makes_it_again() -> None:
    report = verify.check_attention(newest_key_lost, n_kv=(64, 65), paths="decode")
    assert report.verdict == "broken" and not report.ok
    assert "only at n_kv 65" in " ".join(report.reasons)
    worst = report.worst
    assert worst is not None and "key 64" in worst.said
    smallest = report.smallest
    assert smallest is not None and (smallest.shape, smallest.n_kv) == ("1/1x16", 65)
    names: dict[str, Any] = {}
    exec(worst.snippet, names)
    again = names["call"]
    for name in ("q", "k", "v", "kv_len"):
        assert torch.equal(getattr(again, name), getattr(worst.call, name))
    with pytest.raises(verify.AttentionMismatch, match="key 64") as caught:
        report.raise_for_verdict()
    assert caught.value.report is report
    # And the inputs show the fault to whoever looks.
    out = newest_key_lost(worst.q, worst.k, worst.v, kv_len=worst.call.kv_len, scale=worst.call.scale)
    assert (out - exact_attention(worst.call).out).abs().max() > 1


@pytest.mark.parametrize(
    ("lost", "verdict"), [(1000, "broken"), (5000, "round-off")], ids=["one in a thousand", "none"]
)
def test_default_lengths_show_what_goes_wrong_in_long_rows_alone(lost: int, verdict: str) -> None:
    def keys_lost(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> Any:
        at = torch.arange(k.shape[1])
        seen = (at < kv_len[:, None, :, None]) & (at % lost != lost - 1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)

    report = verify.check_attention(
        keys_lost, paths=("decode", "prefill"), families=["gaussian"], dtype="f16", shapes="2/1x64"
    )
    assert report.verdict == verdict, report.text()
    assert any(note == "4,099 keys: 4 rows of gaussian, for faults alone" for note in report.notes)
    if verdict == "broken":
        assert report.worst is not None and report.worst.n_kv == 4099
        assert "only at n_kv 4099" in " ".join(report.reasons)
        names: dict[str, Any] = {}
        exec(report.worst.snippet, names)
        assert torch.equal(names["call"].k, report.worst.k) and torch.equal(names["call"].q, report.worst.q)
        # Budgets of each path follow from what was read on it: they are asked before the next path is read.
        assert report.smallest is not None and report.smallest.n_kv < 4099
    # Four rows are no sample: nothing but a fault is said of them.
    strata = report.outcomes["decode"].candidates[0].strata.strata
    assert {s.n_kv for s in strata} == {33, 65, 300}
    asked_by_name = verify.check_attention(keys_lost, n_kv=65, paths="decode", families=["gaussian"])
    assert asked_by_name.ok and not any("4,099" in note for note in asked_by_name.notes)


def test_a_draw_that_shows_it_is_made_again_too() -> None:
    report = verify.check_attention(
        newest_key_lost, n_kv=65, paths="prefill", families=["needles"], seeds=2, rows=16, dtype="bf16"
    )
    worst = report.worst
    assert worst is not None and report.verdict == "broken" and worst.family == "needles"
    names: dict[str, Any] = {}
    exec(worst.snippet, names)
    assert torch.equal(names["call"].k, worst.k) and worst.k.dtype == torch.bfloat16


def test_coarser_is_degraded_beside_a_finer_baseline() -> None:
    def coarse(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> Any:
        mantissa, exponent = torch.frexp(v.float())
        v = torch.ldexp(torch.round(mantissa * 512) / 512, exponent).to(v)
        return ops.attend(q, k, v, kv_len=kv_len, scale=scale)

    report = verify.check_attention(coarse, **{**SMALL, "families": ["gaussian"]}, baseline=ops.attend)
    assert report.verdict == "degraded" and report.baseline.endswith("::attend")


def test_sums_that_are_stated_or_read_give_a_budget_at_any_length() -> None:
    asked = {**SMALL, "n_kv": 1300, "families": ["gaussian"]}
    read = verify.check_attention(ops.attend, **asked)
    stated = verify.check_attention(ops.attend, **asked, arithmetic="f32")
    assert 0 < read.table[0]["budget"] < 1 and 0 < stated.table[0]["budget"] < 1
    assert any("read off it" in note for note in read.notes)
    # Which was said of its first call, before anything was read.
    assert not any("no rounding budget applies" in note for note in read.notes)


def test_what_states_nothing_is_read() -> None:
    report = verify.check_attention(ops.attend, **{**SMALL, "families": ["gaussian"]}, arithmetic="identify")
    assert any("read off it" in note for note in report.notes), report.notes
    with pytest.raises(verify.UsageError, match="tensors cannot be asked"):
        verify.budget(*(torch.zeros(1, 2, 2, 16) for _ in range(3)), arithmetic="identify")


@pytest.mark.parametrize(
    ("fn", "more"),
    [
        (ops.layer, {}),
        (ops.Attn(64).decode, {}),
        (lambda q, k, v, *, kv_len, scale: ops.attend(q, k, v, kv_len=kv_len, scale=scale), {}),
        (torch.compile(ops.attend, backend="eager"), {}),
        (F.scaled_dot_product_attention, {"layout": "bhsd"}),
        (ops.heads_first, {"layout": "bhsd"}),
        (ops.packed, {"layout": "thd", "causal": True}),
        (ops.causal, {"causal": True}),
        (ops.needs_block, {"options": {"block": 64}}),
        (ops.bf16_only, {"dtype": torch.bfloat16}),
        (f"py:{ops.__file__}::attend", {"paths": None}),
        ("eager:block=32", {}),
    ],
    ids=named,
)
def test_whatever_can_be_called_is_checked(fn: Any, more: dict[str, Any]) -> None:
    report = verify.check_attention(fn, **{**SMALL, **more})
    assert report.verdict in ("improved", "round-off", "identical"), report.text()


FORMS: dict[str, Any] = {"n_kv": 65, "paths": "decode", "families": ["probes", "gaussian"]}


@pytest.mark.parametrize(
    ("fn", "forms"),
    [
        (ops.paged, {"pages", "far-pages"}),
        (ops.varlen, {"packed"}),
        (ops.any_mask, {"mask", "tree", "key-list"}),
        (ops.attend, set()),
    ],
    ids=named,
)
def test_forms_that_a_kernel_takes_are_asked(fn: Any, forms: set[str]) -> None:
    """By default those and no others; they show faults, and no baseline need have them."""
    asked = {"sequences", "shorter", *forms, *({"unlike-rows"} if forms else ())}
    with mock.patch("verify.check.FAMILIES", {"gaussian": FAMILIES["gaussian"]}):
        report = verify.check_attention(fn, n_kv=65, paths="decode")
    assert report.ok, report.text()
    cells = report.outcomes["decode"].run["cells"]
    assert {cell["family"] for cell in cells} == {"probes", "gaussian", *asked}
    assert not any("left out" in note for note in report.notes)


def ignores_mask(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float, attn_mask: Any = None) -> Any:
    return ops.any_mask(q, k, v, kv_len=kv_len, scale=scale)


def ignores_list(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float, keys: Any = None) -> Any:
    return ops.any_mask(q, k, v, kv_len=kv_len, scale=scale)


def pages_in_order(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float, block_table: Any = None) -> Any:
    if block_table is None:
        return ops.attend(q, k, v, kv_len=kv_len, scale=scale)
    return ops.paged(q, k, v, block_table.sort(1).values, kv_len=kv_len, scale=scale)


def first_sequence_again(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float, cu_seqlens: Any = None) -> Any:
    if cu_seqlens is None:
        return ops.attend(q, k, v, kv_len=kv_len, scale=scale)
    return ops.varlen(q, k[:1].expand_as(k), v, cu_seqlens, kv_len=kv_len, scale=scale)


@pytest.mark.parametrize(
    ("fn", "form"),
    [
        (ignores_mask, "mask"),
        (ignores_list, "key-list"),
        (pages_in_order, "pages"),
        (first_sequence_again, "packed"),
    ],
    ids=named,
)
def test_a_fault_in_a_form_alone_is_found_and_made_again(fn: Any, form: str) -> None:
    report = verify.check_attention(fn, **{**FORMS, "families": ["gaussian", form]})
    assert report.verdict == "broken" and f"only at inputs {form}" in report.reasons[-1], report.text()
    worst = report.worst
    assert worst is not None and worst.family == form
    names: dict[str, Any] = {}
    exec(worst.snippet, names)
    again = names["call"]
    for name, x in {"q": worst.q, **again.options}.items():
        given = getattr(worst.call, name)
        assert torch.equal(torch.as_tensor(x if name != "q" else again.q), given), name


@pytest.mark.parametrize("path", ["several", "prefill"])
def test_some_query_tokens_a_call(path: Any) -> None:
    def one_token_alone(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> Any:
        """All rows see what the last one sees."""
        return ops.attend(q, k, v, kv_len=kv_len[:, -1:].expand_as(kv_len), scale=scale)

    asked = {**SMALL, "families": ["gaussian"], "paths": path, "n_q": 3, "sequences": 2}
    right = verify.check_attention(ops.attend, **asked)
    assert right.ok and right.baseline.startswith("eager")
    wrong = verify.check_attention(one_token_alone, **asked)
    worst = wrong.worst
    assert wrong.verdict == "broken" and worst is not None
    assert worst.path == path and worst.q.shape[:2] == (2, 3)
    names: dict[str, Any] = {}
    exec(worst.snippet, names)
    assert torch.equal(names["call"].q, worst.q) and torch.equal(names["call"].kv_len, worst.call.kv_len)


@pytest.mark.slow
def test_in_a_process_of_its_own_a_crash_is_a_finding() -> None:
    from support import user_kernels

    report = verify.check_attention(user_kernels.dies, **{**SMALL, "families": ["gaussian"]}, isolate=True)
    assert report.verdict == "broken" and "killed by SIGABRT" in report.reasons[0]
    with pytest.raises(verify.UsageError, match="cannot be imported by another process"):
        verify.check_attention(lambda q, k, v: q, isolate=True)


def test_what_it_raises_is_a_finding() -> None:
    def raises(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> Any:
        raise RuntimeError("no such luck")

    report = verify.check_attention(raises, **SMALL)
    assert report.verdict == "broken" and "no such luck" in report.text()


def test_it_changes_nothing_of_torch_and_the_callable_sees_its_own_settings() -> None:
    seen = []

    def looks(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return ops.attend(q, k, v, kv_len=kv_len, scale=scale)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.enable_grad():
            verify.check_attention(looks, **SMALL)
            assert torch.is_grad_enabled() and torch.get_float32_matmul_precision() == "medium"
        assert set(seen) == {"medium"}
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.pictures
def test_a_report_is_json_and_a_page() -> None:
    report = verify.check_attention(newest_key_lost, **SMALL)
    stored = json.loads(report.to_json())
    assert (stored["verdict"], stored["command"], stored["exit_code"]) == ("broken", "check", 1)
    assert stored["worst"]["snippet"] == report.worst.snippet  # type: ignore[union-attr]
    page = report._repr_html_()
    assert "broken" in page and "<table>" in page and page.count("<svg") >= 3
    assert "<script" not in page


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"arithmetic": "f64"}, "arithmetic='f64'"),
        ({"paths": "sideways"}, "expected decode, several or prefill"),
        ({"paths": "several", "n_q": 17}, "at most 16"),
        ({"sequences": 0}, "--sequences 0"),
        ({"paths": ()}, "at least one"),
        ({"dtype": "f8"}, "dtype=f8"),
        ({"families": ["needle"]}, "needle"),
        ({"shapes": ["3x64"]}, "3x64"),
        ({"n_kv": 0}, "0"),
        ({"rows": 1}, "1"),
        ({"layout": "sbhd"}, "layout=sbhd"),
        ({"options": {"blok": 64}}, "blok"),
        ({"baseline": "flush"}, "flush"),
        ({"margin": 0.9}, "0.9"),
    ],
    ids=named,
)
def test_bad_input_is_one_line(more: dict[str, Any], said: str) -> None:
    with pytest.raises((verify.UsageError, verify.SpecError)) as caught:
        verify.check_attention(ops.attend, **more)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_laws_take_a_callable() -> None:
    subject = verify.laws.subject_of(newest_key_lost)
    law, problem = verify.laws.LAWS["within-budget"], verify.laws.Problem(n_kv=(65,), family="needles")
    with pytest.raises(verify.laws.LawBroken):
        law.check(subject, problem)
    assert law.check(verify.laws.subject_of(sdpa), problem) <= 1


def test_a_tolerance_is_what_a_right_kernel_reaches() -> None:
    found = verify.tolerance(ops.attend, "4/2x32", n_kv=100, families=["gaussian", "needles"], seeds=2)
    assert [x.family for x in found.families] == ["gaussian", "needles"] and found.n_kv == 100
    of = found.of("gaussian")
    x = verify.families.draw("gaussian", "4/2x32", n_kv=100, seed=9)
    exact = verify.exact_attention(x.q, x.k, x.v, kv_len=x.kv_len).out
    error = (ops.attend(x.q, x.k, x.v, kv_len=x.kv_len, scale=x.scale) - exact).abs().max()
    assert error / 4 < of.absolute < of.absolute_most and float(error) < of.absolute_most
    coarse = verify.tolerance("eager:p=bf16", "4/2x32", n_kv=100, families=["gaussian"], seeds=1)
    assert coarse.of("gaussian").nmse > 100 * of.nmse
    with pytest.raises(KeyError):
        found.of("peaked")
    with pytest.raises(verify.UsageError, match="needle"):
        verify.tolerance("eager", families=["needle"])


def test_families_are_tensors_and_strategies() -> None:
    from hypothesis import given, settings

    inputs = verify.families.draw("needles", "4/2x32", n_kv=70, rows=4)
    assert inputs.q.shape == (1, 4, 4, 32) and inputs.kv_len.tolist() == [[70, 33, 70, 7]]
    assert float(inputs.v[0, 70:].float().min()) == torch.tensor(POISON).half().float()
    drawn = []

    @settings(max_examples=20, database=None, deadline=None)
    @given(verify.families.strategy(lengths=(1, 17), paths=("decode", "prefill")))
    def every(x: verify.DrawnInputs) -> None:
        drawn.append(x)
        out, _ = verify.exact_attention(x.q, x.k, x.v, kv_len=x.kv_len, scale=x.scale)
        assert torch.isfinite(out).all()

    every()
    assert len({tuple(x.q.shape) for x in drawn}) > 2
    for call, said in (
        (lambda: verify.families.draw("needle"), "did you mean 'needles'"),
        (lambda: verify.families.probe("lost key"), "known: one-hot"),
        (lambda: verify.families.summary("x"), "not known"),
    ):
        with pytest.raises(verify.UsageError, match=said):
            call()
