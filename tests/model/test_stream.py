"""Streaming gives what `dequantize` gives, reads each piece once, and passes errors on to the taker."""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from support.tiny_model import write_tiny_model
from verify.model.errors import ModelError
from verify.model.gguf.dequantize import dequantize
from verify.model.gguf.file import GGUFFile
from verify.model.stopwatch import Stopwatch
from verify.model.stream import Piece, TensorStream

CPU = torch.device("cpu")
NAMES = [f"blk.{layer}.{kind}.weight" for layer in range(2) for kind in ("attn_q", "attn_norm", "ffn_down")]


@pytest.fixture
def file(tmp_path: Path) -> GGUFFile:
    return GGUFFile.open(write_tiny_model(tmp_path / "tiny.gguf"))


def stream_of(file: GGUFFile, ahead_bytes: int = 1 << 20) -> TensorStream:
    return TensorStream(file, CPU, Stopwatch(CPU), ahead_bytes=ahead_bytes)


@pytest.mark.parametrize("announced", [NAMES, NAMES[:2], list(reversed(NAMES)), []])
@pytest.mark.parametrize("ahead_bytes", [0, 20_000, 1 << 20])
def test_pieces_are_those_of_the_file(file: GGUFFile, announced: list[str], ahead_bytes: int) -> None:
    stream = stream_of(file, ahead_bytes)
    stream.ahead(Piece(name) for name in announced)
    for name in NAMES:
        assert torch.equal(stream.take(name), dequantize(file, name))
    assert stream.read_bytes == {name: file.tensor(name).n_bytes for name in NAMES}
    stream.close()


def test_rows_are_read_alone(file: GGUFFile) -> None:
    stream = stream_of(file)
    stream.ahead([Piece(NAMES[0], (3, 5))])
    assert torch.equal(stream.take(NAMES[0], slice(3, 5)), dequantize(file, NAMES[0])[3:5])
    assert stream.read_bytes[NAMES[0]] == 2 * 64 * 4
    stream.close()


def test_it_reads_no_further_ahead_than_it_may(file: GGUFFile) -> None:
    size = file.tensor(NAMES[0]).n_bytes
    stream = stream_of(file, size)
    pieces = [Piece(NAMES[0], (i, i + 32)) for i in (0, 32)] + [Piece(NAMES[3], (0, 32))]
    stream.ahead(pieces)
    for _ in range(100):
        if len(stream._staged) == 2:
            break
        time.sleep(0.02)
    time.sleep(0.1)
    assert set(stream._staged) == set(pieces[:2])
    stream.close()


def test_what_was_announced_and_not_taken_is_forgotten(file: GGUFFile) -> None:
    stream = stream_of(file)
    stream.ahead(Piece(name) for name in NAMES)
    stream.forget()
    assert not stream._staged
    assert not stream.read_bytes
    assert torch.equal(stream.take(NAMES[1]), dequantize(file, NAMES[1]))
    stream.close()


def test_a_closed_file_is_an_error_where_it_is_taken(file: GGUFFile) -> None:
    stream = stream_of(file)
    file.close()
    stream.ahead([Piece(NAMES[0])])
    with pytest.raises(ModelError, match=r"attn_q\.weight"):
        stream.take(NAMES[0])


def test_a_thread_ends_with_its_stream(file: GGUFFile) -> None:
    before = threading.active_count()
    stream = stream_of(file)
    stream.ahead([Piece(NAMES[0])])
    stream.close()
    assert threading.active_count() == before


def test_a_thread_ends_with_a_stream_that_nobody_has_any_more(tmp_path: Path) -> None:
    """And with it the file is let go of: a process that opens many models has few files open."""
    before = set(threading.enumerate())
    stream = stream_of(GGUFFile.open(write_tiny_model(tmp_path / "tiny.gguf")))
    stream.ahead([Piece(NAMES[0])])
    (thread,) = set(threading.enumerate()) - before
    stream.take(NAMES[0])
    held = weakref.ref(stream.file)
    del stream
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert held() is None


def test_a_stream_begins_anew_where_its_thread_is_another_processes(file: GGUFFile) -> None:
    """As in a process that was forked while the thread held the lock, and read."""
    stream = stream_of(file)
    stream.ahead(Piece(name) for name in NAMES[:2])
    stream.forget()
    stream._change.acquire()
    stream._reading = Piece(NAMES[0])
    stream.begin_anew()
    stream.ahead(Piece(name) for name in NAMES)
    for name in NAMES:
        assert torch.equal(stream.take(name), dequantize(file, name))
    stream.close()
