from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from verify.kernels.errors import MachineFailure
from verify.machine import processes
from verify.machine.processes import SharedWork, answered, at_once


def numbers(count: int) -> Iterator[int]:
    yield from range(count)


def work(ask: Any, told: list[Any] | None = None) -> SharedWork[int, Any]:
    told = [] if told is None else told
    return SharedWork(ask, lambda: os.getpid(), told.append)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_is_found_in_the_order_of_the_inputs(count: int) -> None:
    told: list[int] = []
    asked = work(lambda n: (n * n, time.sleep(0.001 * (7 - n % 7))), told)
    assert [(n, found) for n, (found, _) in answered(numbers(20), asked, count)] == [
        (n, n * n) for n in range(20)
    ]
    assert len(told) == len(set(told)) == count - 1
    assert os.getpid() not in told


def test_each_is_asked_once_and_by_all() -> None:
    found = [pid for _, pid in answered(numbers(40), work(lambda n: (time.sleep(0.005), os.getpid())[1]), 2)]
    assert len(found) == 40
    assert len(set(found)) == 2
    assert os.getpid() in found


def test_no_input_and_fewer_inputs_than_processes() -> None:
    assert list(answered(numbers(0), work(lambda n: n), 3)) == []
    assert list(answered(numbers(1), work(lambda n: n), 3)) == [(0, 0)]


@pytest.mark.parametrize("here", [True, False])
def test_an_error_is_raised_after_what_came_before_it(here: bool) -> None:
    first = os.getpid()

    def ask(n: int) -> int:
        time.sleep(0.01)
        if n >= 6 and (os.getpid() == first) == here:
            raise MemoryError(f"at {n}")
        return n

    given = []
    with pytest.raises(MemoryError, match="at "):
        for n, _ in answered(numbers(30), work(ask), 2):
            given.append(n)
    assert given == list(range(len(given)))
    assert len(given) >= 6


def test_an_interrupt_gives_what_was_found_to_the_first_gap() -> None:
    first = os.getpid()

    def ask(n: int) -> int:
        time.sleep(0.01)
        if n >= 10 and os.getpid() == first:
            raise KeyboardInterrupt
        return n

    given = []
    with pytest.raises(KeyboardInterrupt):
        for n, found in answered(numbers(1000), work(ask), 2):
            assert n == found
            given.append(n)
    assert given == list(range(len(given)))
    assert 8 <= len(given) < 100


@pytest.mark.parametrize("count", [1, 2])
def test_only_what_is_taken_here_is_told_before_it_is_asked(count: int) -> None:
    first, heard = os.getpid(), []

    def ask(n: int) -> tuple[int, bool]:
        time.sleep(0.005)
        assert (os.getpid() == first) == (heard[-1:] == [n])
        return os.getpid(), n in heard

    found = list(answered(numbers(20), SharedWork(ask, tell=heard.append), count))
    assert heard == [n for n, (pid, _) in found if pid == first]
    assert (len(heard) == 20) == (count == 1)


def test_an_interrupt_while_another_process_starts_is_not_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = processes._other

    def interrupted(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        starts(*given)

    monkeypatch.setattr(processes, "_other", interrupted)
    asked = work(lambda n: (time.sleep(0.005), os.getpid())[1])
    assert len({pid for _, pid in answered(numbers(20), asked, 2)}) == 2


def test_an_output_of_another_process_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    first = os.getpid()

    def ask(n: int) -> int:
        time.sleep(0.005)
        os.write(1, b"first\n" if os.getpid() == first else b"other\n")
        return n

    list(answered(numbers(20), work(ask), 2))
    said = capfd.readouterr().out
    assert "first" in said
    assert "other" not in said


def test_a_process_that_is_killed_is_the_machine_s_failure() -> None:
    first = os.getpid()

    def ask(n: int) -> int:
        time.sleep(0.005)
        if os.getpid() != first:
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    with pytest.raises(MachineFailure, match="ended from outside"):
        list(answered(numbers(20), work(ask), 2))


def test_the_first_is_asked_here_and_each_other_elsewhere() -> None:
    found = at_once([lambda n=n: (n, os.getpid(), torch.get_num_threads()) for n in range(4)])
    assert [n for n, _, _ in found] == [0, 1, 2, 3]
    assert found[0][1] == os.getpid()
    assert len({pid for _, pid, _ in found}) == 4
    assert {threads for _, _, threads in found} == {1}
    assert at_once([]) == []


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fails() -> None:
    raise MemoryError("as it happens")


def test_what_another_raises_is_raised_and_a_killed_one_told() -> None:
    with pytest.raises(MemoryError, match="as it happens"):
        at_once([lambda: 1, lambda: 2, _fails])
    with pytest.raises(MachineFailure, match="ended from outside"):
        at_once([lambda: 1, _killed])


def test_an_interrupt_ends_those_elsewhere(tmp_path: Path) -> None:
    there = tmp_path / "pid"

    def waits() -> None:
        there.write_text(str(os.getpid()))
        time.sleep(60)

    def interrupted() -> None:
        while not there.exists() or not there.read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        at_once([interrupted, waits])
    pid = int(there.read_text())
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
    pytest.fail("it goes on")
