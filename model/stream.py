"""Tensors of a file as a layer asks for them: read ahead, copied, decoded, dropped, and counted.

    file --a thread reads ahead--> stored bytes --> the device --> decoded there, when they are taken

While a layer computes, the thread reads what the next one will take, as far as `ahead_bytes` go. For a GPU it
reads into pinned memory and starts the copy on a stream of its own. What nobody announced is read when it is
taken. Nothing that is decoded is kept: the caller drops it.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch

from verify.model.errors import ModelError
from verify.model.gguf.dequantize import PLAIN_TYPES, decode, dequantize, type_is_supported
from verify.model.gguf.file import GGUFFile
from verify.model.gguf.held import ModelChanged
from verify.model.stopwatch import Stopwatch

# Stored bytes read ahead at most (at least one tensor is, whatever its size).
CPU_AHEAD_BYTES, GPU_AHEAD_BYTES = 64 << 20, 1 << 30
# Bytes copied from the map at a time, so that a long read does not keep the map's pages.
_READ_BYTES = 16 << 20


class Piece(NamedTuple):
    """A tensor, or rows first .. last-1 of its first dimension."""

    name: str
    rows: tuple[int, int] | None = None


class Share(Protocol):
    """How processes that run the same pieces in the same order read each of them once.

    reads: whether this process does. spread: the stored bytes, made the same in all of them. union: of what
    they name.
    """

    reads: bool

    def spread(self, stored: torch.Tensor) -> None: ...

    def union(self, named: Sequence[int]) -> list[int]: ...


class _Staged(NamedTuple):
    stored: torch.Tensor
    ready: torch.cuda.Event | None


class TensorStream:
    """The pieces of one file on one device.

    read_bytes: stored bytes that were read, by tensor. seconds waited for them are in the stopwatch's
    `reading`, what decoding took in `weights`.
    """

    def __init__(
        self,
        file: GGUFFile,
        device: torch.device,
        stopwatch: Stopwatch[str],
        *,
        ahead_bytes: int | None = None,
        share: Share | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.file, self.device, self.stopwatch, self.share = file, device, stopwatch, share
        self.dtype = dtype
        on_gpu = device.type == "cuda"
        default = GPU_AHEAD_BYTES if on_gpu else CPU_AHEAD_BYTES
        self.ahead_bytes = default if ahead_bytes is None else ahead_bytes
        self.read_bytes: Counter[str] = Counter()
        self._scales: dict[str, torch.Tensor] = {}
        # Of the bytes of each piece, so that one that is read again is the same.
        self._sums: dict[Piece, tuple[int, bytes]] = {}
        self._copies = torch.cuda.Stream(device) if on_gpu else None
        self._change = threading.Condition()
        self._wanted: deque[Piece] = deque()
        self._staged: dict[Piece, _Staged | Exception] = {}
        self._reading: Piece | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def ahead(self, pieces: Iterable[Piece]) -> None:
        """Say what will be taken next, in its order, before what was said earlier."""
        if self.share is not None and not self.share.reads:
            return
        with self._change:
            self._wanted.extendleft(reversed(list(pieces)))
            if self._thread is None and self._wanted:
                # Of a stream that nobody has any more, the thread is to end as well.
                gone = weakref.ref(self, partial(_wake, self._change))
                self._thread = threading.Thread(target=_read_ahead, args=(gone, self._change), daemon=True)
                self._thread.start()
            self._change.notify_all()

    def agreed(self, named: Iterable[int]) -> list[int]:
        """What any of the processes that share their reading named; in a process alone, what is given."""
        own = list(named)
        return own if self.share is None else self.share.union(own)

    def take(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The weights on the device as `gguf.dequantize` gives them, in `dtype`. Raises ModelError."""
        info = self.file.tensor(name)
        if not type_is_supported(info.type_name):
            raise ModelError(f"{info.path}: tensor {name}: weights of type {info.type_name} are not decoded")
        piece = Piece(name)
        if rows is not None:
            first, last, _ = rows.indices(info.shape[0])
            piece = Piece(name, (first, last))
        with self.stopwatch.time("reading"):
            stored = self._stored(piece)
        with self.stopwatch.time("weights"):
            count = info.shape[:1] if piece.rows is None else (piece.rows[1] - piece.rows[0],)
            width = info.shape[-1] if info.shape else 1
            if len(info.shape) == 1 and info.type_name in PLAIN_TYPES:
                width = 1
            found = decode(stored, info.type_name, width).view(*count, *info.shape[1:]).to(self.dtype)
            scale = self._scale(name)
            if scale is None:
                return found
            if scale.numel() > 1:
                scale = scale[slice(*(piece.rows or (None,))), None, None]
            return found * scale

    def _scale(self, name: str) -> torch.Tensor | None:
        """What a matrix is multiplied by: one number, or one an expert; None where nothing says."""
        stem, _, kind = name.rpartition(".")
        scale = self.file.tensors.get(f"{stem}.scale")
        shape = self.file.tensors[name].shape
        # Of another form it is a vector of the architecture's own.
        if (
            kind != "weight"
            or scale is None
            or scale.n_elements not in (1, shape[0] if len(shape) == 3 else 1)
        ):
            return None
        if scale.name not in self._scales:
            self._scales[scale.name] = dequantize(self.file, scale.name).flatten().to(self.device, self.dtype)
        return self._scales[scale.name]

    def forget(self) -> None:
        """Drop what was read ahead and not taken."""
        with self._change:
            self._wanted.clear()
            while self._reading is not None:
                self._change.wait()
            self._staged.clear()
            self._change.notify_all()

    def begin_anew(self) -> None:
        """In a process that was forked: the thread is the other's, and whatever it held when that was."""
        self._change = threading.Condition()
        self._wanted.clear()
        self._staged.clear()
        self._reading = self._thread = None

    def close(self) -> None:
        """End the thread. Nothing can be taken any more."""
        self.forget()
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _stored(self, piece: Piece) -> torch.Tensor:
        """The stored bytes of a piece on the device."""
        if self.share is None:
            return self._read_or_staged(piece)
        if self.share.reads:
            stored = self._read_or_staged(piece)
        else:
            stored = torch.empty(self._size(piece), dtype=torch.uint8, device=self.device)
        self.share.spread(stored)
        return stored

    def _read_or_staged(self, piece: Piece) -> torch.Tensor:
        with self._change:
            while self._reading == piece:
                self._change.wait()
            staged = self._staged.pop(piece, None)
            if piece in self._wanted:
                self._wanted.remove(piece)
            self._change.notify_all()
        if staged is None:
            staged = self._read(piece)
        if isinstance(staged, Exception):
            raise staged
        if staged.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(staged.ready)
            staged.stored.record_stream(current)
        self.read_bytes[piece.name] += staged.stored.numel()
        return staged.stored

    def _has_room(self) -> bool:
        held = sum(s.stored.numel() for s in self._staged.values() if isinstance(s, _Staged))
        try:
            return not held or held + self._size(self._wanted[0]) <= self.ahead_bytes
        except ModelError:
            return True  # reading it fails too, and is told of there

    def _raw(self, piece: Piece) -> np.ndarray:
        return self.file.raw(piece.name, None if piece.rows is None else range(*piece.rows))

    def _size(self, piece: Piece) -> int:
        return int(self._raw(piece).size)

    def _check_same(self, piece: Piece, stored: np.ndarray) -> None:
        """Raises ModelChanged where a piece that is read again holds other bytes than it did."""
        words = stored[: stored.size // 8 * 8].view(np.uint64)
        found = int(np.add.reduce(words)), bytes(stored[words.nbytes :])
        if self._sums.setdefault(piece, found) != found:
            path = self.file.tensor(piece.name).path
            raise ModelChanged(f"{path}: tensor {piece.name} holds other bytes than when it was read before")

    def _read(self, piece: Piece) -> _Staged:
        raw = self._raw(piece)
        on_gpu = self._copies is not None
        host = torch.empty(raw.size, dtype=torch.uint8, pin_memory=on_gpu)
        for first in range(0, raw.size, _READ_BYTES):
            host.numpy()[first : first + _READ_BYTES] = raw[first : first + _READ_BYTES]
        self._check_same(piece, host.numpy())
        if self._copies is None:
            return _Staged(host, None)
        with torch.cuda.stream(self._copies):
            stored = host.to(self.device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self._copies)
        return _Staged(stored, ready)


def _wake(change: threading.Condition, gone: object) -> None:
    with change:
        change.notify_all()


def _read_ahead(of: weakref.ref[TensorStream], change: threading.Condition) -> None:
    """What a stream's thread does, until the stream is closed or gone: while it waits it holds none."""
    while True:
        with change:
            while True:
                stream = of()
                if stream is None or stream._closed:
                    return
                if stream._wanted and stream._has_room():
                    piece = stream._reading = stream._wanted.popleft()
                    break
                del stream
                change.wait()
        try:
            staged: _Staged | Exception = stream._read(piece)
        except Exception as error:  # raised where the piece is taken
            staged = error
        with change:
            stream._staged[piece] = staged
            stream._reading = None
            change.notify_all()
        del stream, staged
