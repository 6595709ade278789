"""The plugin of pytest: the fixture `attention_check`, the marker `attention`, and `--attention-report DIR`.

    @pytest.mark.attention(shapes=["8/2x64"], n_kv=[65, 300], families=["probes", "needles"])
    def test_mine(attention_check):
        attention_check(my_kernel)

Loads neither torch nor anything of ours until a test asks for it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from verify.check import Report

# What a marker may say; a list of any of the first three makes a test of each of its members.
SPREAD = {"shapes": "shapes", "n_kv": "n_kv", "families": "families", "dtype": "dtype", "paths": "paths"}
INDEX = "index.md"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attention", "attention kernels (verify)")
    group.addoption(
        "--attention-report",
        metavar="DIR",
        default=None,
        help="write a page and a JSON file of every attention check into this folder",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "attention(shapes, n_kv, families, dtype, paths, **options): a test of attention_check for each of"
        " these; the rest as of verify.check_attention",
    )
    if (folder := config.getoption("--attention-report")) is not None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise pytest.UsageError(f"--attention-report {folder}: {error.strerror}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every combination that the marker names."""
    marker = metafunc.definition.get_closest_marker("attention")
    if marker is None or "attention_case" not in metafunc.fixturenames:
        return
    if marker.args:
        raise pytest.UsageError(f"{metafunc.function.__name__}: attention: expected keywords alone")
    lists = {
        name: [x] if isinstance(x, str | int) else list(x)
        for name, x in marker.kwargs.items()
        if name in SPREAD and x is not None
    }
    others = {name: x for name, x in marker.kwargs.items() if name not in SPREAD}
    cases = [
        {**dict(zip(lists, values, strict=True)), **others} for values in itertools.product(*lists.values())
    ]
    several = [name for name, each in lists.items() if len(each) > 1] or list(lists)
    ids = ["-".join(str(case[name]) for name in several) or "default" for case in cases]
    metafunc.parametrize("attention_case", cases, ids=ids)


@pytest.fixture
def attention_case() -> dict[str, Any]:
    """What the marker asks for in this test: keywords of `verify.check_attention`."""
    return {}


@pytest.fixture
def attention_check(request: pytest.FixtureRequest, attention_case: dict[str, Any]) -> Callable[..., Report]:
    """`attention_check(fn, **more)`: `verify.check_attention` with what the marker says, as an assertion.

    Returns the report; fails the test where the verdict is none of identical, improved, round-off; skips it
    where the kernel takes none of the inputs.
    """
    count = itertools.count()

    def check(fn: Any, **more: Any) -> Report:
        from verify.check import check_attention

        asked = {**attention_case, **more}
        for name in ("shapes", "families"):
            if isinstance(asked.get(name), str):
                asked[name] = [asked[name]]
        report = check_attention(fn, **asked)
        request.node.user_properties.append(("attention_verdict", report.verdict))
        if (folder := request.config.getoption("--attention-report")) is not None:
            _write(Path(folder), request.node.nodeid, next(count), report)
        if report.verdict == "inconclusive":
            # Probes find faults and compare nothing: none was found.
            if list(asked.get("families") or []) == ["probes"] and "none was found" in report.reasons[0]:
                return report
            if "takes none of the inputs" in report.reasons[0]:
                pytest.skip(f"{report.name}: takes none of the inputs {asked.get('families', '')}")
        __tracebackhide__ = True
        if not report.ok:
            pytest.fail(report.text(), pytrace=False)
        return report

    return check


def _write(folder: Path, nodeid: str, number: int, report: Report) -> None:
    """One check's page and JSON, named after its test: processes of xdist write files of their own."""
    name = re.sub(r"[^\w.=-]+", "_", nodeid).strip("_") + (f"-{number}" if number else "")
    page = f"<!doctype html><meta charset=utf-8><title>{name}: {report.verdict}</title>{report._repr_html_()}"
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
    (folder / f"{name}.json").write_text(report.to_json(), encoding="utf-8")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A list of all checks, by whichever process began them."""
    folder = session.config.getoption("--attention-report")
    if folder is None or hasattr(session.config, "workerinput"):
        return
    import json

    lines = ["| check | kernel | verdict | why |", "|---|---|---|---|"]
    for file in sorted(Path(folder).glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        why = found["reasons"][0].replace("|", "\\|") if found["reasons"] else ""
        lines.append(f"| [{file.stem}]({file.stem}.html) | {found['name']} | {found['verdict']} | {why} |")
    Path(folder, INDEX).write_text("\n".join(lines) + "\n", encoding="utf-8")
