"""Work that has nothing in common but its inputs, shared among processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from verify.kernels.errors import MachineFailure

Input = TypeVar("Input")
Found = TypeVar("Found")
# On systems without fork nothing here is asked for more than one process.
_CONTEXT: Any = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)


def _nothing(*_: Any) -> None:
    pass


class SharedWork(NamedTuple, Generic[Input, Found]):
    """What is asked of each input, and what a process tells besides when it has no more to do."""

    ask: Callable[[Input], Found]
    closing: Callable[[], Any] = _nothing  # called in every process but this one; its result can be pickled
    enter: Callable[[Any], None] = _nothing  # takes in what `closing` returned, here
    tell: Callable[[Input], None] = _nothing  # of each input that this process takes, before it is asked


def answered(
    inputs: Iterator[Input], work: SharedWork[Input, Found], processes: int
) -> Iterator[tuple[Input, Found]]:
    """Each input and what is found, in the order of the inputs, whichever process asked.

    Processes are forked, go through copies of the same iterator, and take the next input that nobody has: it
    must not have begun, and give the same to all. What they find can be pickled. Each has one thread; a
    thread of this process, a screen's for instance, is not theirs, so `ask` may not wait for one: `tell` is
    for that.

    An interrupt is for this process: what all have found by then is given, in order and to the first gap, and
    then it is raised. An error of another process is raised where its input comes. Raises MachineFailure
    where one was killed.
    """
    if processes < 2:
        for one in inputs:
            work.tell(one)
            yield one, work.ask(one)
        return

    def told_and_asked(one: Input) -> Found:
        work.tell(one)
        return work.ask(one)

    taken, ended = _CONTEXT.Value("q", 0), _CONTEXT.Value("b", 0)
    with _forked([partial(_other, inputs, work, taken, ended)] * (processes - 1)) as others:
        seen: list[Input] = []
        found: dict[int, Any] = {}
        stopped: BaseException | None = None
        try:
            _share(inputs, told_and_asked, taken, ended, found, seen)
            # Those that others took last.
            seen += inputs
        except BaseException as error:
            stopped, ended.value = error, 1
        for process, here in others:
            its, told = _heard(here)
            found |= its
            work.enter(told)
            process.join()
        for i, one in enumerate(seen):
            if i not in found:
                break
            if isinstance(found[i], _Failed):
                raise found[i].error
            yield one, found[i]
        if stopped is not None:
            raise stopped


@contextmanager
def _forked(
    tasks: Sequence[Callable[[Connection], None]],
) -> Iterator[list[tuple[multiprocessing.process.BaseProcess, Connection]]]:
    """A process for each task, and where it is heard. All have one thread meanwhile, this one among them; no
    process outlives this."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    others: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
    try:
        for task in tasks:
            here, there = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=task, args=(there,), daemon=True)
            with _interrupts_wait():
                process.start()
            there.close()
            others.append((process, here))
        yield others
    finally:
        torch.set_num_threads(threads)
        for process, here in others:
            process.kill()
            here.close()


def _heard(here: Connection) -> Any:
    """What a forked process tells. Raises MachineFailure where it was killed."""
    try:
        return pickle.loads(here.recv_bytes())
    except EOFError:
        raise MachineFailure("one of the processes of this run was ended from outside") from None


def _tell_and_end(there: Connection, found: Any) -> None:
    """The end of a process that was forked."""
    # Whole: tensors would be handed over by a process that is there no more.
    there.send_bytes(pickle.dumps(found, pickle.HIGHEST_PROTOCOL))
    there.close()
    # Nothing of the first process's is to be closed or written here.
    os._exit(0)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """A process that is being forked inherits that: it lets none through until it has said to ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def at_once(asked: Sequence[Callable[[], Found]]) -> list[Found]:
    """What each of them gives: the first is called here, each other in a process that is forked for it.

    All have one thread; what the others give can be pickled. An interrupt is for this process, and ends the
    others with it. Raises what one of them raises, and MachineFailure where one was killed.
    """
    with _forked([partial(_answer, one) for one in asked[1:]]) as others:
        found = [one() for one in asked[:1]]
        for process, here in others:
            its = _heard(here)
            if isinstance(its, _Failed):
                raise its.error
            process.join()
            found.append(its)
        return found


def _answer(one: Callable[[], Any], there: Connection) -> None:
    """What `at_once` does in a process that was forked."""
    _say_nothing()
    try:
        found: Any = one()
    except Exception as error:
        found = _Failed(error)
    _tell_and_end(there, found)


def _say_nothing() -> None:
    """Of a process that was forked: interrupts, and the terminal, are the first one's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What was kept back is ignored with the rest; processes that this one starts are to hear theirs.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for screen in (1, 2):
        os.dup2(nowhere, screen)


class _Failed(NamedTuple):
    """What an input ended with, in the place of what is found."""

    error: Exception


def _share(
    inputs: Iterator[Input],
    ask: Callable[[Input], Any],
    taken: Any,
    ended: Any,
    found: dict[int, Any],
    seen: list[Input] | None = None,
) -> None:
    """Ask of the inputs that this process takes; seen: gets all that come by."""
    numbered = iter(enumerate(inputs))
    at = -1
    one: Any = None
    while not ended.value:
        with taken.get_lock():
            own = taken.value
            taken.value += 1
        while at < own:
            following = next(numbered, None)
            if following is None:
                return
            at, one = following
            if seen is not None:
                seen.append(one)
        found[own] = ask(one)


def _other(
    inputs: Iterator[Input], work: SharedWork[Input, Found], taken: Any, ended: Any, there: Connection
) -> None:
    """A process that was forked: says nothing, leaves interrupts to the first, and tells all at the end."""
    _say_nothing()
    found: dict[int, Any] = {}

    def asked(one: Input) -> Any:
        try:
            return work.ask(one)
        except Exception as error:
            ended.value = 1
            return _Failed(error)

    _share(inputs, asked, taken, ended, found)
    _tell_and_end(there, (found, work.closing()))
