"""`verify props`: the table, a failure that can be repeated, JUnit XML, exit codes, bad input."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings

from support.cli import assert_refused, verify
from verify.laws import LAWS
from verify.laws.cases import Parts, Problem, Rule
from verify.laws.draws import part_lists
from verify.laws.run import DATABASE

USER = Path(__file__).parents[1] / "support/user_kernels.py"
BROKEN = f"py:{USER}::last_key_dropped"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example database lies in the current folder."""
    monkeypatch.chdir(tmp_path)


def test_laws_that_hold_give_a_table_and_exit_code_0() -> None:
    done = verify(
        "props", "eager", "--law", "merge", "--law", "head-groups", "--law", "caches", "--examples", "3"
    )
    assert done.returncode == 0
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "holds" in rows["merge-exact"] and "of 1" in rows["merge-exact"]
    assert "exact" in rows["head-groups"]
    assert "n/a" in rows["caches"] and "reads no quantised cache" in rows["caches"]
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
    with pytest.raises(AssertionError, match="times the tolerance"):
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
    assert "1 laws hold, 0 broken, 1 not applicable" in done.stdout


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
        (("eager", "--junit", "/no/such/folder/x.xml"), ("no such folder",)),
        (("py:nowhere.py::f",), ("no such file",)),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], said: tuple[str, ...]) -> None:
    assert_refused(verify("props", *arguments), *said)


def test_cases_are_read_as_they_are_written() -> None:
    cases = [
        Problem(n_kv=(65, 0), dtype="bf16", cuts=(3, 3), groups=(2, 1), seed=7),
        Parts(((-float("inf"), 0), (1.5, -3)), order=(0,), shift=-4),
        Rule(ratio=12, n_kv=8192, policy="ik-1183"),
    ]
    for case in cases:
        assert type(case).from_json(case.to_json()) == case
        assert eval(str(case)) == case
    assert str(Problem(n_kv=(2,), cuts=(1,))) == "Problem(n_kv=(2,), cuts=(1,))"


@given(part_lists(least=2, most=5, order=True))
@settings(max_examples=20)
def test_orders_of_merging_take_neighbours_that_are_left(case: Parts) -> None:
    assert len(case.order) == len(case.parts) - 1
    assert all(pair < len(case.parts) - 1 - i for i, pair in enumerate(case.order))
