"""An interrupt while the program is still loading is one line and 128 + the signal's number."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Sends this process the signal when the module is about to be imported.
SENDS = """
import os, sys, time
where, number, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def send():
    os.kill(os.getpid(), number)
    time.sleep(0 if how == "ignored" else 5)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != where:
            return
        sys.meta_path.remove(self)
        if how == "exec":
            exec("send()", {"send": send})
        elif how in ("swallowed", "refused"):
            try:
                send()
            except KeyboardInterrupt:
                if how == "swallowed":
                    raise ImportError("a part of it cannot be had")
                from verify.machine.errors import UsageError
                raise UsageError("a file: expected a part of it")
        else:
            send()
sys.meta_path.insert(0, Finder())
from verify.__main__ import main
sys.argv = ["verify", "ppl", "-m", "/no such model", "-f", "/no such text"]
main()
"""


@pytest.mark.parametrize(
    ("where", "number", "how"),
    [
        pytest.param("verify.machine.standing", signal.SIGINT, "plain", marks=pytest.mark.slow),
        ("verify.commands", signal.SIGTERM, "plain"),
        ("pydantic", signal.SIGINT, "plain"),
        pytest.param("verify.commands.ppl", signal.SIGHUP, "plain", marks=pytest.mark.slow),
        pytest.param("verify.commands.ppl", signal.SIGINT, "exec", marks=pytest.mark.slow),
        ("verify.commands.ppl", signal.SIGINT, "swallowed"),
        pytest.param("verify.ppl.experiment", signal.SIGTERM, "swallowed", marks=pytest.mark.slow),
        ("verify.ppl.experiment", signal.SIGHUP, "refused"),
    ],
)
def test_an_interrupted_import_is_one_line(where: str, number: int, how: str) -> None:
    words = [sys.executable, "-c", SENDS, where, str(int(number)), how]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (128 + number, "verify: interrupted\n", "")


def test_next_to_nothing_is_loaded_before_an_interrupt_is_one_line() -> None:
    """Until `main` begins Ctrl-C is Python's own traceback: that was a third of a second in a checkout."""
    asked = "import sys; before = {*sys.modules}; import verify.__main__; print(*{*sys.modules} - before)"
    words = [sys.executable, "-S", "-c", asked]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    loaded = {*done.stdout.split()}
    assert "verify.checkout" in loaded
    assert not loaded & {"collections", "contextlib", "enum", "pathlib", "re", "tomllib", "typing"}


def test_a_hangup_that_is_ignored_ends_nothing() -> None:
    """Under `nohup`: the command goes on to what it has to say."""
    words = [sys.executable, "-c", SENDS, "verify.commands.ppl", str(int(signal.SIGHUP)), "ignored"]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.returncode == 2 and "/no such" in done.stderr, done.stderr


SWALLOWED = """
import os, signal, time, weakref
from verify.machine.standing import Ended
class Held: pass
def callback(_):
    os.kill(os.getpid(), signal.{name})
    for _ in range(1000): pass
with Ended() as ended:
    held = Held()
    kept = weakref.ref(held, callback)
    try:
        del held
        time.sleep(20)
        print("went on")
    except KeyboardInterrupt:
        print("ended by", ended.came)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_a_callback_swallows_comes_again(name: str) -> None:
    """A weak reference's callback cannot raise: the run went on, and was killed a minute later."""
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED.format(name=name)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["ended", "by", str(int(getattr(signal, name)))], done.stderr
    assert done.stderr == ""
