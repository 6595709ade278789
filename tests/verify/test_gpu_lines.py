"""`benchmarks/gpu_all.py` and `compare.py`: what is due runs in its time, what got slower is said."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The two scripts, which import what lies beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import compare
        import gpu_all

        return {"compare": compare, "gpu_all": gpu_all}


def result(us: float, gb_s: float, wall_s: float, *, spread: float = 0.1) -> dict[str, Any]:
    line = {"kernel": "flash", "n_kv": 8192, "us": us, "low_us": us - spread, "high_us": us + spread}
    return {
        "environment": {"gpu": "H200", "threads": 16},
        "glm": [line, line | {"n_kv": 65536, "us": 50.0}, {"kernel": "copy", "gb_s": gb_s}],
        "seconds": {"products": wall_s, "scoring": [1.0, 1.1, 0.9]},
    }


def test_what_is_slower_than_its_noise_is_named_and_nothing_else(scripts: Any) -> None:
    compare = scripts["compare"]
    old = result(10.0, 4000.0, 6.0)
    slower = [c.name for c in compare.changes(old, result(11.0, 4000.0, 6.5)) if c.slower]
    assert slower == ["glm[kernel flash, n_kv 8192]/us"]  # 6.5 for 6.0 s, seen once, may be chance
    slower = [c.name for c in compare.changes(old, result(10.1, 3000.0, 8.0)) if c.slower]
    assert slower == ["glm[kernel copy]/gb_s", "seconds/products"]
    assert not [c for c in compare.changes(old, result(9.0, 5000.0, 5.0)) if c.slower]
    # The same eleven of repeats that lie far apart.
    assert not [c for c in compare.changes(old, result(11.0, 4000.0, 6.0, spread=1.0)) if c.slower]


def test_compare_ends_with_one_where_something_is_slower(tmp_path: Path) -> None:
    files = [tmp_path / "old.json", tmp_path / "new.json", tmp_path / "none.json"]
    for file, held in zip(files, (result(10.0, 4000.0, 6.0), result(12.0, 4000.0, 6.0), {}), strict=True):
        file.write_text(json.dumps(held))
    done = [
        subprocess.run(
            [sys.executable, str(BENCHMARKS / "compare.py"), str(files[0]), str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
        for file in files
    ]
    assert [one.returncode for one in done] == [0, 1, 2]
    assert "10 -> 12, 1.20 times" in done[1].stdout and "1 of 5 figures" in done[1].stdout


def test_all_lines_fit_into_twelve_minutes_and_name_options_that_there_are(scripts: Any) -> None:
    gpu_all = scripts["gpu_all"]
    assert sum(line.limit_s for line in gpu_all.LINES if not line.by_name) <= gpu_all.ALL == 720
    # Twelve minutes have no room for the tests beside what is timed.
    assert [line.name for line in gpu_all.LINES if line.by_name] == ["tests"]
    for line in gpu_all.LINES:
        script = Path(line.words[1])
        if script.suffix == ".py":
            text = script.read_text()
            assert all(f'"{word}"' in text for word in line.words if word.startswith("-")), line.name


def test_a_list_runs_nothing(scripts: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gpu_all = scripts["gpu_all"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["gpu_all.py", "ppl", "tests", "--list", "--out", str(tmp_path / "x.json")]
        )
        assert gpu_all.main() == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ppl", "tests", "840"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu_all.py", "--list"])
        assert gpu_all.main() == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.endswith("by name alone") for line in lines] == [x.by_name for x in gpu_all.LINES]
    assert last == f"{sum(x.limit_s for x in gpu_all.LINES if not x.by_name)} s at most"
    assert not list(tmp_path.iterdir())


def test_the_file_is_written_as_it_goes_and_a_line_ends_at_its_limit(scripts: Any, tmp_path: Path) -> None:
    gpu_all, out = scripts["gpu_all"], tmp_path / "all.json"
    held = tmp_path / "held"
    code = (
        "import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text('[7]'); print('fine'); sys.exit(3)"
    )
    reads = f"import shutil; shutil.copy({str(out)!r}, {str(held)!r})"
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    lines = [
        gpu_all.Line("writes", 60, (sys.executable, "-c", code, "{out}"), ""),
        gpu_all.Line("library", 60, (sys.executable, "{ggml}"), ""),
        gpu_all.Line("reads", 60, (sys.executable, "-c", reads), ""),
        gpu_all.Line("hangs", 1, (sys.executable, "-c", hangs), ""),
    ]
    started = time.perf_counter()
    done = gpu_all.run_all(lines, {"text": "", "ggml": "", "workers": "1"}, out)
    assert time.perf_counter() - started < 50
    assert (done[0]["code"], done[0]["result"], done[0]["said"]) == (3, [7], "fine\n")
    assert done[1] == {"name": "library", "left_out": "not given: ggml"}
    assert (done[2]["code"], done[3]["code"]) == (0, 124)
    assert [one["name"] for one in json.loads(held.read_text())["lines"]] == ["writes", "library"]
    assert len(json.loads(out.read_text())["lines"]) == 4
