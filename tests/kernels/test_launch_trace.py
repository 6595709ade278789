"""Launch traces: rows counted one by one and call by call come to the same."""

from __future__ import annotations

from verify.kernels.trace import Batch, LaunchTrace, Signature

ONE = Signature("flash", "b1", (12,), (0, 64), "one")
TWO = Signature("flash", "b1", (8, 4), (0, 32, 64), "one")


def test_batches_are_the_rows_that_they_stand_for() -> None:
    batch = Batch({("decode", 64, ONE): 3, ("decode", 65, TWO): 1})
    trace, by_rows = LaunchTrace(), LaunchTrace()
    trace.record("decode", 64, ONE, 2)
    for _ in range(5):
        trace.record_batch(batch)
        by_rows.record("decode", 64, ONE, 3)
        by_rows.record("decode", 65, TWO, 1)
    by_rows.record("decode", 64, ONE, 2)
    assert trace.rows == by_rows.rows
    assert trace.rows == by_rows.rows, "reading counts nothing twice"
    assert trace.total_rows == 22


def test_traces_add_up_with_their_batches() -> None:
    batch = Batch({("decode", 64, ONE): 3})
    a, b = LaunchTrace(), LaunchTrace()
    for trace in (a, b, b):
        trace.record_batch(batch)
    b.record("decode", 65, TWO, 1)
    a.add(b)
    assert a.rows == {("decode", 64, ONE): 9, ("decode", 65, TWO): 1}
    assert LaunchTrace.from_json(a.to_json()).rows == a.rows
    assert a.differs_from(b) == frozenset()
    b.record("decode", 66, TWO, 1)
    assert b.differs_from(a) == {66}
    assert a.differs_from(b) == frozenset(), "what did not run covers nothing"
