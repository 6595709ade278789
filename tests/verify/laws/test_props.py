"""`verify props`: the table, a failure that can be repeated, JUnit XML, exit codes, bad input."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis.database import InMemoryExampleDatabase

from support.cli import assert_refused, verify
from support.subjects import assert_keeps, kernel_subject, tile_subject
from verify.kernels.budget.arithmetic import Arithmetic, loosest
from verify.kernels.budget.bound import error_budget
from verify.kernels.call import Call, Result
from verify.kernels.eager import EagerKernel
from verify.kernels.errors import KernelFailure
from verify.kernels.faults import FAULTS
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.trace import Launched
from verify.laws import LAWS, subject_of
from verify.laws.cases import Parts, Problem, Rule
from verify.laws.draws import part_lists
from verify.laws.law import Law, LawBroken
from verify.laws.run import DATABASE, LawResult, run_law
from verify.laws.tolerance import against_exact

USER = Path(__file__).parents[2] / "support/user_kernels.py"
BROKEN = f"py:{USER}::last_key_dropped"


@pytest.fixture(autouse=True)
def _elsewhere(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example database lies in the current folder. Only the test of it needs the smallest case."""
    monkeypatch.chdir(tmp_path)
    if "shrunk" not in request.node.name:
        monkeypatch.setattr("verify.laws.run.SHRINK_SECONDS", 0.2)


@pytest.fixture
def by_the_loosest(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reading would allow is not what is asked here, and it takes a hundred calls of each kind."""
    monkeypatch.setattr("verify.laws.law.learn_as_asked", lambda kernel, device: None)


def test_laws_that_hold_give_a_table_and_exit_code_0() -> None:
    done = verify(
        "props",
        "eager:cache=q8_0",
        *("--law", "merge", "--law", "head-groups"),
        "--law",
        "rotation",
        "--examples",
        "3",
    )
    assert done.returncode == 0
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "holds" in rows["merge-exact"] and "of 1" in rows["merge-exact"]
    assert "exact" in rows["head-groups"]
    assert "n/a" in rows["rotation"] and "has a quantised cache already" in rows["rotation"]
    merges = sum(law.group == "merge" for law in LAWS.values())
    assert f"{merges + 1} laws hold, 0 broken, 1 not applicable; {3 * (merges + 1)} examples" in done.stdout


def test_a_broken_law_is_shrunk_and_can_be_repeated(tmp_path: Path) -> None:
    junit = tmp_path / "props.xml"
    done = verify("props", BROKEN, "--law", "within-budget", "--examples", "50", "--junit", str(junit))
    assert done.returncode == 1
    assert "BROKEN" in done.stdout
    # The smallest row that there is shows it.
    found = re.search(r"again: verify (props .*)", done.stdout)
    assert found is not None
    assert '{"n_kv": [1]}' in found[1]
    again = verify(*shlex.split(found[1]))
    assert again.returncode == 1
    said = re.search(r"found: (.*)", done.stdout)
    assert said is not None and said[0] in again.stdout
    # The snippet is a test that fails.
    code = done.stdout[done.stdout.index("    from verify.laws") :]
    snippet = "\n".join(line[4:] for line in code.splitlines() if line.startswith("    "))
    names: dict[str, object] = {}
    exec(snippet, names)
    with pytest.raises(AssertionError, match="exact zeros where numbers are due"):
        names["test_within_budget"]()  # type: ignore[operator]
    (case,) = ElementTree.parse(junit).getroot()
    failure = case.find("failure")
    assert case.get("name") == "within-budget" and failure is not None
    assert found[1] in (failure.text or "")
    # What broke it once is tried first the next time.
    assert any((tmp_path / DATABASE).iterdir())
    once_more = verify("props", BROKEN, "--law", "within-budget", "--examples", "50", "--json")
    (law,) = json.loads(once_more.stdout)["laws"]
    assert law["examples"] == 1 and law["state"] == "broken"


def test_a_kernel_without_lse_is_not_judged_by_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        USER.read_text()
        + "\n\ndef no_lse(q, k, v, *, kv_len, scale):\n"
        + "    return good(q, k, v, kv_len=kv_len, scale=scale)[0]\n"
    )
    done = verify("props", "py:mine.py::no_lse", "--law", "lse-exact", "--law", "two-runs", "--examples", "3")
    assert done.returncode == 0, done.stdout
    assert "not applicable: returns no log-sum-exp" in " ".join(done.stdout.split())
    assert "1 law holds, 0 broken, 1 not applicable" in done.stdout


def test_a_kernel_that_raises_breaks_a_law_and_not_the_command() -> None:
    done = verify("props", f"py:{USER}::raises", "--law", "within-budget", "--examples", "3")
    assert done.returncode == 1
    assert "no such luck" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("eager", "--law", "merge-comutes"), ("unknown law", "did you mean 'merge-commutes'")),
        (("eagr",), ("unknown kernel 'eagr'", "did you mean 'eager'")),
        (("eager", "--examples", "0"), ("--examples",)),
        (("eager", "--case", "{}"), ("--case: needs the --law",)),
        (("eager", "--law", "kv-parts", "--case", "{n_kv"), ("not JSON",)),
        (("eager", "--law", "kv-parts", "--case", "[1]"), ("expected an object",)),
        (("eager", "--law", "kv-parts", "--case", '{"n_kw": [1]}'), ("unknown field 'n_kw'", "n_kv")),
        (("eager", "--law", "kv-parts", "--case", '{"n_kv": 1}'), ("n_kv: expected a list, got 1",)),
        (("eager", "--law", "kv-parts", "--case", '{"n_kv": [-1]}'), ("n_kv: expected",)),
        (("eager", "--law", "kv-parts", "--case", '{"family": "x"}'), ("family: expected one of gaussian",)),
        (("eager", "--law", "merge-exact", "--case", '{"parts": []}'), ("at least one part",)),
        (("eager", "--law", "kv-parts", "--case", '{"n_kv": [5], "block": 10}'), ("multiple of 16",)),
        (
            ("eager", "--law", "kv-parts", "--case", '{"n_kv": [5], "ratio": 3, "groups": [2, 2]}'),
            ("sum to ratio = 3",),
        ),
        (("eager", "--law", "kv-parts", "--case", '{"n_kv": [5], "k_size": 100000000000}'), ("k_size",)),
        (("eager", "--law", "kv-parts", "--case", '{"n_kv": [5], "spare": -5}'), ("spare",)),
        (("eager", "--law", "parts-merge", "--case", '{"n_kv": [5], "cuts": [50]}'), ("cuts: expected",)),
        (
            ("flash", "--law", "caches", "--case", '{"n_kv": [5], "cache": "nope"}'),
            ("cache 'nope': unknown type",),
        ),
        (("eager", "--law", "groups-sum", "--case", '{"policy": "nope"}'), ("unknown policy",)),
        (("eager", "--junit", "/no/such/folder/x.xml"), ("no such folder",)),
        (("eager", "--junit", "/"), ("--junit /: is a folder",)),
        (("py:nowhere.py::f",), ("no such file",)),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], said: tuple[str, ...]) -> None:
    assert_refused(verify("props", *arguments), *said)


def test_cases_are_read_as_they_are_written() -> None:
    cases = [
        Problem(n_kv=(65, 0), ratio=3, dtype="bf16", cuts=(3, 3), groups=(2, 1), seed=7),
        Parts(((-float("inf"), 0), (1.5, -3)), order=(0,), shift=-4),
        Rule(ratio=12, n_kv=8192, policy="ik-1183"),
    ]
    for case in cases:
        assert type(case).from_json(case.to_json()) == case
        assert eval(str(case)) == case
    assert str(Problem(n_kv=(2,), cuts=(1,))) == "Problem(n_kv=(2,), cuts=(1,))"


def test_laws_before_an_interruption_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def cut_off(law: Law, *more: Any, **options: Any) -> LawResult:
        if len(tried) == 2:
            raise KeyboardInterrupt
        tried.append(law.name)
        return run_law(law, *more, **options)

    monkeypatch.setattr("verify.laws.run.run_law", cut_off)
    junit = tmp_path / "props.xml"
    done = verify("props", "eager", "--law", "merge", "--examples", "3", "--junit", str(junit), "--json")
    assert done.returncode == 130
    assert [law["name"] for law in json.loads(done.stdout)["laws"]] == tried
    assert "interrupted after 2 of" in done.stderr
    assert junit.is_file()


@given(part_lists(least=2, most=5, order=True))
@settings(max_examples=20)
def test_orders_of_merging_take_neighbours_that_are_left(case: Parts) -> None:
    assert len(case.order) == len(case.parts) - 1
    assert all(pair < len(case.parts) - 1 - i for i, pair in enumerate(case.order))


ATTENTION = """
import os, time
import torch

def right(q, k, v, kv_len, scale):
    ratio = q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(ratio, 2) for x in (k, v))
    s = torch.einsum("bthd,bshd->bths", q.double(), k) * scale
    hidden = torch.arange(k.shape[1]) >= kv_len[..., None]
    s = s.masked_fill(hidden[:, :, None], -float("inf"))
    p = torch.nan_to_num(s.softmax(-1))
    return torch.einsum("bths,bshd->bthd", p, torch.nan_to_num(v)).float(), s.logsumexp(-1).float()

def dies(q, k, v, *, kv_len, scale):
    if kv_len.max() == 65:
        os._exit(3)
    return right(q, k, v, kv_len, scale)

def hangs(q, k, v, *, kv_len, scale):
    if kv_len.max() >= 65:
        open(__file__ + ".hung", "a").write("once\\n")
        time.sleep(60)
    return right(q, k, v, kv_len, scale)

def nan_lse(q, k, v, *, kv_len, scale):
    out, lse = right(q, k, v, kv_len, scale)
    return out, lse * float("nan")

def no_lse(q, k, v, *, kv_len, scale):
    return right(q, k, v, kv_len, scale)[0]

def short_of_long_rows(q, k, v, *, kv_len, scale):
    out, lse = right(q, k, v, kv_len, scale)
    return torch.where((kv_len >= 200)[..., None, None], 0.8 * out, out), lse
"""


def of_user(tmp_path: Path, function: str, *options: str) -> str:
    (tmp_path / "user.py").write_text(ATTENTION)
    return ",".join((f"py:{tmp_path / 'user.py'}::{function}", *options))


@pytest.mark.slow
def test_a_kernel_that_dies_at_one_length_is_alive_at_the_others(tmp_path: Path) -> None:
    """Each broken law has a case that breaks it when it is tried again, and the reason is the death."""
    laws = ("--law", "within-budget", "--law", "masked-keys")
    done = verify("props", of_user(tmp_path, "dies"), *laws, "--examples", "40", "--seed", "0")
    assert done.returncode == 1
    again = re.findall(r"again: verify (props .*)", done.stdout)
    assert again
    assert done.stdout.count("exit code 3") >= len(again)
    assert all("65" in command for command in again)
    assert verify(*shlex.split(again[0])).returncode == 1


def test_a_kernel_that_hangs_is_waited_for_once_a_law(tmp_path: Path) -> None:
    """However many cases are tried, and smaller ones looked for."""
    # Stated, so that nothing is read off it first; a right call may wait that long for its turn.
    spec = of_user(tmp_path, "hangs", "timeout=3", "acc=f32")
    laws = ("--law", "within-budget", "--law", "large-values")
    done = verify("props", spec, *laws, "--examples", "10", "--seed", "0")
    assert done.returncode == 1
    assert "2 broken" in done.stdout and done.stdout.count("no answer within 3 s") >= 2
    assert "hung before" not in done.stdout
    assert 2 <= (tmp_path / "user.py.hung").read_text().count("once") <= 3


@pytest.mark.usefixtures("by_the_loosest")
def test_a_nan_is_no_lse_and_none_is_none(tmp_path: Path) -> None:
    law = ("--law", "lse-exact", "--examples", "3")
    assert verify("props", of_user(tmp_path, "nan_lse"), *law).returncode == 1
    done = verify("props", of_user(tmp_path, "no_lse"), *law)
    assert "returns no log-sum-exp" in done.stdout
    # The same where a printed test builds the subject.
    subject = subject_of(of_user(tmp_path, "no_lse"))
    LAWS["within-budget"].check(subject, Problem(n_kv=(1,)))
    subject.close()


class OffBy(EagerKernel):
    """Off by a share of sum p|v| in every column; its author says nothing of its arithmetic."""

    def __init__(self, share: float) -> None:
        super().__init__("off", TileOptions())
        self.share = share

    def run(self, call: Call) -> Result:
        result = super().run(call)
        size = error_budget(call, self.arithmetic_of(call)).size
        return replace(result, out=result.out + (self.share * size).float())

    def arithmetic_of(self, call: Call) -> Arithmetic:
        return loosest("f16")


def test_a_bound_that_says_nothing_still_forbids_an_eighth() -> None:
    """Of a float16 kernel nothing is known: of 300 keys its bound is a third of sum p|v|."""
    call = Problem(n_kv=(300,)).call("cpu")
    budget = error_budget(call, loosest("f16"))
    assert budget.vacuous.all()
    assert (budget.bound > 0.2 * budget.size).all()
    for share, right in ((0.1, True), (0.2, False)):
        with nullcontext() if right else pytest.raises(LawBroken, match="no correct kernel exceeds 1/8"):
            against_exact(OffBy(share), call, lse=False)


def test_values_may_be_scaled_where_nothing_is_rounded() -> None:
    """Smaller values would be subnormal in float16, and rounded."""
    cases = LAWS["values-scaled"].cases(subject_of("exact"))
    twists = set()

    @settings(max_examples=100, database=None)
    @given(cases)
    def collected(case: Problem) -> None:
        twists.add(case.twist)

    collected()
    assert twists == {1, 2, 3}


@pytest.mark.parametrize("told", [0, 1])
def test_a_trace_must_hold_every_row(told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = EagerKernel.run

    def some_rows(kernel: EagerKernel, call: Call) -> Result:
        result = plain(kernel, call)
        kinds = list(result.launched.rows)[:told]
        return replace(result, launched=Launched(dict.fromkeys(kinds, 1)))

    monkeypatch.setattr(EagerKernel, "run", some_rows)
    result = run_law(LAWS["plan-runs"], subject_of("eager"), examples=40)
    assert result.state == "broken"
    assert "the trace has rows" in result.reason


class SpoilsOthers(EagerKernel):
    """Right, but where a row is empty every other row is 7."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        if bool((call.kv_len == 0).any()):
            result.out[call.kv_len > 0] = 7.0
        return result


def test_an_empty_row_must_spoil_no_other() -> None:
    kernel = SpoilsOthers("spoils", TileOptions())
    subject = kernel_subject(kernel)
    assert run_law(LAWS["empty-rows"], subject, examples=60).state == "broken"


class RefusesAll(EagerKernel):
    asked = 0

    def run(self, call: Call) -> Result:
        self.asked += 1
        raise KernelFailure("unsupported", "nothing is taken")


def test_a_law_in_a_test_does_not_hold_of_a_kernel_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it asked for ever."""
    monkeypatch.setattr("verify.laws.run.MOST_REFUSED", 30)
    kernel = RefusesAll("refuses", TileOptions())
    subject = kernel_subject(kernel)
    with pytest.raises(AssertionError, match="nothing is taken"):
        assert_keeps(LAWS["within-budget"], subject, examples=5)
    assert kernel.asked == 30


def test_laws_that_apply_to_nothing_show_nothing() -> None:
    done = verify("props", "sdpa:math", "--law", "merge", "--examples", "3")
    assert done.returncode == 3
    assert "0 laws hold, 0 broken" in done.stdout


@pytest.mark.usefixtures("by_the_loosest")
def test_a_kernel_that_is_given_copies_is_not_asked_about_strides(tmp_path: Path) -> None:
    done = verify(
        "props", of_user(tmp_path, "no_lse"), "--law", "strides", "--law", "two-runs", "--examples", "3"
    )
    assert done.returncode == 0
    assert "is given copies without gaps" in done.stdout


def test_what_broke_a_law_is_kept_for_that_law_and_kernel() -> None:
    kept = InMemoryExampleDatabase()
    # The plain inputs that come first show neither.
    names = ("window dropped", "softcap dropped")
    subjects = [tile_subject(next(f for f in FAULTS if f.name == name).build) for name in names]
    law = LAWS["within-budget"]
    tried = [
        run_law(law, subject, examples=100, seed=1, database=kept, shrink=False).examples
        for subject in subjects * 2
    ]
    assert min(tried[:2]) > 1 and tried[2:] == [1, 1]
    keys = {bytes(key).decode("latin-1") for key in kept.data if b"hypothesis" not in key}
    assert keys and all(any(key.startswith(f"within-budget {name}") for name in names) for key in keys)


@pytest.mark.usefixtures("by_the_loosest")
def test_the_first_call_of_all_is_judged() -> None:
    spec = f"py:{USER}::first_call_unfilled,acc=f32"
    done = verify("props", spec, "--law", "first-call", "--law", "within-budget", "--examples", "3", "--json")
    laws = {law["name"]: law for law in json.loads(done.stdout)["laws"]}
    assert done.returncode == 1 and laws["first-call"]["state"] == "broken"
    assert laws["within-budget"]["state"] == "holds"
    done = verify("props", f"py:{USER}::good,acc=f32", "--law", "first-call", "--examples", "3")
    assert done.returncode == 0


@pytest.mark.usefixtures("by_the_loosest")
def test_what_another_sequence_holds_changes_no_bit() -> None:
    law = ("--law", "other-sequences", "--examples", "8", "--seed", "0")
    done = verify("props", f"py:{USER}::neighbour_leaks,acc=f32", *law)
    assert done.returncode == 1 and "other contents than sequence" in " ".join(done.stdout.split())
    assert verify("props", f"py:{USER}::good,acc=f32", *law).returncode == 0


@pytest.mark.usefixtures("by_the_loosest")
def test_other_bits_of_a_row_alone_are_counted_and_broken_where_they_are_promised() -> None:
    spec, law = (
        f"py:{USER}::alone_in_another_order,acc=f32",
        ("--law", "row-alone", "--examples", "8", "--seed", "0"),
    )
    done = verify("props", spec, *law)
    said = " ".join(done.stdout.split())
    assert done.returncode == 0 and re.search(r"bits differed in \d+ of \d+ cases, within the budget", said)
    done = verify("props", f"{spec},row_alone=bits", *law)
    assert done.returncode == 1 and "expected the same bits" in " ".join(done.stdout.split())
    assert_refused(verify("props", f"{spec},row_alone=yes", *law), "row_alone", "bits")
