"""Logs as people paste and redirect them. Each form below was met in the public threads of the engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli import assert_refused, verify
from verify.engines.sweep_log import SweepLog, SweepRow, read_logs

NAMES = ("PP", "TG", "N_KV", "T_PP s", "S_PP t/s", "T_TG s", "S_TG t/s")
RULE = f"|{'-------|' * len(NAMES)}\n"
TIMES = [(256 * i, 1 + i / 64, 4 + i / 32) for i in range(4)]
ROWS = [SweepRow(256, 64, n, pp, tg) for n, pp, tg in TIMES]


def line(cells: tuple[object, ...] | list[str]) -> str:
    return f"| {' | '.join(str(c) for c in cells)} |\n"


def rows_text(factor: float = 1.0, pp: int = 256, tg: int = 64) -> list[str]:
    return [line((pp, tg, n, a * factor, "300.00", b * factor, "16.00")) for n, a, b in TIMES]


def table(factor: float = 1.0, **work: int) -> str:
    return line(NAMES) + RULE + "".join(rows_text(factor, **work))


def one(tmp_path: Path, content: str | bytes, name: str = "log.md") -> SweepLog:
    (log,) = several(tmp_path, content, name)
    return log


def several(tmp_path: Path, content: str | bytes, name: str = "log.md") -> list[SweepLog]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_logs(path)


PLAIN = table()
BARE = PLAIN.replace("| ", "", 1).replace("\n| ", "\n").replace(" |\n", "\n")
JSON_ROWS = [dict(zip(("pp", "tg", "n_kv", "t_pp", "t_tg"), r, strict=True), n_ubatch=256) for r in ROWS]


@pytest.mark.parametrize(
    ("form", "content"),
    [
        ("plain", PLAIN),
        ("no outer bars", BARE),
        ("behind a container's name", "".join(f"engine-1  | {x}\n" for x in PLAIN.splitlines())),
        ("behind time stamps", "".join(f"14:02:1{i} [info] {x}\n" for i, x in enumerate(PLAIN.splitlines()))),
        ("quoted", "".join(f"> {x}\n" for x in PLAIN.splitlines())),
        ("time stamps, no outer bars", "".join(f"0.01.200 I {x}\n" for x in BARE.splitlines())),
        ("header and rule in one line", PLAIN.replace(" |\n|---", " | |---", 1)),
        ("colours before", "".join(f"\x1b[0m{x}\n" for x in PLAIN.splitlines())),
        (
            "colours in cells",
            PLAIN.replace("256", "\x1b[32m256\x1b[0m").replace("N_KV", "\x1b[1mN_KV\x1b[0m"),
        ),
        ("bold rows", PLAIN.replace("| 256 | 64 | 512 |", "| **256** | **64** | **512** |")),
        ("units in brackets", PLAIN.replace("T_PP s", "T_PP (s)").replace("T_TG s", "T_TG (s)")),
        ("escaped underscores", PLAIN.replace("_", "\\_")),
        ("drawn bars", PLAIN.replace("|", "\u2502")),
        ("HTML's bars", PLAIN.replace("|", "&#124;")),
        ("carriage returns alone", PLAIN.replace("\n", "\r")),
        ("Windows", PLAIN.replace("\n", "\r\n")),
        ("lines of the engine between", PLAIN.replace(" |\n", " |\nCUDA graph: |reuse| 3\n")),
        ("another table below", PLAIN + "\n| batch | s |\n| ---: | ---: |\n| 512 | 1.5 |\n| 1024 | 1.25 |\n"),
        ("another table above", "| size | GiB |\n|---|---|\n| 7 | 3.5 |\n\n" + PLAIN),
        ("a settings line with commas", "main: n_ctx = 1, PP 5, TG 6\n" + PLAIN),
        ("commas", BARE.replace(" | ", ",").replace(RULE, "")),
        ("tabs", BARE.replace(" | ", "\t").replace(RULE, "")),
        ("semicolons", BARE.replace(" | ", ";").replace(RULE, "")),
        ("UTF-8 with a mark", b"\xef\xbb\xbf" + PLAIN.encode()),
        ("UTF-16 with a mark", PLAIN.encode("utf-16")),
        ("UTF-16 without a mark", PLAIN.encode("utf-16-le")),
        ("UTF-16, the other order", b"\xfe\xff" + PLAIN.encode("utf-16-be")),
        ("JSON lines", "".join(json.dumps(x) + "\n" for x in JSON_ROWS)),
        ("JSON lines behind a prefix", "".join(f"0.00.1 I {json.dumps(x)}\n" for x in JSON_ROWS)),
        ("a JSON array", json.dumps(JSON_ROWS)),
        ("a JSON array, indented", json.dumps(JSON_ROWS, indent=2)),
    ],
)
def test_every_form_gives_the_same_rows(tmp_path: Path, form: str, content: str | bytes) -> None:
    log = one(tmp_path, content)
    assert (log.label, log.rows, log.notes) == ("log", ROWS, ())


def test_a_second_header_begins_a_second_log(tmp_path: Path) -> None:
    path = tmp_path / "both.md"
    path.write_text(f"## main\n\n{table()}\n**The pull request:**\n```\n{table(1.5)}```\n")
    main, pr = read_logs(path)
    assert [main.label, pr.label] == ["both [main]", "both [The pull request]"]
    assert main.rows == ROWS
    assert [r.t_tg for r in pr.rows] == [1.5 * r.t_tg for r in ROWS if r.t_tg]
    # A slowdown of one half is seen within the one file, and no row is called a repeat.
    done = verify("sweep", str(path))
    assert done.returncode == 1
    assert "T_TG both [The pull request] / both [main]: mean 1.5000" in done.stdout
    assert "repeats" not in done.stdout


def test_an_engines_own_lines_are_no_headings(tmp_path: Path) -> None:
    noise = "main: n_kv_max = 8192, n_ubatch = 512\n0.01.234 I load: done\n"
    labels = [log.label for log in several(tmp_path, noise + table() + noise + table(1.5))]
    assert labels == ["log [log 1]", "log [log 2]"]


def test_rows_of_other_work_are_no_repeats(tmp_path: Path) -> None:
    with_header = table() + "\n" + table(2, pp=512, tg=128)
    without = table() + "".join(rows_text(2, pp=512, tg=128))
    for content in (with_header, without):
        logs = several(tmp_path, content)
        assert [log.work for log in logs] == [(256, 64), (512, 128)]
        assert [len(log.rows) for log in logs] == [4, 4]
        done = verify("sweep", str(tmp_path / "log.md"))
        assert done.returncode == 0
        assert "other work (PP 512, TG 128) or other depths: compared with none" in done.stdout
        assert "repeats" not in done.stdout and "ratio" not in done.stdout
    # Two files of the same two kinds of work: like is compared with like.
    for name, factor in (("a", 1.0), ("b", 1.1)):
        (tmp_path / f"{name}.md").write_text(table(factor) + "\n" + table(2 * factor, pp=512, tg=128))
    done = verify("sweep", str(tmp_path / "a.md"), str(tmp_path / "b.md"), "--json")
    found = json.loads(done.stdout)["compared"]
    assert [(c["label"][0], c["against"][0], round(c["mean"], 9)) for c in found] == [("b", "a", 1.1)] * 4


def test_json_rows_of_other_settings_are_no_repeats(tmp_path: Path) -> None:
    lines = [x | {"n_ubatch": n} for n in (256, 512) for x in JSON_ROWS]
    logs = several(tmp_path, "".join(json.dumps(x) + "\n" for x in lines))
    assert [log.label for log in logs] == ["log [n_ubatch 256]", "log [n_ubatch 512]"]
    repeats = one(tmp_path, "".join(json.dumps(x) + "\n" for x in JSON_ROWS * 2))
    assert len(repeats.rows) == 8


@pytest.mark.parametrize(
    "content",
    [
        PLAIN + "| 256 | 64 | 1024 | 1.0",
        BARE + "256 | 64 | 1024 | 1.0",
        PLAIN + "| 256 | 64 | 1024 | 1.0\n\nout of memory\n",
    ],
)
def test_a_last_row_that_is_cut_off_is_left_out_and_said(tmp_path: Path, content: str) -> None:
    log = one(tmp_path, content)
    assert log.rows == ROWS
    assert log.notes == ("a row of 4 columns, expected 7: cut off, and left out",)
    assert f"log: {log.notes[0]}" in verify("sweep", str(tmp_path / "log.md")).stdout


def test_json_lines_that_are_cut_off(tmp_path: Path) -> None:
    whole = "".join(json.dumps(x) + "\n" for x in JSON_ROWS)
    log = one(tmp_path, whole + '{"pp": 256, "tg": 64, "n_kv": 10')
    assert (log.rows, log.notes) == (ROWS, ("the last row is cut off, and left out",))
    (tmp_path / "log.md").write_text('{"pp": 256, "n_kv": 10\n' + whole)
    assert_refused(verify("sweep", str(tmp_path / "log.md")), "line 1: not JSON")
    (tmp_path / "log.md").write_text(whole + '{"pp": 256, "n_kv": 10\n' + whole)
    assert_refused(verify("sweep", str(tmp_path / "log.md")), "line 5: not JSON")


def test_a_row_without_a_side_has_none_of_its_times(tmp_path: Path) -> None:
    log = one(tmp_path, PLAIN.replace("| 256 | 64 |", "| 256 | 0 |"))
    assert log.work == (256, 0)
    assert {row.t_tg for row in log.rows} == {None}
    done = verify("sweep", str(tmp_path / "log.md"))
    assert done.returncode == 0 and "T_TG" not in done.stdout


MODEL = ("glm4moe 106B Q4_K", "62.00 GiB", "CUDA")


def bench_table(tests: list[tuple[str, str]], fa: str = "1") -> str:
    text = (
        line(("model", "size", "backend", "fa", "test", "t/s")) + "| --- | ---: | --- | -: | ---: | ---: |\n"
    )
    return text + "".join(line((*MODEL, fa, *test)) for test in tests)


def test_the_depth_tests_of_llama_bench(tmp_path: Path) -> None:
    tests = [("pp512", "256.00 ± 0.5"), ("tg128", "16.00 ± 0.1"), ("pp512 @ d4096", "128.00 ± 0.5"),
             ("tg128 @ d4096", "8.00 ± 0.1"), ("pp512+tg128 @ d4096", "20.00 ± 0.1")]  # fmt: skip
    wanted = [SweepRow(512, 128, 0, 2.0, 8.0), SweepRow(512, 128, 4096, 4.0, 16.0)]
    log = one(tmp_path, "build: abc\n" + bench_table(tests) + "\nbuild: b3000 (1)\n")
    assert log.rows == wanted
    records = [
        {
            "build_commit": "a",
            "n_prompt": pp,
            "n_gen": tg,
            "n_depth": d,
            "avg_ns": int(s * 1e9),
            "avg_ts": 1.0,
        }
        for pp, tg, d, s in (
            (512, 0, 0, 2),
            (0, 128, 0, 8),
            (512, 0, 4096, 4),
            (0, 128, 4096, 16),
            (512, 128, 0, 9),
        )
    ]
    assert one(tmp_path, "".join(json.dumps(x) + "\n" for x in records)).rows == wanted
    assert one(tmp_path, json.dumps(records, indent=1)).rows == wanted
    quoted = [",".join(f'"{v}"' for v in x.values()) for x in records]
    assert one(tmp_path, "\n".join([",".join(records[0]), *quoted]) + "\n").rows == wanted
    # Generation alone.
    log = one(tmp_path, "".join(json.dumps(x) + "\n" for x in records[1:4:2]))
    assert log.rows == [SweepRow(0, 128, 0, None, 8.0), SweepRow(0, 128, 4096, None, 16.0)]


def test_settings_and_sizes_of_llama_bench_are_told_apart(tmp_path: Path) -> None:
    tests = [("tg128", "16.00 ± 0.1"), ("tg128 @ d4096", "8.00 ± 0.1")]
    both = bench_table(tests) + bench_table(tests, "0").split("\n", 2)[2]
    assert [log.label for log in several(tmp_path, both)] == ["log [fa 1]", "log [fa 0]"]
    logs = several(tmp_path, bench_table([*tests, ("tg64", "17.00 ± 0.1"), ("pp512", "300.00 ± 1")]))
    assert [log.work for log in logs] == [(0, 64), (0, 128), (512, 0)]


BATCHED = ("PP", "TG", "B", "N_KV", "T_PP s", "S_PP t/s", "T_TG s", "S_TG t/s", "T s", "S t/s")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (line(BATCHED) + line((128, 64, 2, 384, 1, 1, 1, 1, 1, 1)), "llama-batched-bench"),
        (json.dumps(JSON_ROWS[0] | {"pl": 2}), "llama-batched-bench"),
        (PLAIN.replace("| 256 | 64 | 512 |", "| 256 | 64 | 1,024 |"), "line 5: N_KV is '1,024'"),
        (PLAIN.replace("| 256 | 64 | 512 |", "| 256 | 64 | 1K |"), "line 5: N_KV is '1K'"),
        (PLAIN.replace("| 1.0 |", "| 1,000 |"), "line 3: T_PP s is '1,000'"),
        (PLAIN.replace("| 4.0 |", "| -nan |"), "line 3: T_TG s is '-nan'"),
        ("<table><tr><th>PP</th><th>TG</th></tr></table>", "it has no table"),
        (line(NAMES) + RULE + "| 256 | 64 | 0 | 1.0 |\n" + rows_text()[1], "line 3: a row of 4 columns"),
        (line(NAMES) + RULE + "| 256 | 64 | 0 | 1.0", "the log is cut off"),
        (bench_table([("tg128", "fast")]), "line 3: t/s is 'fast'"),
        (bench_table([("ttft", "1.0 ± 0.1")]), "line 3: test is 'ttft'"),
        (PLAIN.replace("| 256 | 64 |", "| 0 | 0 |"), "PP and TG are 0"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "log.md").write_text(content)
    assert_refused(verify("sweep", str(tmp_path / "log.md")), "log.md", said)
