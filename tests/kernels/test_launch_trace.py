"""Launch traces: rows counted one by one and call by call come to the same."""

from __future__ import annotations

import torch

from verify.kernels.trace import Launched, LaunchTrace, Signature

ONE = Signature("flash", "b1", (12,), (0, 64), "one")
TWO = Signature("flash", "b1", (8, 4), (0, 32, 64), "one")


def test_a_call_counts_as_often_as_it_is_made() -> None:
    """The same object again and again, as the layers of a model give it, or a new one each time."""
    once = Launched({("decode", 64, ONE): 3, ("decode", 65, TWO): 1})
    trace = LaunchTrace([Launched({("decode", 64, ONE): 2})])
    for _ in range(5):
        trace.count(once)
    assert trace.rows == {("decode", 64, ONE): 17, ("decode", 65, TWO): 5}
    assert trace.total_rows == 22, "reading counts nothing twice"
    one_by_one = LaunchTrace(Launched({("decode", 64, ONE): 1}) for _ in range(1000))
    assert len(one_by_one._calls) < 1000, "what was counted is added up now and then"
    assert one_by_one.total_rows == 1000


def test_every_row_of_a_call_is_counted_by_its_keys() -> None:
    kv_len = torch.tensor([[3, 0], [3, 4]], dtype=torch.int32)
    launched = Launched.every_row("decode", kv_len, ONE)
    assert launched.rows == {("decode", 3, ONE): 2, ("decode", 0, ONE): 1, ("decode", 4, ONE): 1}
    assert LaunchTrace([Launched.together([launched, launched])]) == LaunchTrace([launched] * 2)


def test_traces_add_up() -> None:
    once = Launched({("decode", 64, ONE): 3})
    a, b = LaunchTrace([once]), LaunchTrace([once, once, Launched({("decode", 65, TWO): 1})])
    a.add(b)
    assert a.rows == {("decode", 64, ONE): 9, ("decode", 65, TWO): 1}
    assert b.total_rows == 7
    assert LaunchTrace.from_json(a.to_json()).rows == a.rows
    assert a.differs_from(b) == frozenset()
    b.count(Launched({("decode", 66, TWO): 1}))
    assert b.differs_from(a) == {66}
    assert a.differs_from(b) == frozenset(), "what did not run covers nothing"


def test_a_plan_that_did_not_run_is_no_other_path() -> None:
    """On a GPU a plan of two parts has a binary that merges them; beside a first part that did everything."""
    whole = Signature("flash", "b1", (12,), (0, 64), "one")
    ignored = Signature(
        kernel="flash", binary="b1+merge", head_groups=(12,), cuts=(0, 64), launch="one", as_planned=False
    )
    baseline, candidate = (LaunchTrace([Launched({("decode", 64, s): 1})]) for s in (whole, ignored))
    assert candidate.differs_from(baseline) == frozenset()
    assert LaunchTrace.from_json(candidate.to_json()) == candidate
    followed = LaunchTrace([Launched({("decode", 64, ignored._replace(as_planned=True)): 1})])
    assert followed.differs_from(baseline) == {64}
    assert followed.ran_its_plans and not candidate.ran_its_plans
