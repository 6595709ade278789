"""A run as one record: it is saved by field, read back whole, and runs of an earlier schema are read too."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from support.cli import assert_refused, verify
from verify.arms.records import SCHEMA
from verify.gen.record import GenRun
from verify.judge.run_verdict import run_verdict
from verify.judge.verdict import Decision
from verify.machine.command_line import command_line
from verify.machine.errors import UsageError
from verify.machine.jsontext import to_json_text
from verify.machine.records import as_json, record_from_json
from verify.ppl.record import PairRecord, PplRun, ppl_run_from_json

ROOT = Path(__file__).parents[2]
# Folders that an earlier version left, with the reports that it made of them.
EARLIER = ROOT / "tests/fixtures/schema-2"


@dataclasses.dataclass(frozen=True)
class Inner:
    size: float
    limits: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: list[Inner]
    by_name: dict[str, Inner | None] = dataclasses.field(default_factory=dict)
    counts: list[int] = dataclasses.field(default_factory=list)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A copy of the folders of an earlier version, to be changed."""
    return Path(shutil.copytree(EARLIER, tmp_path / "earlier"))


def test_a_record_is_saved_by_field_and_read_back() -> None:
    outer = Outer("a", [Inner(1.5, (0.5, 2.0)), Inner(2.0)], {"x": Inner(1.0), "y": None}, [3])
    written = as_json(outer)
    assert written["inner"] == [{"size": 1.5, "limits": [0.5, 2.0]}, {"size": 2.0, "limits": None}]
    assert record_from_json(Outer, json.loads(json.dumps(written)), "file") == outer


def test_what_is_no_number_is_null_in_a_file_and_nan_in_a_record() -> None:
    text = to_json_text(as_json(Inner(math.nan, (1.0, math.inf))))
    assert json.loads(text) == {"size": None, "limits": [1.0, None]}
    read = record_from_json(Inner, json.loads(text), "file")
    assert read.limits is not None
    assert math.isnan(read.size) and math.isnan(read.limits[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 3}, "run.json: name: expected a text, got 3"),
        ({"inner": None}, "run.json: inner: expected a list, got None"),
        ({"inner": [{"size": "big"}]}, "run.json: inner[0].size: expected a number, got 'big'"),
        ({"inner": [{"size": True}]}, "run.json: inner[0].size: expected a number, got True"),
        ({"inner": [{}]}, "run.json: no inner[0].size there, expected a number"),
        ({"inner": [{"size": 1, "limits": [1]}]}, "inner[0].limits: expected 2 values, got [1]"),
        ({"by_name": {"x": 4}}, "run.json: by_name.x: expected an object, got 4"),
        ({"counts": [1.5]}, "run.json: counts[0]: expected a whole number, got 1.5"),
    ],
)
def test_a_message_names_file_and_field(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        record_from_json(Outer, {"name": "a", "inner": [], **change}, "run.json")
    assert said in str(refused.value)


@pytest.mark.parametrize("command", ["ppl", "gen"])
def test_a_run_of_the_schema_before_is_read_and_reported_as_it_was(earlier: Path, command: str) -> None:
    before = (earlier / command / "report.md").read_text().splitlines()
    done = verify("report", str(earlier / command))
    assert done.returncode == 0, done.stderr
    # What a verdict means is told since, and a limit that says nothing is not printed; all else stands as it
    # stood.
    before = [line.replace("a distance ratio from 1.26e+09", "no distance ratio") for line in before]
    now = (earlier / command / "report.md").read_text().splitlines()
    assert [line for line in now if line and not line.startswith("Means: ")] == list(filter(None, before))
    assert json.loads((earlier / command / "run.json").read_text())["schema"] == 2


def test_a_run_of_the_first_schema_is_read(earlier: Path) -> None:
    """It had the ratio alone in `detectable`, no frozen casts, and none of the sections after `pairs`."""
    stored = json.loads((earlier / "ppl/run.json").read_text())
    for name in ("noise", "power", "drift", "by_n_kv", "top1_changes", "engines", "tensor_parallel", "speed"):
        del stored[name]
    stored |= {"schema": 1, "detectable": {"candidate": 1.3}}
    for arm in stored["arms"]:
        del arm["frozen"]
    (earlier / "ppl/run.json").write_text(json.dumps(stored))
    assert verify("report", str(earlier / "ppl")).returncode == 0
    report = (earlier / "ppl/report.md").read_text()
    assert "could have seen a distance ratio from 1.3, on 62 tokens" in report


def test_a_run_is_the_same_after_it_was_saved_and_read(earlier: Path) -> None:
    stored = json.loads((earlier / "ppl/run.json").read_text())
    run = ppl_run_from_json(stored, "run.json")
    again = json.loads(to_json_text(as_json(run)))
    # What the record adds are the keys that came after.
    for arm in again["arms"]:
        assert (arm.pop("bitwise_equal"), arm.pop("calls")) == (None, "")
    for pair in again["pairs"]:
        assert pair.pop("energy_ratio") is None and pair.pop("judged_calls") is None
    for line in again["coverage"]:
        assert [line.pop(name) for name in ("tokens_a_call", "page", "sequences")] == [None, 0, 1]
    for kernel in again["in_place"]:
        assert kernel.pop("lse_budget_ratio") is None
    assert again["speed"].pop("processes") == 1
    assert again.pop("headroom") is None
    assert [again.pop(name) for name in ("alone", "caches", "free_noise", "path_alone")] == [[]] * 4
    assert again == stored


def test_a_later_schema_is_refused(earlier: Path) -> None:
    path = earlier / "ppl/run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": SCHEMA + 1}))
    done = verify("report", str(earlier / "ppl"))
    assert_refused(done, "run.json", f"schema {SCHEMA + 1}", f"at most {SCHEMA}")


def test_resume_refuses_a_run_of_another_schema_by_name(earlier: Path) -> None:
    folder = earlier / "ppl"
    (folder / "run.json").unlink()
    (folder / "groups").mkdir()
    done = verify("ppl", "--resume", str(folder))
    assert_refused(done, f"--resume {folder}", "schema 2", f"expected {SCHEMA}")


@pytest.mark.parametrize(("run", "page"), [(PplRun, "run-json.md"), (GenRun, "generation.md")])
def test_every_key_is_in_the_documentation(run: type, page: str) -> None:
    texts = [(ROOT / "docs" / name).read_text() for name in {page, "run-json.md"}]
    for name in keys_of(run):
        assert any(name in text for text in texts), name


def keys_of(kind: Any) -> set[str]:
    """Names of the fields of a record, and of the records in it."""
    found = set()
    for name, inner in get_type_hints(kind).items():
        found.add(name)
        for part in records_in(inner):
            found |= keys_of(part)
    return found


def records_in(kind: Any) -> list[Any]:
    if dataclasses.is_dataclass(kind):
        return [kind]
    return [record for inner in getattr(kind, "__args__", ()) for record in records_in(inner)]


def test_a_command_line_is_what_a_shell_takes() -> None:
    settings = {
        "file": "my text.txt",
        "candidates": ["a", "b:kv=2"],
        "power": True,
        "capture": None,
        "seed": 0,
    }
    line = command_line(["ppl"], settings, defaults={"seed": 0, "candidates": ("a",)})
    assert line == "verify ppl -f 'my text.txt' --candidate a --candidate b:kv=2 --power"
    assert command_line(["ppl"], {"candidates": ["a"]}, defaults={"candidates": ("a",)}) == "verify ppl"


def test_a_run_has_the_gravest_verdict_and_the_reasons_for_it() -> None:
    fine, worse = Decision("round-off", ["inside"]), Decision("degraded", ["farther"])
    assert run_verdict([("a", fine)], []) == ("round-off", 0, ["inside"])
    assert run_verdict([("a", fine), ("b", worse)], []) == ("degraded", 1, ["b: farther"])
    assert run_verdict([("a", fine)], ["the control differs"]) == ("void", 4, ["the control differs"])


def test_a_pair_needs_no_more_than_its_names_and_verdict() -> None:
    pair = PairRecord(reference="b", candidate="c", path="decode", verdict="broken", reasons=[])
    assert math.isnan(pair.kld_mean) and pair.distance_ratio is None
