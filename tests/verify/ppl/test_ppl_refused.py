"""What `verify ppl` refuses, in one line: bad input, models that cannot be run, runs that cannot go on."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from support.cli import assert_refused, verify
from support.ppl_runs import Tiny, command, run
from support.tiny_model import write_tiny_model
from support.twins import TWINS
from verify.arms.arm import Arm
from verify.arms.model_facts import try_kernels
from verify.arms.records import SCHEMA
from verify.kernels.call import AttentionPath
from verify.kernels.registry import build_kernel
from verify.machine.errors import UsageError
from verify.model.architectures import architecture_of
from verify.model.gguf.file import GGUFFile
from verify.ppl.runfolder import RunFolder


def test_a_finished_run_is_not_run_again(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny, tmp_path / "run")
    assert_refused(verify("ppl", "--resume", str(tmp_path / "run")), "is finished")


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    assert_refused(verify("ppl", "--resume", str(tmp_path)), "expected the folder of a run")


def test_a_run_is_not_continued_with_another_model(tiny: Tiny, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model.gguf")
    out = tmp_path / "run"
    run(Tiny(model, tiny.text), out)
    (out / "groups").mkdir()
    write_tiny_model(model, seed=5)
    done = verify("ppl", "--resume", str(out))
    assert done.returncode == 2
    assert "model changed since the run began" in done.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("-m", "nowhere.gguf"), "nowhere.gguf"),
        (("-f", "nowhere.txt"), "nowhere.txt"),
        (("--candidate", "flahs"), "did you mean 'flash'"),
        (("--candidate", "flash:heds=2"), "did you mean 'heads'"),
        (("--candidate", "flash:heads=8+4"), "sums to 12, expected r = 2"),
        (("--path", "sideways"), "--path sideways"),
        (("--chunks", "0"), "chunks"),
        (("--chunks", "many"), "'--chunks': Input should be a valid integer"),
        (("--cache-type", "q9"), "--cache-type: cache 'q9'"),
        (("--memory", "lots"), "--memory lots"),
        (("--device", "tpu"), "--device tpu"),
        (("--margin", "0.5"), "--margin"),
        (("--compute", "f16"), "--compute f16"),
        (("--nonsense",), "--nonsense"),
        (("-c", "4096"), "expected at least 8192"),
    ],
)
def test_bad_input_is_one_line(tiny: Tiny, tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    done, _ = run(tiny, tmp_path / "run", *more)
    assert_refused(done, said)


def test_windows_of_a_few_tokens_are_run_and_said_to_be(tiny: Tiny, tmp_path: Path) -> None:
    done, _ = run(tiny, tmp_path / "run", "-c", "8", "--chunks", "2")
    assert done.returncode != 2, done.stderr
    assert "-c 8 is 8 tokens a window, 3 of them scored; 8k are -c 8192" in done.stderr


def test_an_unwritable_folder(tiny: Tiny, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    done, _ = run(tiny, blocked / "run")
    assert_refused(done, "--out", "cannot be written")


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny, tmp_path / "run")
    before = (tmp_path / "run/run.json").read_bytes()
    done, _ = run(tiny, tmp_path / "run")
    assert_refused(done, "--resume")
    assert (tmp_path / "run/run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "mamba"}, "'mamba'"),
        ({"pre": "klingon"}, "klingon"),
        ({"drop": ("blk.1.ffn_up.weight",)}, "blk.1.ffn_up.weight is missing"),
        ({"attention__head_count_kv": 3}, "not a multiple"),
        ({"embedding_length": 32}, "expected [32]"),
    ],
)
def test_models_that_cannot_be_run_are_named(
    tiny: Tiny, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    model = write_tiny_model(tmp_path / "odd.gguf", **change)
    done, _ = run(Tiny(model, tiny.text), tmp_path / "run")
    assert_refused(done, "odd.gguf", said)


def test_a_truncated_model(tiny: Tiny, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    whole = tiny.model.read_bytes()
    cut.write_bytes(whole[: len(whole) - 5000])
    done, _ = run(Tiny(cut, tiny.text), tmp_path / "run")
    assert_refused(done, "cut.gguf")


def test_a_file_that_is_no_model(tiny: Tiny, tmp_path: Path) -> None:
    done, _ = run(Tiny(tiny.text, tiny.text), tmp_path / "run")
    assert_refused(done, "text.txt")


@pytest.mark.parametrize(
    ("name", "said"), [("list", "ik-1183"), ("doctor", "kernel flash"), ("--help", "Commands")]
)
def test_commands_that_compare_nothing(name: str, said: str) -> None:
    done = verify(name)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_a_resumed_run_takes_no_other_settings(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(tiny, out)
    done = verify("ppl", "--resume", str(out), "--candidate", "eager", "--device", "cpu")
    assert_refused(done, f"--resume {out}", "expected no --candidate or --device beside it")
    # What may stand there gets further.
    assert_refused(verify("ppl", "--resume", str(out), "--memory", "8G"), "that run is finished")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--candidate", "sdpa:flash", "--path", "prefill"), "has no path prefill"),
        (("--candidate", "sdpa:flash", "--cache-type", "f32"), "has no dtype float32"),
        (("--margin", "inf"), "--margin inf"),
        (("--memory", "inf"), "--memory inf"),
        (("--checkpoint-minutes", "inf"), "--checkpoint-minutes inf"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    tiny: Tiny, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done, _ = run(tiny, tmp_path / "run", *options)
    assert_refused(done, said)
    assert not (tmp_path / "run").exists()


def test_a_function_that_does_not_take_what_the_model_asks_is_refused(tmp_path: Path) -> None:
    """Some layers of gemma3 have a sliding window; a function that takes one is not run here."""
    TWINS["gemma3"].build(tmp_path / "gemma3.gguf")
    architecture = architecture_of(GGUFFile.open(tmp_path / "gemma3.gguf"))
    own = tmp_path / "own.py"
    own.write_text(
        "def plain(q, k, v, *, kv_len, scale):\n    raise AssertionError\n"
        "def windowed(q, k, v, *, kv_len, scale, sliding_window):\n    raise AssertionError\n"
    )
    for function, refused in (("windowed", False), ("plain", True)):
        spec = f"py:{own}::{function}"
        arm = Arm("candidate", "candidate", spec, "decode", build_kernel(spec))
        with pytest.raises(UsageError, match="sliding window") if refused else nullcontext():
            try_kernels([arm], architecture, "f16", torch.device("cpu"))


def test_what_is_given_windows_is_tried_on_a_window(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU rows of a window run other code than a row alone: that is what shall be compiled."""
    architecture = architecture_of(GGUFFile.open(tiny.model))
    tried: list[list[list[int]]] = []
    paths: dict[AttentionPath, list[int]] = {"decode": [1, 2], "prefill": [1]}
    for path, rows in paths.items():
        arm = Arm("candidate", "candidate", "eager", path, build_kernel("eager"))
        assert arm.kernel is not None
        monkeypatch.setattr(arm.kernel, "run", lambda call: tried.append(call.kv_len.tolist()))
        try_kernels([arm], architecture, "f16", torch.device("cpu"))
        assert tried.pop() == [rows]


def test_types_of_keys_and_values_may_differ(tiny: Tiny, tmp_path: Path) -> None:
    _, report = run(tiny, tmp_path / "both", "-ctk", "bf16", "-ctv", "bf16")
    assert report["settings"]["cache_type"] == "bf16"
    _, report = run(tiny, tmp_path / "apart", "-ctk", "e4m3", "-ctv", "f16")
    assert report["settings"]["cache_type"] == "e4m3/f16"
    assert (
        "all arms, exact too, have the cache e4m3/f16: what that loses is in no distance" in report["notes"]
    )
    for i, (more, said) in enumerate(
        (
            (("-ctk", "q8_0"), "expected head sizes in multiples of 32"),
            (("-ctk", "q8_0/q4_0"), "-ctk q8_0/q4_0: expected one type"),
            (("--cache-type", "e4m3+scale=head"), "expected scale=token or a number"),
            (("--cache-type", "q9_0"), "unknown type 'q9_0'"),
        )
    ):
        done, _ = run(tiny, tmp_path / str(i), *more)
        assert_refused(done, said)


@pytest.mark.parametrize("settings", [{}, [], {"candidates": 5}, {"n_ctx": "x"}, {"candidates": [1]}])
def test_settings_that_are_none(tmp_path: Path, settings: Any) -> None:
    stored = {"command": "ppl", "settings": settings, "identity": {}}
    (tmp_path / "settings.json").write_text(json.dumps(stored))
    done = verify("ppl", "--resume", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_field_that_is_no_setting_is_named(tmp_path: Path) -> None:
    for settings, said in (
        ({"n_ctx": "x"}, "n_ctx: expected int, got 'x'"),
        ({"margin": None}, "margin: expected float, got None"),
        ({"candidates": [1]}, "candidates: expected a list of texts"),
    ):
        stored = {"command": "ppl", "schema": SCHEMA, "settings": settings, "identity": {}}
        (tmp_path / "settings.json").write_text(json.dumps(stored))
        assert_refused(verify("ppl", "--resume", str(tmp_path)), "settings.json", said)
    (tmp_path / "settings.json").write_text("[]")
    assert_refused(verify("ppl", "--resume", str(tmp_path)), "settings.json is not that of a run")


def test_logits_that_cannot_be_written_are_refused_before_there_is_a_folder(
    tiny: Tiny, tmp_path: Path
) -> None:
    for target, said in ((tmp_path / "none/x.kld", "no such folder"), (tmp_path, "is a folder")):
        done, _ = run(tiny, tmp_path / "run", "--save-logits", str(target))
        assert_refused(done, f"--save-logits {target}", said)
        assert not (tmp_path / "run").exists()


def test_options_are_called_what_they_are(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny, tmp_path / "run")
    done = verify("ppl", "--resume", str(tmp_path / "run"), "-c", "32", "-ctk", "f16")
    assert_refused(done, "expected no -ctk or --ctx-size beside it")


def test_a_run_goes_on_from_another_folder(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model and text were named from where it was begun."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
    for name, file in (("tiny.gguf", tiny.model), ("text.txt", tiny.text)):
        (here / name).symlink_to(file)
    monkeypatch.chdir(here)
    short = Tiny(Path("tiny.gguf"), Path("text.txt"))
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_results", _interrupted)
        assert verify(*command(short, Path("run"))).returncode == 130
    monkeypatch.chdir(elsewhere)
    done = verify("ppl", "--resume", "../here/run")
    assert done.returncode in (0, 3), done.stderr
    assert (here / "run/run.json").is_file()


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt
