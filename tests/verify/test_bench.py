from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli import assert_refused, verify
from verify.bench import Measurement, crossovers

KERNELS = Path(__file__).parents[1] / "support/user_kernels.py"


@pytest.mark.pictures
def test_every_kernel_is_measured_and_said_to_have_run(tmp_path: Path) -> None:
    done = verify(
        *("bench", "--device", "cpu", "--shape", "4/2x16", "--n-kv", "64,256", "--out", str(tmp_path)),
        *("eager", "eager:kv=2"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "bench.json").read_text())
    found = result["measurements"]
    assert [(m["n_kv"], m["spec"]) for m in found] == [
        (64, "eager"), (64, "eager:kv=2"), (256, "eager"), (256, "eager:kv=2"),
    ]  # fmt: skip
    for m in found:
        assert m["us"] > 0
        assert m["share"] == pytest.approx(m["gb_s"] / result["bandwidth_gb_s"]["read"])
        assert m["gb_s"] == pytest.approx(m["n_kv"] * 2 * 32 * 2 / m["us"] / 1e3)
    assert "KV parts 2" in found[3]["launched"]
    assert "eager[block=64" in done.stdout
    assert (tmp_path / "bench.svg").read_text().startswith("<?xml")


def test_a_kernel_that_cannot_run_is_a_line_of_the_table() -> None:
    raises = f"py:{KERNELS}::raises"
    done = verify("bench", "--device", "cpu", "--shape", "3/1x16", "--n-kv", "64", raises, "eager")
    assert done.returncode == 0
    assert "no such luck" in " ".join(done.stdout.split())


def measured(spec: str, n_kv: int, us: float | None) -> Measurement:
    return Measurement(
        shape="shape", n_kv=n_kv, spec=spec, us=us, gb_s=None, share=None, graph=True, launched="", notes=[]
    )


@pytest.mark.parametrize(
    ("times", "pays_from"),
    [
        ({1: 5.0, 2: 5.0, 4: 5.0}, None),
        ({1: 5.0, 2: 3.0, 4: 3.0}, 2),
        ({1: 3.0, 2: 5.0, 4: 3.0}, 4),
        ({1: 3.0, 2: 3.0, 4: 4.0}, None),
        ({1: 3.0, 2: 3.0, 4: 3.98}, None),
        ({1: 3.0, 2: 3.0, 4: None}, None),
    ],
)
def test_a_split_pays_from_a_length_on(times: dict[int, float | None], pays_from: int | None) -> None:
    found = [measured("first", n, 4.0) for n in times] + [measured("split", n, t) for n, t in times.items()]
    (line,) = crossovers(found)
    assert line["pays_from"] == pays_from
    assert line["against"] == "first"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--shape", "nope"), "unknown shape"),
        (("--n-kv", "0"), "--n-kv 0"),
        (("--n-kv", "64,99999999999"), "GB are free on cpu"),
        (("--shape", "4/2x0"), "expected heads and head sizes from 1"),
        (("--shape", "3/1x16", "eager:heads=8+4"), "sums to 12, expected r = 3"),
        (("--n-kv", "some"), "--n-kv some"),
        (("--device", "tpu"), "--device tpu"),
        (("flahs",), "did you mean 'flash'"),
    ],
)
def test_bad_input(more: tuple[str, ...], said: str) -> None:
    assert_refused(verify("bench", "--device", "cpu", *more), said)
