"""The process in which a foreign kernel runs: a loop that answers questions. It imports nothing of ours.

Arguments: file descriptor to read questions from, one to write answers to, one of the shared memory, the life
line's, the servant's file, and its arguments as JSON. Questions and answers are lines of JSON; the first
answer says whether the servant could load what it was told to. A servant is a file with

    load(arguments) -> (greeting, answer)     raises Refusal, whose message is the whole story
    answer(question, memory) -> dict          {} or {"failure": kind, "message": text}

A question holds `tensors`, name -> [dtype, shape, offset into memory], and `results`, name ->
[shape, offset], where the answer belongs as float32.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import mmap
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

# What somebody may still read of an exception's text.
MOST_LETTERS = 2000
# What a full or small machine answers; and how torch says it.
MACHINE_ERRORS = {errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EIO}
NO_MEMORY = ("can't allocate memory", "out of memory")


class Refusal(Exception):
    """What was asked for cannot be used: the message is the whole story. `kind` as of `KernelFailure`."""

    def __init__(self, message: str, kind: str = "import") -> None:
        super().__init__(message)
        self.kind = kind


def module_beside(name: str) -> Any:
    """A module, or a folder of them, that lies beside this file, loaded by its place: the user's own modules
    come first by name."""
    file, folder = Path(__file__).with_name(f"{name}.py"), Path(__file__).with_name(name)
    if folder.is_dir():
        file = folder / "__init__.py"
    inside = [str(folder)] if folder.is_dir() else None
    spec = importlib.util.spec_from_file_location(f"verify_{name}", file, submodule_search_locations=inside)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    questions = os.fdopen(int(sys.argv[1]), "rb")
    answers = int(sys.argv[2])
    shared, life, servant_file = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    arguments = json.loads(sys.argv[6])
    # The tool decides what a Ctrl-C means; it ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(fcntl, "F_SETSIG"):
        threading.Thread(target=end_with_life_line, args=(life,), daemon=True).start()

    def say(answer: dict[str, Any]) -> None:
        left = json.dumps(answer).encode() + b"\n"
        try:
            while left:
                left = left[os.write(answers, left) :]
        except OSError:
            # Nobody listens any more, or the kernel has closed it.
            os._exit(1)

    # Servants name this module's Refusal; the script itself is called __main__.
    sys.modules["worker"] = sys.modules["__main__"]
    spec = importlib.util.spec_from_file_location("servant", servant_file)
    assert spec is not None and spec.loader is not None
    servant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(servant)
    del sys.modules["worker"]
    try:
        greeting, answer_to = servant.load(arguments)
    except Refusal as refusal:
        say({"failure": refusal.kind, "message": text_of(refusal)})
        return
    say(greeting)
    for line in questions:
        question = json.loads(line)
        # Ends this process whatever it does, if nobody else has.
        signal.alarm(min(question["limit_s"], 1 << 30))
        try:
            memory = mmap.mmap(shared, question["bytes"])
            answer = answer_to(question, memory)
        except Refusal as refusal:
            answer = {"failure": refusal.kind, "message": text_of(refusal)}
        except NotImplementedError as error:
            # What a kernel does not have is no evidence about what it has.
            answer = {"failure": "unsupported", "message": text_of(error) or "NotImplementedError"}
        except BaseException as error:  # SystemExit too
            print_traceback(error)
            kind = "machine" if is_the_machines(error) else "raised"
            answer = {"failure": kind, "message": f"{type(error).__name__}: {text_of(error)}"}
        signal.alarm(0)
        say(answer)


def text_of(error: BaseException) -> str:
    """The exception's text, capped; one whose text cannot be had has none."""
    try:
        text = str(error)
    except BaseException:
        return "(its text cannot be had)"
    if len(text) > MOST_LETTERS:
        text = f"{text[:MOST_LETTERS]} ... ({len(text)} letters)"
    return text


def print_traceback(error: BaseException) -> None:
    """To stderr: where in the user's own code it was raised, and what."""
    try:
        own = {__file__, sys.argv[5]}
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in own]
        print("the kernel raised, at", *traceback.format_list(frames), sep="\n", file=sys.stderr)
        print(f"{type(error).__name__}: {text_of(error)}", file=sys.stderr, flush=True)
    except BaseException:
        pass


def is_the_machines(error: BaseException) -> bool:
    """Whether memory, room or descriptors ran out, rather than the kernel being wrong."""
    if isinstance(error, OSError):
        return error.errno in MACHINE_ERRORS
    if isinstance(error, RuntimeError):
        return any(words in text_of(error) for words in NO_MEMORY)
    return isinstance(error, MemoryError)


def end_with_life_line(life: int) -> None:
    """For systems that do not end a group by themselves: end it when the other side is gone."""
    os.read(life, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
