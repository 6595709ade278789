from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from scipy import stats

from support.cli import assert_refused, verify
from verify.engines import sweep
from verify.engines.sweep import change_point, fit_line, theil_sen
from verify.engines.sweep_log import SweepRow, read_logs

HEADER = (
    "|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |\n"
    "|-------|--------|--------|----------|----------|----------|----------|\n"
)
DEPTHS = [4096 * i for i in range(9)]


@pytest.fixture
def published() -> tuple[str, str]:
    folder = SHARED / "data/sweep-bench"
    if not folder.is_dir():
        pytest.skip("the published sweep-bench logs are not beside this checkout")
    return str(folder / "glm47-turing-main.md"), str(folder / "glm47-turing-pr1183.md")


def test_the_slope_and_its_limits_are_those_of_scipy_with_ties_too() -> None:
    draw = np.random.default_rng(3)
    for _ in range(40):
        n = int(draw.integers(4, 13))
        x, y = draw.integers(0, 9, n).astype(float), draw.integers(0, 30, n).astype(float)
        if np.ptp(x):
            fit = stats.theilslopes(y, x, 0.95)
            assert theil_sen(x, y, 0.95) == pytest.approx((fit[0], fit[2], fit[3]), rel=1e-12, abs=1e-12)


def table(times: list[tuple[int, float, float]], *, tg: int = 128) -> str:
    return HEADER + "".join(
        f"| {512:5d} | {tg:6d} | {n:6d} | {pp:8.3f} | {512 / pp:8.2f} | {t:8.3f} | {tg / t:8.2f} |\n"
        for n, pp, t in times
    )


@pytest.mark.pictures
def test_the_published_logs(published: tuple[str, str], tmp_path: Path) -> None:
    picture = tmp_path / "sweep.svg"
    policy = ("--policy", "ik-1183", "--arch", "glm4moe", "--gpus", "2", "--split-mode", "graph")
    done = verify("sweep", *published, *policy, "--json", "--out", str(picture))
    assert done.returncode == 1, "generation is significantly slower"
    found = json.loads(done.stdout)
    generation, prompt = found["compared"]
    ratios = dict(zip(generation["depths"], generation["ratios"], strict=True))
    assert all(abs(ratios[n] - 1) < 0.01 for n in DEPTHS[:4])
    assert ratios[16384] == pytest.approx(1.031, abs=5e-4)
    assert ratios[32768] == pytest.approx(1.063, abs=5e-4)
    assert (generation["change"]["n_kv"], generation["change"]["believed"]) == (16384, True)
    assert generation["slower"] and not prompt["slower"]
    assert not prompt["change"]["believed"]
    assert (
        "no change point; the ratio peaks at 1.023 at N_KV = 12288 and falls again, to 1.008" in done.stderr
    )
    assert "T_TG changes at N_KV = 16384: this is where 4 KV heads a GPU start the split" in done.stderr
    assert found["split_starts"] == [
        {"from_n_kv": 16129, "padded": 16384, "plan": "8+4, 2 launches on copies of Q", "row": 16384}
    ]
    main, pr = (log["lines"]["t_tg"] for log in found["logs"])
    assert main["b_low"] < main["b"] < main["b_high"] < pr["b_low"] < pr["b"] < pr["b_high"]
    assert main["a_low"] <= main["a"] <= main["a_high"]
    assert picture.read_text().startswith("<?xml")


def test_a_policy_that_splits_elsewhere_is_not_the_cause(published: tuple[str, str]) -> None:
    done = verify("sweep", *published, "--policy", "ik-1183", "--arch", "glm4moe", "--gpus", "4",
                  "--split-mode", "graph")  # fmt: skip
    assert "T_TG changes at N_KV = 16384, and the policy's plan at 32768: the split does not explain it" in (
        done.stdout
    )
    done = verify("sweep", *published, "--policy", "ik-1193", "--arch", "glm4moe")
    assert "one plan at every length; a change of speed has another cause" in done.stdout


def test_markdown_json_and_a_whole_log_give_the_same_rows(tmp_path: Path) -> None:
    times = [(0, 1.5, 2.25), (512, 1.625, 2.5)]
    rows = [SweepRow(512, 128, n, pp, t) for n, pp, t in times]
    plain, wrapped, lines = (tmp_path / name for name in ("a.md", "a.log", "a.jsonl"))
    plain.write_text(table(times))
    wide = table(times).replace(" |\n", " |  3000.1 |   12.0 |\n")
    wide = wide.replace("|  3000.1 |   12.0 |", "| RSS HWM | VRAM delta |", 1)
    noise = 'llama_load: |x| loaded\n{"not": "a row"}\nmain: n_kv_max = 1024\n\n'
    wrapped.write_text(
        noise + "".join(f"0.01.2 I {line}\n" for line in wide.splitlines()) + "\ntimings: total\n"
    )
    with lines.open("w") as f:
        for row in rows:
            f.write(json.dumps(row._asdict() | {"speed_pp": 1.0, "speed_tg": 2.0, "n_gpu_layers": 99}) + "\n")
    for path in (plain, wrapped, lines):
        (log,) = read_logs(path)
        assert (log.label, log.rows) == ("a", rows), path


def test_repeats_count_as_their_median(tmp_path: Path) -> None:
    a, b = tmp_path / "a.md", tmp_path / "b.md"
    a.write_text(table([(0, 1.0, t) for t in (2.0, 2.0, 9.0)] + [(512, 1.0, 2.0)]))
    b.write_text(table([(0, 1.0, 2.0), (512, 1.0, 2.0)]))
    done = verify("sweep", str(a), str(b), "--json")
    assert json.loads(done.stdout)["compared"][0]["ratios"] == [1.0, 1.0]
    assert "a: 2 rows are repeats" in done.stderr


def test_the_line_is_robust_and_its_interval_holds() -> None:
    rng = np.random.default_rng(0)
    y = [10 + 1e-3 * n + e for n, e in zip(DEPTHS, rng.normal(0, 0.1, 9), strict=True)]
    y[4] += 30
    line = fit_line(DEPTHS, y)
    assert line is not None
    assert line.b_low < 1e-3 < line.b_high
    assert line.b == pytest.approx(1e-3, rel=0.05)
    assert line.a_low < 10 < line.a_high
    assert fit_line(DEPTHS[:2], y[:2]) is None


def believed(ratios: list[float]) -> int | None:
    found = change_point(DEPTHS, ratios)
    return found.n_kv if found is not None and found.believed else None


def test_a_change_point_is_found_where_it_is_and_nowhere_else() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.002, 9)
    for k in (3, 5):
        step = [1 + 0.03 * (i >= k) + e for i, e in enumerate(noise)]
        assert believed(step) == DEPTHS[k]
        ramp = [1 + (0.03 + 0.008 * (i - k)) * (i >= k) + e for i, e in enumerate(noise)]
        assert believed(ramp) == DEPTHS[k]
        assert believed([2 - r for r in step]) == DEPTHS[k]
    assert believed([1 + 0.008 * i + e for i, e in enumerate(noise)]) is None, "a drift"
    assert believed([1 + 0.02 * (i == 3) + e for i, e in enumerate(noise)]) is None, "a peak"
    assert believed([1.0] * 9) is None
    assert change_point(DEPTHS[:4], [1, 1, 2, 2]) is None


def test_noise_alone_seldom_has_a_change_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "SERIES", 2000)
    rng = np.random.default_rng(2)
    found = [change_point(DEPTHS, list(1 + rng.normal(0, 0.01, 9))) for _ in range(100)]
    assert sum(c is not None and c.believed for c in found) <= 3


def test_a_faster_file_exits_0_and_a_slower_one_1(tmp_path: Path) -> None:
    a, b = tmp_path / "a.md", tmp_path / "b.md"
    rng = np.random.default_rng(0)
    a.write_text(table([(n, 1.0, 2 + 1e-5 * n) for n in DEPTHS]))
    factors = rng.normal(1.05, 0.004, 9)
    b.write_text(table([(n, 1.0, (2 + 1e-5 * n) * f) for n, f in zip(DEPTHS, factors, strict=True)]))
    assert verify("sweep", str(a), str(b)).returncode == 1
    assert verify("sweep", str(b), str(a)).returncode == 0
    assert verify("sweep", str(a)).returncode == 0


def test_bad_logs_are_one_line(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text(table([(0, 1.0, 2.0)]))
    cases = [
        ("llama_load: done\n", "bad.md: it has no table; expected sweep-bench rows"),
        ("| model | size | params |\n|--|--|--|\n| x | 1 | 2 |\n", "it has a table of model, size, params"),
        (HEADER.replace("T_TG s", "T_XX s"), "line 1: a table of", "expected a column 'T_TG s' as well"),
        (HEADER, "its table has no rows"),
        (table([(0, 1.0, 2.0)])[:-14] + "\n", "line 3: a row of 6 columns, expected 7: the log is cut off"),
        (table([(0, 1.0, 2.0)]).replace("2.000", "x.000"), "line 3: T_TG s is 'x.000', expected a number"),
        ('{"n_kv": 0, "pp": 1, "tg": 1, "t_pp": 1.0}\n', "line 1: has no 't_tg'"),
        ('{"n_kv": 0, "pp": 1, "tg"', "line 1: not JSON"),
        ('{"n_kv": 0, "pp": 1, "tg": 1, "t_pp": 1.0, "t_tg": 0}', "t_tg is 0, expected a time"),
        (table([(0, 1.0, 2.0)], tg=64), "TG 64: PP 512 and TG 64, expected 512 and 128 as in"),
        (table([(99, 1.0, 2.0)]), "no depth in common"),
    ]
    for content, *said in cases:
        bad.write_text(content)
        assert_refused(verify("sweep", str(good), str(bad)), "bad.md", *said)
    assert_refused(verify("sweep", str(tmp_path / "none.md")), "none.md")
    assert_refused(verify("sweep", str(good), "--policy", "ik-1183"), "--policy and --arch")
    assert_refused(verify("sweep", str(good), "--out", "x.gif"), "--out x.gif")
