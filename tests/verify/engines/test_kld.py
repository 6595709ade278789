from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.cli import assert_refused, verify
from support.logits_files import decode, write_file
from verify.engines.closing_table import percentile_estimate
from verify.engines.divergence import FileScores, PairScores, score_pair
from verify.engines.kld_table import table_lines, table_of
from verify.engines.logits_file import LogitsFile, LogitsWriter


def made(nll: list[float], base: list[float], kld: list[float], top1: list[int]) -> PairScores:
    """Scores by hand; the base's most likely token is always 0."""

    def scores(values: list[float], top: list[int]) -> FileScores:
        n = np.array([values])
        flags = np.zeros(n.shape, bool)
        return FileScores(
            nll=n, top1=np.array([top]), largest=n, margin=n, step=n, clipped=flags, finite=~flags, squares=n
        )

    same = np.zeros((1, len(nll)), bool)
    return PairScores(scores(base, [0] * len(nll)), scores(nll, top1), np.array([kld]), same)


def test_the_table_of_a_case_computed_by_hand() -> None:
    # Twelve tokens: nll 1 and 3 in turn against 1 and 2 in turn.
    pair = made([1.0, 3.0] * 6, [1.0, 2.0] * 6, [i / 100 for i in range(12)], [0] * 9 + [1] * 3)
    t = table_of(pair)
    # mean 2, variance 1, u = 1 / sqrt(11); base: mean 1.5, variance 1/4; covariance 1/2 / 11.
    u, u_base, covariance = 1 / math.sqrt(11), 0.5 / math.sqrt(11), 0.5 / 11
    assert t.ppl == pytest.approx((math.exp(2), math.exp(2) * u))
    assert t.ppl_base == pytest.approx((math.exp(1.5), math.exp(1.5) * u_base))
    assert t.correlation == pytest.approx(1)
    assert t.ln_ratio == pytest.approx((0.5, math.sqrt(u**2 + u_base**2 - 2 * covariance)))
    assert t.ln_ratio.error == pytest.approx(0.5 / math.sqrt(11))
    assert t.ratio == pytest.approx((math.exp(0.5), math.exp(0.5) * 0.5 / math.sqrt(11)))
    big, small = math.exp(2), math.exp(1.5)
    assert t.difference.value == pytest.approx(big - small)
    assert t.difference.error == pytest.approx((big * 1 - small * 0.5) / math.sqrt(11))
    # 0, 0.01, ... 0.11: mean 0.055, variance 143/12 of squares of 0.01; median between the 6th and the 7th.
    assert t.kld == pytest.approx((0.055, 0.01 * math.sqrt(143 / 12 / 11)))
    assert (t.kld_least, t.kld_most, t.kld_percentiles[0.5]) == pytest.approx((0, 0.11, 0.055))
    assert t.kld_percentiles[0.9] == pytest.approx(0.099)
    # dp: 0 and e^-3 - e^-2 in turn.
    step = math.exp(-3) - math.exp(-2)
    assert t.dp == pytest.approx((step / 2, abs(step) / 2 / math.sqrt(11)), rel=1e-5)
    rms = abs(step) / math.sqrt(2)
    assert t.dp_rms == pytest.approx((rms, 0.5 / rms * step**2 / 2 / math.sqrt(11)), rel=1e-5)
    assert (t.dp_least, t.dp_most) == pytest.approx((step, 0), rel=1e-5)
    assert t.same_top == pytest.approx((0.75, math.sqrt(0.75 * 0.25 / 11)))
    lines = table_lines(t)
    assert lines[1] == "Mean PPL(Q)                   :   7.389056 ±   2.227884"
    assert lines[3] == "Cor(ln(PPL(Q)), ln(PPL(base))): 100.00%"
    assert "90.0%   KLD:   0.099000" in lines
    assert "Median  KLD:   0.055000" in lines
    assert " 0.1%   Δp: -8.555%" in lines
    assert lines[-1] == "Same top p: 75.000 ± 13.056 %"


def test_few_tokens_have_no_errors_as_in_the_program() -> None:
    pair = made([1.0, 3.0] * 5, [1.0, 2.0] * 5, [0.0] * 10, [0] * 10)
    t = table_of(pair)
    assert t.ppl.error == 0
    assert math.isnan(t.correlation)


def test_every_column_of_two_files_is_what_plain_arithmetic_gives(tmp_path: Path) -> None:
    a, b = tmp_path / "a.kld", tmp_path / "b.kld"
    write_file(a, n_vocab=301)
    write_file(b, n_vocab=301, noise=0.05)
    with LogitsFile(a) as base, LogitsFile(b) as other:
        pair = score_pair(base, other)
        targets = base.targets.ravel()
    p, q = (np.array(decode(f.read_bytes())[-1]) for f in (a, b))
    rows = np.arange(len(p))
    np.testing.assert_allclose(pair.base.nll.ravel(), -p[rows, targets], atol=2e-6)
    np.testing.assert_allclose(pair.other.nll.ravel(), -q[rows, targets], atol=2e-6)
    kld = (np.exp(p) * (p - q) * (p > -16)).sum(1)
    np.testing.assert_allclose(pair.kld.ravel(), kld, atol=1e-7, rtol=1e-5)
    np.testing.assert_array_equal(pair.base.top1.ravel(), p.argmax(1))
    np.testing.assert_array_equal(pair.other.top1.ravel(), q.argmax(1))
    top2 = np.sort(p, 1)[:, -2:]
    np.testing.assert_allclose(pair.base.margin.ravel(), top2[:, 1] - top2[:, 0], atol=1e-5)
    np.testing.assert_allclose(pair.base.squares.ravel(), np.exp(2 * p).sum(1), rtol=1e-5)
    assert not pair.same.any()


def test_what_is_less_likely_than_e_to_minus_16_is_left_out_as_in_the_program(tmp_path: Path) -> None:
    tokens = np.zeros((1, 4), np.int32)
    for name, low in (("a", -17.0), ("b", -20.0)):
        with LogitsWriter(tmp_path / f"{name}.kld", tokens, 3) as writer:
            writer.write(0, 0, np.array([[0.0, -15.0, low]], np.float32))
    with LogitsFile(tmp_path / "a.kld") as base, LogitsFile(tmp_path / "b.kld") as other:
        kld = score_pair(base, other).kld.item()
    # p of the third is 4e-8 and 3 nats away: 1.2e-7 if it were counted.
    assert abs(kld) < 6e-8


def test_the_floor_covers_two_roundings_of_one_truth(tmp_path: Path) -> None:
    """Equal distributions, rounded on two grids: a divergence of the size that the resolution states."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 2000, (8, 64)).astype(np.int32)
    logits = rng.normal(0, 2, (8, 31, 2000)).astype(np.float32)
    # So low that either clip is reached, and that it counts for nothing.
    logits[..., 0] = -40
    for name, clip in (("a", 16.0), ("b", 24.0)):
        with LogitsWriter(tmp_path / f"{name}.kld", tokens, 2000, clip=clip) as writer:
            for window in range(8):
                writer.write(window, 0, logits[window])
    with LogitsFile(tmp_path / "a.kld") as base, LogitsFile(tmp_path / "b.kld") as other:
        pair = score_pair(base, other)
    z = pair.kld / pair.kld_floor
    assert 0.7 < z.std() < 1.05
    assert (pair.kld < 0).mean() > 0.3
    z = (pair.other.nll - pair.base.nll) / pair.nll_floor
    assert 0.85 < z.std() < 1.15


def run(*arguments: str) -> tuple[int, dict, str]:  # type: ignore[type-arg]
    done = verify("kld", "--json", *arguments)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_verdicts_and_exit_codes(tmp_path: Path) -> None:
    base, same, near, far = (tmp_path / f"{x}.kld" for x in ("base", "same", "near", "far"))
    for path, noise in ((base, 0.0), (same, 0.0), (near, 1e-5), (far, 0.3)):
        write_file(path, noise=noise, n_ctx=64, n_chunk=9)
    assert run(str(base), str(same))[:2][0] == 0
    code, found, said = run(str(base), str(same))
    assert (code, found["verdict"]) == (0, "identical")
    code, found, said = run(str(base), str(near))
    assert (code, found["verdict"]) == (0, "round-off")
    assert "the files' own rounding" in found["reasons"][0]
    code, found, said = run(str(base), str(far))
    assert (code, found["verdict"]) == (3, "inconclusive")
    assert "verify ppl --against" in found["reasons"][0]
    assert "top-1 changes" in said
    (pair,) = found["pairs"]
    assert sum(c["tokens"] for c in pair["by_margin"]) == sum(c["tokens"] for c in pair["by_position"]) == 279
    changed = [c["changed"] / max(c["tokens"], 1) for c in pair["by_margin"]]
    assert changed[-1] < max(changed[:-1]), "tokens with a large margin change least"
    code, found, _ = run(str(base), str(far), "--max-kld", "1e-6")
    assert (code, found["verdict"]) == (1, "degraded")
    code, found, _ = run(str(base), str(far), "--max-kld", "10")
    assert (code, found["verdict"]) == (0, "round-off")
    # The gravest of several.
    code, found, _ = run(str(base), str(same), str(far))
    assert (code, found["verdict"], len(found["pairs"])) == (3, "inconclusive", 2)
    code, found, said = run(str(base))
    assert (code, found["verdict"], len(found["files"])) == (0, None, 1)
    assert "Final estimate: PPL over 9 chunks for n_ctx=64" in said


def test_a_text_predicted_worse_is_degraded_and_the_other_way_round_improved(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (12, 32)).astype(np.int32)
    logits = rng.normal(0, 1, (12, 15, 50)).astype(np.float32)
    for name, lift in (("a", 2.0), ("b", 1.0)):
        with LogitsWriter(tmp_path / f"{name}.kld", tokens, 50) as writer:
            for window in range(12):
                rows = logits[window].copy()
                rows[np.arange(15), tokens[window, 17:]] += lift
                writer.write(window, 0, rows)
    a, b = str(tmp_path / "a.kld"), str(tmp_path / "b.kld")
    assert run(a, b)[1]["verdict"] == "degraded"
    assert run(b, a)[1]["verdict"] == "improved"


def test_nan_in_a_record_is_broken(tmp_path: Path) -> None:
    base, bad = tmp_path / "base.kld", tmp_path / "bad.kld"
    write_file(base)
    write_file(bad)
    raw = bytearray(bad.read_bytes())
    # The second window's third record: 7 records a window of 8 + 64 bytes.
    at = 20 + 4 * 48 + (7 + 2) * 72
    raw[at : at + 4] = np.float32(np.nan).tobytes()
    bad.write_bytes(raw)
    code, found, _ = run(str(base), str(bad))
    assert (code, found["verdict"]) == (1, "broken")
    assert "OTHER: 1 of 21 records hold NaN or Inf, first in window 2 at position 10" in found["reasons"][0]


def test_other_tokens_and_vocabularies_show_the_first_difference(tmp_path: Path) -> None:
    base, other = tmp_path / "base.kld", tmp_path / "other.kld"
    write_file(base)
    write_file(other, n_vocab=33)
    assert_refused(verify("kld", str(base), str(other)), "other.kld: n_vocab is 33, expected 31")
    raw = bytearray(base.read_bytes())
    was = raw[20 + 4 * 18]
    raw[20 + 4 * 18] = (was + 1) % 31
    other.write_bytes(raw)
    assert_refused(
        verify("kld", str(base), str(other)),
        f"other.kld: token 2 of window 2 is {(was + 1) % 31}, expected {was}",
        "1 of 48 tokens differ",
    )
    assert_refused(verify("kld", str(base), "--max-kld", "-1"), "--max-kld -1")


def unlike_clips(folder: Path) -> tuple[str, str, int]:
    """The same logits written with either clip, and how many tokens that came lie 16 nats down or more.

    One token in nine of the text lies far below either clip.
    """
    rng = np.random.default_rng(5)
    n_vocab, windows, n_ctx = 120, 8, 64
    scored = n_ctx - 1 - n_ctx // 2
    tokens = rng.integers(1, n_vocab, (windows, n_ctx)).astype(np.int32)
    logits = rng.normal(0, 3, (windows, scored, n_vocab)).astype(np.float32)
    # Token 0 lies 30 nats below: either clip raises it.
    logits[..., 0] = logits.max(-1) - 30
    came = tokens[:, n_ctx // 2 + 1 :]
    came[:, ::9] = 0
    for name, clip in (("ik", 24.0), ("main", 16.0)):
        with LogitsWriter(folder / f"{name}.kld", tokens, n_vocab, clip=clip) as writer:
            for window in range(windows):
                writer.write(window, 0, logits[window])
    chosen = np.take_along_axis(logits, came[..., None].astype(np.int64), 2)[..., 0]
    below = int((logits.max(-1) - chosen > 16).sum())
    return str(folder / "ik.kld"), str(folder / "main.kld"), below


def test_the_same_logits_under_two_clips_are_round_off_either_way_round(tmp_path: Path) -> None:
    ik, main, below = unlike_clips(tmp_path)
    assert below >= 8 * 4
    ppl = [run(path)[1]["closing_table"][0]["ppl"]["value"] for path in (ik, main)]
    assert ppl[0] > 1.5 * ppl[1], "each file alone says something else"
    for pair in ((ik, main), (main, ik)):
        code, found, said = run(*pair)
        assert (code, found["verdict"]) == (0, "round-off"), found["reasons"]
        (one,) = found["pairs"]
        assert (one["common_clip"], one["targets_at_common_clip"]) == (16, below)
        assert abs(one["table"]["kld"]["value"]) < one["resolution"]["mean_kld"] < 1e-4
        assert abs(one["dlnppl"]["mean"]) < 1e-4
        assert "compared as if clipped 16 nats below the largest" in said
        # Of two equal distributions one mean is negative at most by rounding: no lower bound at all.
        assert one["kld"]["low"] is None
        assert "at most" in found["reasons"][0]
    assert run(ik, ik)[1]["pairs"][0]["common_clip"] is None


def test_a_real_difference_is_seen_under_unlike_clips(tmp_path: Path) -> None:
    ik, *_ = unlike_clips(tmp_path)
    with LogitsFile(ik) as file:
        tokens = file.tokens
        logits = [file.read(w, 0, file.layout.scored).log_probs() for w in range(file.layout.n_chunk)]
    with LogitsWriter(tmp_path / "worse.kld", tokens, 120, clip=16.0) as writer:
        for window, rows in enumerate(logits):
            rows[np.arange(len(rows)), tokens[window, 33:]] -= 0.3
            writer.write(window, 0, rows)
    code, found, _ = run(ik, str(tmp_path / "worse.kld"))
    assert (code, found["verdict"], found["pairs"][0]["common_clip"]) == (1, "degraded", 16)


def test_several_files_end_in_the_table_that_is_published(tmp_path: Path) -> None:
    for name, noise in (("base", 0.0), ("q8|0", 0.02), ("q4_0", 0.2)):
        write_file(tmp_path / f"{name}.kld", noise=noise, n_ctx=64, n_chunk=9)
    models = [tmp_path / f"model-{x}.gguf" for x in ("F16", "Q8|0", "Q4_0")]
    for model, size in zip(models, (3_000_000, 2_000_000, 1_000_000), strict=True):
        model.write_bytes(bytes(size))
    files = [str(tmp_path / f"{x}.kld") for x in ("base", "q8|0", "q4_0")]
    markdown, csv_path = tmp_path / "table.md", tmp_path / "table.csv"
    given = [x for model in models for x in ("-m", str(model))]
    more = ("--markdown", str(markdown), "--csv", str(csv_path))
    _, found, said = run(*files, *given, *more)
    head, rule, *rows = markdown.read_text().splitlines()
    assert head.startswith("| file | size | PPL | ln PPL(Q)/PPL(base) | mean KLD | 99.9 % KLD")
    assert all(line.count("|") == 9 for line in (head, rule, *rows))
    assert rows[1].startswith("| model-Q8&#124;0.gguf | 0.00 GB | ")
    records = list(csv.DictReader(csv_path.open()))
    assert [r["file"] for r in records] == [m.name for m in models]
    assert [int(r["bytes"]) for r in records] == [3_000_000, 2_000_000, 1_000_000]
    assert records[0]["kld_mean"] == ""
    q8, q4 = found["pairs"]
    for record, pair in zip(records[1:], (q8, q4), strict=True):
        assert float(record["kld_mean"]) == pair["table"]["kld"]["value"]
        assert float(record["kld_999"]) == pair["table"]["kld_percentiles"]["0.999"]
        assert float(record["ln_ppl_ratio_error"]) == pair["table"]["ln_ratio"]["error"] > 0
    assert float(records[2]["kld_mean"]) > 20 * float(records[1]["kld_mean"])
    assert "99.9 % KLD" in said and "Q8|0" in said
    assert_refused(verify("kld", *files, "-m", str(models[0])), "-m: 1 models, expected one for each of 3")
    assert_refused(verify("kld", files[0], "-m", "none.gguf"), "-m none.gguf: no such file")
    assert_refused(verify("kld", files[0], "--csv", str(tmp_path)), "--csv", "is a folder")


def test_the_error_of_a_percentile_covers_it() -> None:
    rng = np.random.default_rng(0)
    truth = -math.log(0.05)
    z = []
    for _ in range(400):
        e = percentile_estimate(rng.exponential(1, 2000), 0.95)
        z.append((e.value - truth) / e.error)
    assert 0.85 < np.std(z) < 1.2


def test_a_table_is_not_written_over_what_is_read(tmp_path: Path) -> None:
    a, b = tmp_path / "a.kld", tmp_path / "b.kld"
    for path in (a, b):
        write_file(path)
    content = b.read_bytes()
    (tmp_path / "link.csv").symlink_to(b)
    for option in ("--csv", "--markdown"):
        for name in (str(b), str(tmp_path / "link.csv"), str(tmp_path / "." / "a.kld")):
            done = verify("kld", str(a), str(b), option, name)
            assert_refused(done, f"{option} {name}: is ", "which the command reads: expected another name")
    both = str(tmp_path / "table")
    assert_refused(verify("kld", str(a), str(b), "--csv", both, "--markdown", both), "--csv", "another name")
    assert b.read_bytes() == content
    text = str(tmp_path / "text.txt")
    Path(text).write_text("a text")
    assert_refused(verify("ladder", "-f", text, "--out", text), "--out", "another name")
    assert Path(text).read_text() == "a text"


def test_the_next_step_is_one_of_files(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a.kld"), str(tmp_path / "b.kld")
    write_file(Path(a))
    write_file(Path(b), noise=0.5)
    assert "verify explain" in verify("kld", a, b).stdout.splitlines()[-1]
    assert "distance ratio" not in verify("kld", a, a).stdout


def test_torch_is_not_loaded(tmp_path: Path) -> None:
    base = tmp_path / "base.kld"
    write_file(base)
    program = (
        "import sys; sys.argv = ['verify', 'kld', sys.argv[1]]\n"
        "from verify.__main__ import main\n"
        "try: main()\nexcept SystemExit: print('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(base)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("False"), done.stderr
