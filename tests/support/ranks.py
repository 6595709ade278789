"""Several ranks of `verify` on this machine, as torchrun starts them, but forked: torch is loaded already."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from support.cli import Done


def verify_ranks(commands: Sequence[Sequence[str]], work: Path) -> list[Done]:
    """Each command as the rank of its number. What they said passes through files in `work`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(rank, len(commands), port, list(command), work))
        for rank, command in enumerate(commands)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "a rank hangs"
    return [
        Done(p.exitcode or 0, (work / f"{i}.out").read_text(), (work / f"{i}.err").read_text())
        for i, p in enumerate(processes)
    ]


def _rank(rank: int, size: int, port: int, command: list[str], work: Path) -> None:
    from verify.__main__ import main

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    out, err = io.StringIO(), io.StringIO()
    code = 99
    try:
        with redirect_stdout(out), redirect_stderr(err):
            sys.argv = ["verify", *command]
            main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        (work / f"{rank}.out").write_text(out.getvalue())
        (work / f"{rank}.err").write_text(err.getvalue())
        os._exit(code)
