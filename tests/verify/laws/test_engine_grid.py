"""The operator test: a fixed grid of engines' calls, each held against its own budget."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from support.cli import assert_refused, verify
from support.ggml_builds import ggml_library
from verify.kernels.faults.altered import AlteredKernel, newest_key_unseen, next_heads_keys
from verify.kernels.registry import build_kernel
from verify.laws import engine_grid, subject_of
from verify.laws.engine_grid import HEAD_SIZES, QUERY_TOKENS, RATIOS, cells, run_cell


def test_the_grid_has_what_engines_change_kernels_at() -> None:
    grid = list(cells())
    assert len({cell.name for cell in grid}) == len(grid)
    assert {c.problem.ratio for c in grid} == {4, *RATIOS}
    assert {len(c.problem.n_kv) for c in grid} == set(QUERY_TOKENS)
    assert {(c.problem.k_size, c.problem.v_size) for c in grid} == set(HEAD_SIZES)
    lengths = {max(c.problem.n_kv) for c in grid if c.group == "length"}
    assert lengths == {255, 256, 257, 2047, 2048, 2049, 8191, 8192, 8193}
    # The newest query tokens each see one key more than the one before.
    four = next(c for c in grid if len(c.problem.n_kv) == 4)
    assert four.problem.n_kv == tuple(range(four.problem.n_kv[0], four.problem.n_kv[0] + 4))


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell of each group, short ones."""
    first: dict[str, engine_grid.Cell] = {}
    for cell in cells():
        first.setdefault(cell.group, cell)
    monkeypatch.setattr(engine_grid, "cells", lambda: iter(first.values()))


def test_our_kernel_holds_and_the_report_says_where_it_is_tightest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(monkeypatch)
    junit = tmp_path / "junit.xml"
    done = verify("props", "eager", "--profile", "engine", "--junit", str(junit), "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    found = {c["group"]: c for c in json.loads(done.stdout)["cells"]}
    assert found["length"]["state"] == found["options"]["state"] == found["head size"]["state"] == "holds"
    assert found["caches"]["state"] == "holds"
    assert "5 cells of 5 held within budget, 0 broken" in done.stderr
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("5", "0", "0")
    assert suite[0].get("name") == "r=6,n_q=1,size=128,n_kv=255"


@pytest.mark.parametrize("alter", [newest_key_unseen, next_heads_keys])
def test_a_fault_breaks_the_cells_that_meet_it(alter: object) -> None:
    subject = subject_of("eager")
    subject.kernel = AlteredKernel("wrong", build_kernel("eager"), alter)  # type: ignore[arg-type]
    grid = [c for c in cells() if max(c.problem.n_kv) < 400 and not c.problem.cache][::12]
    states = {c.name: run_cell(subject, c).state for c in grid}
    # Heads of MLA are one: there is no other to read.
    expected = {
        c.name: "broken" if c.problem.kv_heads > 1 or alter is newest_key_unseen else states[c.name]
        for c in grid
    }
    assert states == expected and "broken" in states.values()


def test_a_library_that_aborts_is_one_line_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    (tmp_path / "mine.py").write_text(
        "import os, sys, torch\n"
        "def attend(q, k, v, *, kv_len, scale):\n"
        "    if q.shape[2] // k.shape[2] == 6 and q.shape[1] == 1 and k.shape[1] > 250:\n"
        "        frames = [f'frame {i}' for i in range(200)]\n"
        "        print('GGML_ASSERT(ratio != 6) failed', *frames, sep='\\n', file=sys.stderr)\n"
        "        sys.stderr.flush()\n"
        "        os.abort()\n"
        "    r = q.shape[2] // k.shape[2]\n"
        "    k, v = (x.float().repeat_interleave(r, 2) for x in (k, v))\n"
        "    s = torch.einsum('bthd,bshd->bths', q.float(), k) * scale\n"
        "    s = s.masked_fill(torch.arange(k.shape[1]) >= kv_len[..., None, None], float('-inf'))\n"
        "    return torch.einsum('bths,bshd->bthd', s.softmax(-1), v)\n"
    )
    spec = f"py:{tmp_path / 'mine.py'}::attend"
    done = verify("props", spec, "--profile", "engine", "--device", "cpu")
    assert done.returncode == 1
    broken = [line for line in done.stdout.splitlines() if line.startswith("BROKEN")]
    assert any(
        "r=6,n_q=1,size=128,n_kv=255" in line and "GGML_ASSERT(ratio != 6) failed" in line for line in broken
    )
    assert "frame" not in done.stdout
    # It was started again: later cells were asked.
    assert "query tokens" in done.stdout and "1 broken" in done.stdout.splitlines()[-1]


def test_bad_input() -> None:
    assert_refused(verify("props", "--profile", "user"), "--profile user: expected engine")
    assert_refused(
        verify("props", "--profile", "engine", "--law", "row-alone"), "expected no --law or --case"
    )
    assert_refused(
        verify("props", "--profile", "engine", "--junit", "/none/x"), "--junit /none/x: no such folder"
    )


@pytest.mark.slow
@pytest.mark.parametrize("build", ["A", "B"])
def test_two_real_builds_of_ggml_keep_their_budgets(build: str, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    spec = f"ggml:lib={ggml_library(build)}"
    done = verify("props", spec, "--profile", "engine", "--device", "cpu", "--junit", str(junit))
    assert done.returncode == 0, done.stdout
    suite = ElementTree.parse(junit).getroot()
    # It states no ALiBi: ten cells.
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("265", "0", "10")
