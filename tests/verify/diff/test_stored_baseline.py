"""A baseline's figures are stored once; a check against them says what a check beside the baseline says."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import verify
from support.cli import assert_refused
from support.cli import verify as run
from support.mypkg import ops
from verify.diff import stored_baseline
from verify.kernels.eager import EagerKernel

KERNELS = Path(__file__).parents[2] / "support/user_kernels.py"
SMALL: dict[str, Any] = {"n_kv": 65, "families": ["probes", "gaussian", "needles", "sequences"], "rows": 8}
DIFF = (
    *("diff", "--shape", "2/1x32", "--n-kv", "33,65", "--inputs", "probes,gaussian,needles", "--rows", "8"),
    *("--device", "cpu", "--baseline", "eager"),
)  # fmt: skip


def asked_again(run_json: dict[str, Any]) -> dict[str, Any]:
    """What is the same whether or not the baseline ran."""
    kept = {name: run_json[name] for name in ("verdict", "exit_code", "reasons", "pairs", "detectable")}
    cells = [{k: x for k, x in cell.items() if k != "baseline"} for cell in run_json["cells"]]
    return kept | {"cells": cells, "coverage": run_json["coverage"]}


def close(a: Any, b: Any) -> bool:
    """Energies are stored as float32."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return a == pytest.approx(b, rel=1e-4, abs=1e-12, nan_ok=True)
    return bool(a == b)


def test_the_same_verdict_without_running_the_baseline(tmp_path: Path) -> None:
    file = tmp_path / "old.npz"
    candidates = ("eager:kv=2", f"py:{KERNELS}::last_key_dropped", "eager:block=16,acc=f16")
    for i, candidate in enumerate(candidates):
        asked = (*DIFF, "--candidate", candidate, "--most-rows", "8", "--json")
        beside = run(*asked, "--store", str(file), "--out", str(tmp_path / f"a{i}"))
        first = json.loads(beside.stdout)
        with mock.patch.object(EagerKernel, "run", autospec=True, side_effect=EagerKernel.run) as ran:
            done = run(*asked, "--against-stored", str(file), "--out", str(tmp_path / f"b{i}"))
        again = json.loads(done.stdout)
        assert {call.args[0].spec for call in ran.call_args_list} <= {candidate}
        assert done.returncode == beside.returncode
        a, b = asked_again(first), asked_again(again)
        for each in (a, b):
            # Words of a ratio are of its figures, which float32 rounds.
            each.pop("reasons")
            for pair in each["pairs"]:
                pair.pop("reasons")
        assert close(a, b)
        assert any(f"figures are those of {file}" in note for note in again["notes"])


def test_identical_is_seen_by_the_hash_of_outputs(tmp_path: Path) -> None:
    """Another plan of one sum in one order gives the same bits, and one more bit gives others."""
    file = tmp_path / "old.npz"
    found = {}
    for i, candidate in enumerate(("eager:heads=1+1", "eager:block=16")):
        asked = (*DIFF, "--candidate", candidate, "--json")
        beside = run(*asked, "--store", str(file), "--out", str(tmp_path / f"a{i}"))
        done = run(*asked, "--against-stored", str(file), "--out", str(tmp_path / f"b{i}"))
        first, again = json.loads(beside.stdout), json.loads(done.stdout)
        equal = [[cell["bitwise_equal"] for cell in each["cells"]] for each in (first, again)]
        assert equal[0] == equal[1]
        found[candidate] = any(equal[0])
    assert len(set(found.values())) == 2, found


def test_in_the_library_over_both_paths(tmp_path: Path) -> None:
    file = tmp_path / "old.npz"
    ran = []

    def twin(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> Any:
        ran.append(q.shape)
        return ops.attend(q, k, v, kv_len=kv_len, scale=scale)

    first = verify.check_attention(ops.attend, **SMALL, baseline=twin, store=file)
    assert ran
    ran.clear()
    again = verify.check_attention(ops.attend, **SMALL, baseline=twin, against_stored=file)
    assert not ran and again.verdict == first.verdict
    assert set(again.outcomes) == {"decode", "prefill"}
    with pytest.raises(verify.UsageError, match="stored with --rows 8, not 9"):
        verify.check_attention(ops.attend, **{**SMALL, "rows": 9}, baseline=twin, against_stored=file)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--first-seed", "3"), "stored with --first-seed 0, not 3"),
        (("--rows", "16"), "stored with --rows 8, not 16"),
        (("--dtype", "bf16"), "stored with --dtype f16, not bf16"),
        (("--shape", "4/2x32"), "has --shape 2/1x32, and not 4/2x32"),
        (("--n-kv", "33,66"), "has --n-kv 33, 65, and not 66"),
        (("--inputs", "peaked"), "has --inputs probes, gaussian, needles, and not peaked"),
        (("--path", "prefill"), "has path decode, asked for prefill"),
        (("--baseline", "eager:block=32"), "has nothing of baseline eager:block=32"),
        (("--candidate", "eager:block=16,kv=2"), "are others than those stored"),
    ],
)
def test_what_is_not_what_was_stored_is_named(more: Any, said: str, stored: Path, tmp_path: Path) -> None:
    asked = (*DIFF, "--candidate", "eager:kv=2") if "--candidate" not in more else DIFF
    done = run(*asked, *more, "--against-stored", str(stored), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert f"--against-stored {stored}" in last and said in last


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    file = folder / "old.npz"
    run(*DIFF, "--candidate", "eager:kv=2", "--store", str(file), "--out", str(folder / "run"))
    return file


def test_a_part_of_what_was_stored_may_be_asked_for(stored: Path, tmp_path: Path) -> None:
    done = run(
        *DIFF, "--candidate", "eager:kv=2", "--n-kv", "65", "--inputs", "gaussian",
        "--against-stored", str(stored), "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode in (0, 1, 3), done.stderr


def test_other_rules_and_other_bits_are_refused(stored: Path, tmp_path: Path) -> None:
    asked = (
        *DIFF,
        "--candidate",
        "eager:kv=2",
        "--against-stored",
        str(stored),
        "--out",
        str(tmp_path / "r"),
    )
    rules = stored_baseline.RULES
    with mock.patch.object(stored_baseline, "RULES", 99):
        assert_refused(run(*asked), f"measured by rules {rules}, these are 99")
    drawn = stored_baseline.identity
    with mock.patch.object(stored_baseline, "identity", lambda each: drawn(each)[::-1]):
        done = run(*asked)
    assert done.returncode == 2 and "are others than those stored" in done.stderr


@pytest.mark.parametrize("harm", ["cut", "text", "other", "missing"])
def test_a_file_that_is_none_is_one_line(harm: str, stored: Path, tmp_path: Path) -> None:
    content = stored.read_bytes()
    file = tmp_path / "x.npz"
    if harm == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "text":
        file.write_text("not a file of numbers")
    elif harm == "other":
        header = np.frombuffer(json.dumps({"kind": "\x1b[2Jodd"}).encode(), dtype=np.uint8)
        written = io.BytesIO()
        np.savez(written, header=header, energies=np.zeros(1))
        file.write_bytes(written.getvalue())
    asked = (*DIFF, "--candidate", "eager:kv=2", "--against-stored", str(file), "--out", str(tmp_path / "r"))
    assert_refused(run(*asked), f"--against-stored {file}", "expected what --store wrote")
