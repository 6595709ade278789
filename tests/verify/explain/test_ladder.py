from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from support.cli import assert_refused, verify
from support.logits_files import write_file
from support.ppl_runs import Tiny
from verify.engines.ladder import Ladder, LadderStep, read_ladder
from verify.engines.logits_file import LogitsWriter
from verify.machine.jsontext import to_json_text


def step(name: str, kind: str, kld: float) -> LadderStep:
    return LadderStep(
        name=name,
        what=f"a {name}",
        kind=kind,  # type: ignore[arg-type]
        spec="flash",
        kld=kld,
        kld_low=kld / 2,
        kld_high=kld * 2,
        dlnppl=kld / 10,
        dlnppl_se=kld / 100,
        flips=min(100 * kld, 1.0),
    )


LADDER = Ladder(
    model="m.gguf",
    n_ctx=64,
    windows=1,
    tokens=31,
    text="0",
    cache_type="f16",
    device="cpu",
    steps=(
        step("plan", "rounding", 6e-7),
        step("bf16 P", "rounding", 2e-6),
        step("q8_0 cache", "cache", 9e-5),
        step("dropped key", "fault", 3e-2),
    ),
)


@pytest.mark.parametrize(
    ("value", "answer", "said"),
    [
        (1e-8, "tie", "your mean KLD of 1e-08 is less than that of a plan (6.0e-07); a dropped key would be"),
        (3.9e-6, "tie", "lies between a bf16 P (2.0e-06) and a q8_0 cache (9.0e-05)"),
        (5e-6, "inconclusive", "lies between a bf16 P"),
        (4.1e-5, "not explained", "of 4.1e-05 lies between a bf16 P (2.0e-06) and a q8_0 cache (9.0e-05)"),
        (8.9e-5, "not explained", "of 8.9e-05 is about that of a q8_0 cache (9.0e-05); a dropped key would"),
        (1e-4, "not explained", "is about that of a q8_0 cache (9.0e-05)"),
        (2.9e-2, "not explained", "is about that of a dropped key (3.0e-02)"),
        (0.0, "tie", "of 0 is less than that of a plan"),
        (0.5, "not explained", "is more than that of a dropped key (3.0e-02)"),
        (-3.9e-6, "tie", "3.9e-06"),
    ],
)  # fmt: skip
def test_a_figure_is_placed_between_its_neighbours(value: float, answer: str, said: str) -> None:
    placed = LADDER.place("kld", value)
    assert placed.answer == answer
    assert said in placed.sentence


def test_what_is_no_number_is_placed_nowhere() -> None:
    with pytest.raises(ValueError, match="mean KLD is nan"):
        LADDER.place("kld", math.nan)


def test_a_ladder_is_written_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps(LADDER.to_json()))
    assert read_ladder(path) == LADDER
    (tmp_path / "old.json").write_text("{}")
    a = tmp_path / "a.kld"
    write_file(a)
    logits = ("explain", "--logits", str(a), str(a))
    assert_refused(verify(*logits, "--ladder", str(tmp_path / "old.json")), "old.json: is not a ladder")
    assert_refused(verify(*logits, "--ladder", str(tmp_path / "none")), "none: cannot be read")
    for field, value, said in (
        ("kld", "x", "kld is 'x', expected a number from 0"),
        ("kld_low", None, "kld_low is None"),
        ("flips", math.nan, "flips is nan"),
        ("dlnppl", -1, "dlnppl is -1"),
        ("kind", "guess", "kind is 'guess'"),
        ("what", 5, "what 5"),
    ):
        found = LADDER.to_json()
        found["steps"][1][field] = value
        path.write_text(json.dumps(found))
        assert_refused(verify(*logits, "--ladder", str(path)), "ladder.json: step bf16 P", said)
    for steps in (5, [5], None):
        path.write_text(json.dumps(LADDER.to_json() | {"steps": steps}))
        assert_refused(verify(*logits, "--ladder", str(path)), "ladder.json: has fields of other kinds")
    path.write_text(json.dumps(LADDER.to_json()).replace('"dlnppl"', '"other"'))
    assert_refused(verify(*logits, "--ladder", str(path)), "ladder.json: has no 'dlnppl'")


def test_the_ladder_of_a_model(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "ladder.json"
    options = ("-m", str(tiny.model), "-f", str(tiny.text), "-c", "64", "--chunks", "2", "--device", "cpu")
    done = verify("ladder", *options, "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    found = read_ladder(out)
    written = json.loads(to_json_text([s._asdict() for s in found.steps]))
    assert json.loads(done.stdout)["steps"] == written
    # Two windows are too little for an interval, which JSON says by null.
    assert found.steps[0].kld_high == math.inf and written[0]["kld_high"] is None
    by_name = {s.name: s for s in found.steps}
    assert found.tokens == 2 * 31
    # Heads of 16 numbers have no quantised cache; that is said, and the other steps are there.
    assert {"floor", "plan", "f16-sums", "bf16-P", "f16-output", "bf16-cache"} < by_name.keys()
    assert any("a q8_0 cache" in said for said in found.left_out)
    assert any("a rotated q4_0 cache" in said for said in found.left_out)
    rounding = max(s.kld for s in found.steps if s.kind == "rounding")
    assert 0 < by_name["floor"].kld < rounding < by_name["bf16-cache"].kld
    assert by_name["off-by-one"].kld > 20 * rounding
    assert by_name["wrong-head"].kld > 20 * rounding
    assert by_name["wrong-head"].flips > 0.01
    # The same again: same bits.
    again = tmp_path / "again.json"
    verify("ladder", *options, "--out", str(again))
    assert again.read_bytes() == out.read_bytes()


def test_two_logits_files_on_a_ladder(tmp_path: Path) -> None:
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps(LADDER.to_json()))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (9, 64)).astype(np.int32)
    logits = rng.normal(0, 2, (9, 31, 40)).astype(np.float32)
    for name, noise in (("base", 0.0), ("near", 1e-5), ("q8", 0.01), ("far", 1.0)):
        with LogitsWriter(tmp_path / f"{name}.kld", tokens, 40) as writer:
            for window, rows in enumerate(logits):
                moved = rows + np.float32(noise) * rng.normal(0, 1, rows.shape).astype(np.float32)
                writer.write(window, 0, moved)

    def explain(name: str, *more: str) -> tuple[int, str]:
        done = verify("explain", "--logits", str(tmp_path / "base.kld"), str(tmp_path / f"{name}.kld"), *more)
        return done.returncode, done.stdout

    assert explain("near")[0] == 0
    code, said = explain("q8")
    assert (code, "a ladder answers: verify explain --logits" in said) == (3, True)
    code, said = explain("q8", "--ladder", str(path))
    assert code == 1
    assert (
        "lies between a bf16 P (2.0e-06) and a q8_0 cache (9.0e-05); a dropped key would be 3.0e-02" in said
    )
    assert "not explained by another rounding" in said
    assert "is more than that of a dropped key" in explain("far", "--ladder", str(path))[1]


def test_logits_files_of_another_vocabulary_than_the_models(tiny: Tiny, tmp_path: Path) -> None:
    for name, noise in (("a", 0.0), ("b", 0.3)):
        write_file(tmp_path / f"{name}.kld", noise=noise)
    done = verify(
        "explain", "--logits", str(tmp_path / "a.kld"), str(tmp_path / "b.kld"), "-m", str(tiny.model)
    )
    assert_refused(done, "a vocabulary of", "expected 31 as in the logits files")


def test_logprobs_on_a_ladder(tmp_path: Path) -> None:
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps(LADDER.to_json()))
    rng = np.random.default_rng(1)
    base = -rng.exponential(1, 400) - 0.01
    for name, noise in (("a", 0.0), ("b", 1e-4), ("c", 0.3)):
        values = (base - noise * np.abs(rng.normal(0, 1, 400))).tolist()
        (tmp_path / name).write_text(json.dumps({"ids": list(range(400)), "logprobs": values}))
    a, b, c = (str(tmp_path / x) for x in "abc")
    assert verify("explain", "--logprobs", a, a).returncode == 0
    assert verify("explain", "--logprobs", a, b).returncode == 3
    assert verify("explain", "--logprobs", a, b, "--ladder", str(path)).returncode == 0
    done = verify("explain", "--logprobs", a, c, "--ladder", str(path))
    assert done.returncode == 1 and "verdict: not explained" in done.stdout
    done = verify("logprobs", a, b, "--ladder", str(path))
    assert "your mean KLD of" in done.stdout


def test_a_figure_alone_on_a_ladder(tmp_path: Path) -> None:
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps(LADDER.to_json()))
    stored = ("--ladder", str(path))
    done = verify("explain", "--kld", "4.1e-5", *stored)
    assert done.returncode == 1
    assert (
        "your mean KLD of 4.1e-05 lies between a bf16 P (2.0e-06) and a q8_0 cache (9.0e-05)" in done.stdout
    )
    assert verify("explain", "--kld", "1e-6", *stored).returncode == 0
    done = verify("explain", "--dlnppl", "-1e-7", "--flips", "0.5", *stored, "--json")
    assert done.returncode == 1
    assert [p["measure"] for p in json.loads(done.stdout)["placed"]] == ["dlnppl", "flips"]
    for arguments, said in (
        (("--kld", "-1", *stored), "--kld -1: expected a mean KLD"),
        (("--flips", "2", *stored), "--flips 2: expected a share of flips"),
        (("--kld", "1e-5"), "expected -m MODEL.gguf or --ladder FILE"),
        (("--kld", "1e-5", "--texts", "a", "b", *stored), "or a figure"),
    ):
        assert_refused(verify("explain", *arguments), said)
