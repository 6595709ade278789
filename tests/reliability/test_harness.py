"""Thousands of hostile inputs, by chance: only our own errors, nothing left running, nothing touched.

Seeded, and counted by outcome (`pytest -s` shows the counts). The fast tier has a hundredth of the slow.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.cli import Done, verify
from support.forks import Forks
from support.logits_files import write_file
from support.ppl_runs import Tiny, command, write_tiny
from support.problems import problem
from verify.arms.records import SCHEMA
from verify.engines.sweep_log import read_logs
from verify.kernels.errors import KernelFailure, MachineFailure, SpecError
from verify.kernels.registry import build_kernel
from verify.machine.errors import UsageError
from verify.model.architectures import architecture_of
from verify.model.errors import ModelError
from verify.model.gguf.dequantize import dequantize, type_is_supported
from verify.model.gguf.file import GGUFFile
from verify.model.tokenizer import Tokenizer
from verify.ppl.runfolder import RunFolder
from verify.ppl.settings import PplSettings

# A warning of numpy's would be a line on a user's screen that says nothing to him.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

# Numbers at which readers of files go wrong.
ODD_INTEGERS = (0, 1, 2, 7, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
ODD_FLOATS = (0.0, -1.0, 1e-30, 1e30, -1e30, float("inf"), float("nan"), -2000.0)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 3, 10**30, 1.5, 1e308, "", "x", "\x1b[2J\x07", "\ud800", "$\\frac{x$", "a" * 10_000),
    *([], [[]], [None], ["x"], {}, {"x": []}, [3, 1], "../../x", "nan"),
)
KERNELS = ("--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2")
CODES = (0, 1, 2, 3, 4)
MOST_GROWTH = 1 << 30


def counted(fast: int) -> pytest.MarkDecorator:
    """A test of so many inputs, and of a hundred times as many in the slow tier."""
    slow = pytest.param(100 * fast, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])
    return pytest.mark.parametrize("count", [fast, slow])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Memory of the whole test is."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MOST_GROWTH, f"{grown} bytes"


def said_well(done: Done) -> str:
    """The outcome in a word; no internal error, no traceback, no message of megabytes."""
    assert done.returncode in CODES, done
    assert "internal error" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not set("\x1b\x07") & set(done.stdout + done.stderr)
    assert len(done.stderr) < 20_000
    return f"exit {done.returncode}"


def mutated(content: bytes, draw: random.Random, within: int) -> bytes:
    """Some bytes, or an aligned or unaligned number, of the first `within` replaced; or cut off; or moved."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        within = min(within, len(found))
        if not within:
            break
        at, how = draw.randrange(within), draw.randrange(7)
        if how == 0:
            found[at] = draw.randrange(256)
        elif how == 1:
            found[at : at + 8] = struct.pack("<Q", draw.choice(ODD_INTEGERS))
        elif how == 2:
            found[at : at + 4] = struct.pack("<I", draw.choice(ODD_INTEGERS) & 0xFFFFFFFF)
        elif how == 3:
            found[at : at + 4] = struct.pack("<f", draw.choice(ODD_FLOATS))
        elif how == 4:
            other = draw.randrange(within)
            found[at : at + 16] = found[other : other + 16]
        elif how == 5:
            del found[at : at + draw.choice((1, 4, 8))]
        elif draw.random() < 0.2:
            del found[draw.randrange(len(found)) :]
    return bytes(found)


def show(name: str, outcomes: Counter[str]) -> None:
    print(f"\n{name}: {outcomes.total()}: {dict(sorted(outcomes.items()))}")


@counted(200)
def test_models(tiny: Tiny, tmp_path: Path, count: int) -> None:
    whole, draw, outcomes = tiny.model.read_bytes(), random.Random(11), Counter[str]()
    with GGUFFile.open(tiny.model) as file:
        header = min(info.offset for info in file.tensors.values())
    model = tmp_path / "mutant.gguf"
    for number in range(count):
        model.write_bytes(mutated(whole, draw, header))
        try:
            with GGUFFile.open(model) as file:
                architecture_of(file)
                Tokenizer.from_gguf(file).encode("the text, the 12 texts\n")
                for name, info in list(file.tensors.items())[:3]:
                    if type_is_supported(info.type_name):
                        dequantize(file, name)
            outcomes["opened"] += 1
        except ModelError as error:
            assert "\n" not in str(error) and len(str(error)) < 3000
            outcomes["refused"] += 1
            continue
        if number % 50 == 0:
            out = tmp_path / f"run-{number}"
            words = command(Tiny(model, tiny.text), out, *KERNELS, "--chunks", "1", "-c", "16")
            outcomes[f"run: {said_well(verify(*words))}"] += 1
            shutil.rmtree(out, ignore_errors=True)
    show("models", outcomes)


@counted(50)
def test_logits_files(tmp_path: Path, count: int) -> None:
    draw, outcomes = random.Random(12), Counter[str]()
    for name, seed in (("a", 0), ("b", 0)):
        write_file(tmp_path / f"{name}.kld", seed=seed, noise=1e-3 * (name == "b"))
    whole, other = (tmp_path / "a.kld").read_bytes(), tmp_path / "mutant.kld"
    for _ in range(count):
        other.write_bytes(mutated(whole, draw, len(whole) if draw.random() < 0.7 else 40))
        pair = [str(tmp_path / "b.kld"), str(other)]
        draw.shuffle(pair)
        outcomes[said_well(verify("kld", *pair))] += 1
    show("logits files", outcomes)


TABLE = (
    "|  PP |  TG |  N_KV |  T_PP s | S_PP t/s |  T_TG s | S_TG t/s |\n|-----|-----|-------|---|---|---|---|\n"
)


def a_log(draw: random.Random, *, as_json: bool) -> str:
    rows = []
    for i in range(draw.choice((3, 12, 40))):
        n_kv, pp, tg = 2048 * i, 1.1 + 0.02 * i, 5.0 + 0.1 * i + draw.random() * 0.01
        if as_json:
            values = {"pp": 2048, "tg": 512, "n_kv": n_kv, "t_pp": pp, "t_tg": tg}
            rows.append(json.dumps(values | {"speed_pp": 2048 / pp, "speed_tg": 512 / tg}))
        else:
            figures = f"{pp:.3f} | {2048 / pp:.2f} | {tg:.3f} | {512 / tg:.2f}"
            rows.append(f"| 2048 | 512 | {n_kv} | {figures} |")
    return "\n".join(rows) if as_json else TABLE + "\n".join(rows)


@counted(50)
def test_logs(tmp_path: Path, count: int) -> None:
    draw, outcomes = random.Random(13), Counter[str]()
    (tmp_path / "good").write_text(a_log(random.Random(0), as_json=False))
    log = tmp_path / "mutant"
    for number in range(count):
        text = a_log(draw, as_json=draw.random() < 0.4)
        for _ in range(draw.choice((1, 2, 8))):
            at = draw.randrange(len(text))
            odd = draw.choice(
                ("|", "\n", "nan", "-", "1e400", "9" * 40, "\x1b[31m", "{", '"', "\x00", "é", "[" * 3000)
            )
            text = text[:at] + odd + text[at + draw.choice((0, 1, 9)) :]
        log.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            read_logs(log)
            outcomes["read"] += 1
        except UsageError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        if number % 10 == 0:
            outcomes[f"command: {said_well(verify('sweep', str(tmp_path / 'good'), str(log)))}"] += 1
    show("logs", outcomes)


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that is finished, and one that was ended before its last step."""
    folder = tmp_path_factory.mktemp("runs")
    verify(*command(tiny, folder / "finished", *KERNELS, "--chunks", "2"))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write_results", interrupted)
        verify(*command(tiny, folder / "unfinished", *KERNELS, "--chunks", "2", "--memory", "1K"))
    assert (folder / "finished/report.html").is_file() and (folder / "unfinished/groups/00000").is_dir()
    return folder / "finished", folder / "unfinished"


def leaves(x: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of some JSON lies."""
    if at:
        yield at
    if isinstance(x, dict | list):
        for key in x if isinstance(x, dict) else range(len(x)):
            yield from leaves(x[key], (*at, key))


def tamper(file: Path, draw: random.Random) -> None:
    if file.suffix != ".json" or draw.random() < 0.1:
        content = file.read_bytes()
        file.write_bytes(mutated(content, draw, len(content)))
        return
    content = json.loads(file.read_text())
    *path, last = draw.choice(list(leaves(content)))
    inside = content
    for key in path:
        inside = inside[key]
    if draw.random() < 0.2:
        del inside[last]
    else:
        inside[last] = draw.choice(ODD_VALUES)
    file.write_text(json.dumps(content))


def snapshot(folder: Path) -> dict[str, Any]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


@counted(20)
def test_run_folders(runs: tuple[Path, Path], tmp_path: Path, count: int) -> None:
    draw, outcomes = random.Random(14), Counter[str]()
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("x", "report.md", "settings.json"):
        (outside / name).write_text("precious")
    before = snapshot(outside)
    for number in range(count):
        base = runs[number % 2]
        run = tmp_path / "run"
        shutil.copytree(base, run)
        files = sorted(p for p in run.rglob("*") if p.suffix in (".json", ".parquet"))
        victim = draw.choice([p for p in files if p.suffix == ".json"] if draw.random() < 0.7 else files)
        if draw.random() < 0.1:
            victim.unlink()
            how = draw.randrange(3)
            if how == 0:
                victim.symlink_to(outside / "x")
            elif how == 1:
                os.mkfifo(victim)
        else:
            tamper(victim, draw)
        for name in ("report.md", "report.html"):
            if draw.random() < 0.3:
                (run / name).unlink(missing_ok=True)
                (run / name).symlink_to(outside / "report.md")
        outcomes[f"report: {said_well(verify('report', str(run)))}"] += 1
        if number % 2:
            outcomes[f"resumed: {resumed(run)}"] += 1
        shutil.rmtree(run)
    assert snapshot(outside) == before
    show("run folders", outcomes)


def resumed(run: Path) -> str:
    """What going on with a run reads of its folder, without the model."""
    folder = None
    try:
        folder = RunFolder.reopen(run)
        stored = folder.read_settings("ppl")
        assert stored["schema"] == SCHEMA
        PplSettings.from_json(stored["settings"])
        for first in folder.finished_groups():
            folder.load_group(first)
    except (UsageError, SpecError, ModelError) as error:
        assert "\n" not in str(error)
        return "refused"
    finally:
        if folder is not None:
            folder.release()
    return "read"


BEHAVES = """
import json, os, signal, sys, time, torch
HERE = os.path.dirname(os.path.abspath(__file__))
answers, shared = int(sys.argv[2]), int(sys.argv[3])
def attend(q, k, v, *, kv_len, scale):
    exec(open(os.path.join(HERE, "body")).read(), globals())
    return q
"""


EXCEPTIONS = ("SystemExit", "KeyboardInterrupt", "MemoryError", "RecursionError", "OSError")
SIGNALS = (1, 2, 6, 7, 8, 9, 11, 13, 14, 15, 24, 34, 40)


def a_behaviour(draw: random.Random) -> str:
    n = draw.choice((0, 1, 3, 1000, 100_000))
    return draw.choice(
        (
            f"raise RuntimeError('x\\x1b\\ud800' * {n})",
            f"raise {draw.choice(EXCEPTIONS)}({n})",
            f"os.kill(os.getpid(), {draw.choice(SIGNALS)}); time.sleep(60)",
            f"os._exit({draw.randrange(256)})",
            f"os.write(answers, b'x' * {n}); os.write(answers, b'\\n'); time.sleep(0.2)",
            f"os.write(answers, json.dumps({draw.choice(ODD_VALUES)!r}).encode() + b'\\n'); time.sleep(0.2)",
            f"os.write(answers, json.dumps({{'failure': {draw.choice(ODD_VALUES)!r}}}).encode() + b'\\n')",
            f"os.write(answers, json.dumps({{'dtype': {draw.choice(ODD_VALUES)!r}}}).encode() + b'\\n')",
            f"os.ftruncate(shared, {n}); os.write(answers, b'{{}}\\n'); time.sleep(0.2)",
            "os.closerange(3, 64)",
            f"print('line\\x1b[2J' * 9 + '\\n' * {n % 2000}); sys.stdout.flush(); os.abort()",
            f"os.fork() or time.sleep(60); raise ValueError({n})",
            "while True: pass",
            f"q.view(-1)[:{n % 50}] = 7",
            f"globals()['attend'] = None; raise ValueError({n})",
            "os.setpgid(0, 0)" if n else "os.chdir('/'); raise ValueError(1)",
            "signal.signal(signal.SIGALRM, signal.SIG_IGN); time.sleep(60)",
        )
    )


@counted(5)
def test_worker_behaviours(tmp_path: Path, count: int, capfd: pytest.CaptureFixture[str]) -> None:
    draw, outcomes, mark = random.Random(15), Counter[str](), str(uuid.uuid4())
    (tmp_path / "kernel.py").write_text(BEHAVES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERIFY_MARK", mark)
        kernel = build_kernel(f"py:{tmp_path / 'kernel.py'}::attend,timeout=1")
        for _ in range(count):
            (tmp_path / "body").write_text(a_behaviour(draw))
            kernel.forgive()
            try:
                kernel.run(problem(rows=3))
                outcomes["ran"] += 1
            except (KernelFailure, MachineFailure) as failure:
                assert len(str(failure)) < 2500 and not set("\x1b\x07\n") & set(str(failure)), failure
                outcomes[getattr(failure, "kind", "the machine's")] += 1
        kernel.close()
    said = capfd.readouterr()
    assert "\x1b" not in said.err
    assert not left_over(mark)
    show("worker behaviours", outcomes)


def left_over(mark: str, patience: float = 30) -> list[int]:
    """Processes that still run and inherited the mark."""
    end = time.monotonic() + patience
    while found := [
        pid
        for pid in map(int, filter(str.isdigit, (p.name for p in Path("/proc").iterdir())))
        if marked(pid, mark)
    ]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    for pid in found:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return found


def marked(pid: int, mark: str) -> bool:
    if pid == os.getpid():
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" and mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


SLOW_KERNEL = """
import time, torch
def attend(q, k, v, *, kv_len, scale):
    time.sleep(0.05)
    g = q.shape[2] // k.shape[2]
    k, v = (x.float().repeat_interleave(g, 2).transpose(1, 2) for x in (k, v))
    s = q.float().transpose(1, 2) @ k.transpose(-1, -2) * scale
    s = s.masked_fill(torch.arange(k.shape[2]) >= kv_len[:, None, :, None], -torch.inf)
    return (s.softmax(-1) @ v).transpose(1, 2)
"""


class Alone:
    """`verify *words` from the start of a new interpreter, as `Forked` is one."""

    def __init__(self, *words: str, said: Path, **env: str) -> None:
        self.said = said
        with said.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "verify", *words], env=os.environ | env, stdout=file, stderr=file
            )
        self.send_signal = self._process.send_signal

    def wait(self, timeout: float) -> tuple[int, str]:
        code = self._process.wait(timeout)
        return code, self.said.read_text(errors="replace")


# Of an interpreter that has not come to our first line.
UNBORN = ("KeyboardInterrupt\n",)


@pytest.mark.slow
@counted(1)
def test_signals_at_random_moments(tiny: Tiny, tmp_path: Path, count: int) -> None:
    """Of runs, and one in four while they are loaded."""
    draw, outcomes, mark = random.Random(16), Counter[str](), str(uuid.uuid4())
    (tmp_path / "slow.py").write_text(SLOW_KERNEL)
    spec = f"py:{tmp_path / 'slow.py'}::attend"
    words = ["--baseline", "eager", "--candidate", spec, "--memory", "1K", "--chunks", "2"]
    whole, out, said = tmp_path / "whole", tmp_path / "run", tmp_path / "said"
    sent = 0
    with Forks() as forks:
        began = time.monotonic()
        forks.begin(*command(tiny, whole, *words), said=said).wait(200)
        lasts = time.monotonic() - began
        wanted = {name: (whole / f"{name}.parquet").read_bytes() for name in ("tokens", "layers")}
        while sent < count:
            begun = (out / "settings.json").is_file()
            if not begun:
                shutil.rmtree(out, ignore_errors=True)
            asked = (
                ["ppl", "--resume", str(out), "--candidate", spec] if begun else command(tiny, out, *words)
            )
            begin = Alone if draw.random() < 0.25 else forks.begin
            process = begin(*asked, said=said, VERIFY_MARK=mark)
            number = draw.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL))
            try:
                code, printed = process.wait(draw.uniform(0.02, lasts))
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                code, printed = process.wait(120)
                sent += 1
                outcomes[f"{signal.Signals(number).name}: {code}"] += 1
                assert code in (*CODES, 128 + number, -number, -signal.SIGALRM), (code, number, printed)
                assert code != 1 or "verdict" in printed, printed
                assert code != 128 + number or "interrupted" in printed, (begin, printed)
            assert not left_over(mark)
            assert "\x1b" not in printed and "internal error" not in printed
            assert "Traceback" not in printed or (printed.endswith(UNBORN) and "_guarded" not in printed), (
                printed
            )
            if (out / "report.html").is_file() and not (out / "groups").is_dir():
                outcomes["finished"] += 1
                for name, content in wanted.items():
                    assert (out / f"{name}.parquet").read_bytes() == content
                shutil.rmtree(out)
    show("signals", outcomes)


def test_the_mark_finds_what_runs() -> None:
    """The check of orphans can fail."""
    mark = str(uuid.uuid4())
    child = subprocess.Popen(["sleep", "60"], env={**os.environ, "VERIFY_MARK": mark})
    try:
        assert left_over(mark, patience=0.2) == [child.pid]
    finally:
        child.kill()
        child.wait()
    assert not left_over(mark)
