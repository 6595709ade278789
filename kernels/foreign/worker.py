"""The process in which a foreign kernel runs: a loop that answers questions. It imports nothing of ours.

Arguments: file descriptor to read questions from, one to write answers to, one of the shared memory, the
servant's file, and its arguments as JSON. Questions and answers are lines of JSON; the first answer says
whether the servant could load what it was told to. A servant is a file with

    load(arguments) -> (greeting, answer)     raises Refusal, whose message is the whole story
    answer(question, memory) -> dict          {} or {"failure": kind, "message": text}

A question holds `tensors`, name -> [dtype, shape, offset into memory], and `results`, name ->
[shape, offset], where the answer belongs as float32.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import signal
import sys
import traceback
from typing import Any


class Refusal(Exception):
    """What was asked for cannot be used: the message is the whole story. `kind` as of `KernelFailure`."""

    def __init__(self, message: str, kind: str = "import") -> None:
        super().__init__(message)
        self.kind = kind


def main() -> None:
    questions = os.fdopen(int(sys.argv[1]), "rb")
    answers = os.fdopen(int(sys.argv[2]), "wb", buffering=0)
    shared, servant_file, arguments = int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5])
    # The tool decides what a Ctrl-C means; it ends this process by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer).encode() + b"\n")

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
        say({"failure": refusal.kind, "message": str(refusal)})
        return
    say(greeting)
    for line in questions:
        question = json.loads(line)
        memory = mmap.mmap(shared, question["bytes"])
        try:
            answer = answer_to(question, memory)
        except Refusal as refusal:
            answer = {"failure": refusal.kind, "message": str(refusal)}
        except NotImplementedError as error:
            # What a kernel does not have is no evidence about what it has.
            answer = {"failure": "unsupported", "message": str(error) or "NotImplementedError"}
        except Exception as error:
            traceback.print_exc()
            answer = {"failure": "raised", "message": f"{type(error).__name__}: {error}"}
        say(answer)


if __name__ == "__main__":
    main()
