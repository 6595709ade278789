"""Single tokens of a model's layers: kernels that are not computed as if alone, asked one query token a call.

On the exact arm's q, k and v, as `verify.arms.own_error` asks whole calls, whose rows these are: each result
is held against its budget, and its error beside that of the same row in the whole call and of the baseline.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from verify.arms.alone import (
    ONE_TOKEN,
    AskedRow,
    TimeShare,
    alone_name,
    asked_rows,
    is_asked,
    of_sequence,
    single_call,
)
from verify.arms.arm import ArmRunner
from verify.arms.attempt import attempt
from verify.arms.own_error import InPlace
from verify.kernels.bits import different
from verify.kernels.budget.bound import Budget, error_budgets
from verify.kernels.call import AttentionOutput, Call
from verify.kernels.judging.figures import smallest_squares
from verify.kernels.lengths import lengths_of
from verify.model.layer_call import LayerCall

ALONE_SCHEMA = pa.schema(
    [
        ("window", pa.int32()),
        ("layer", pa.int32()),
        ("arm", pa.string()),
        ("n_kv", pa.int32()),
        # Keys that the call held.
        ("keys", pa.int32()),
        ("head", pa.int32()),
        # Whether it was a call of its own; else the whole call's row, of a kernel that computes as if alone.
        ("asked", pa.bool_()),
        # Mean square error of the row and head, and of the same row in the whole call.
        ("square_error", pa.float64()),
        ("square_error_of_many", pa.float64()),
        # Mean square of the exact result, and what the result's type cannot show of it.
        ("power", pa.float64()),
        ("floor", pa.float64()),
        # Whether the row has the bits of the whole call's.
        ("same_bits", pa.bool_()),
    ]
)
_OF_ROW = ("square_error", "square_error_of_many", "power", "floor", "same_bits")


class WholeCall(NamedTuple):
    """One kernel's call of all rows, and what came of it."""

    runner: ArmRunner  # of its arm
    whole: Call  # as it was given
    own: Call  # on what its own cache holds
    exact: torch.Tensor  # float64 attention of that, [B, T, H, Dv]
    aim: torch.Tensor  # what its distance is to: the same, or of the inputs as they were given
    out: torch.Tensor  # its result


class SingleTokens:
    """Asks single tokens and collects what they show; `in_place` takes what budgets say of them.

    share: of the run's time; scored: n_kv of the rows that are scored.
    """

    def __init__(self, in_place: InPlace, share: TimeShare, *, scored: range, seed: int = 0) -> None:
        self.in_place, self.share, self.scored, self.seed = in_place, share, scored, seed
        # Window, layer, arm, n_kv, keys and whether it was asked, of each row; [figures, H] of it.
        self._rows: list[tuple[int, int, str, int, int, bool]] = []
        self._figures: list[torch.Tensor] = []

    def ask(self, call: LayerCall, done: Sequence[WholeCall], part: int, parts: int) -> None:
        """Ask the kernels of one layer. part of parts: see `asked_rows`."""
        due = [one for one in done if is_asked(one.runner.arm) and not one.runner.failed]
        if not due:
            return
        batch, count = call.kv_len.shape
        lengths = lengths_of(call.kv_len).of_rows[:count]
        rows = asked_rows(
            lengths,
            scored=self.scored,
            seed=self.seed,
            layer=call.layer,
            part=part,
            parts=parts,
            batch=batch,
        )
        if not rows:
            return
        if not self.share.allows():
            self.share.left_out += len(rows) * len(due)
            return
        began = time.monotonic()
        found = {one.runner.name: self._results(call, one, rows) for one in due}
        for sequence in sorted({asked.sequence for asked in rows}):
            of_it = [i for i, asked in enumerate(rows) if asked.sequence == sequence]
            here = {
                name: AttentionOutput(x.out[of_it], x.lse[of_it])
                for name, x in found.items()
                if x is not None
            }
            self._judge(call, done, here, [rows[i] for i in of_it])
        self.share.add(time.monotonic() - began)

    def _results(self, call: LayerCall, one: WholeCall, rows: Sequence[AskedRow]) -> AttentionOutput | None:
        """A kernel's results, out [rows, H, Dv] and lse [rows, H]; None where it fails."""
        kernel, found = one.runner.arm.kernel, []
        assert kernel is not None
        for asked in rows:
            tried = attempt(kernel, single_call(one.whole, asked))
            tried.check_memory(one.runner.arm.spec)
            one.runner.launched.count(tried.launched)
            if tried.output is None:
                one.runner.fail(f"{tried.failure}, {ONE_TOKEN}", call)
                return None
            found.append(tried.output)
        return AttentionOutput(*(torch.stack([getattr(x, n)[0, 0] for x in found]) for n in ("out", "lse")))

    def _judge(
        self,
        call: LayerCall,
        done: Sequence[WholeCall],
        found: dict[str, AttentionOutput],
        rows: Sequence[AskedRow],
    ) -> None:
        """Enter the results of one sequence's rows, and the same rows of kernels that were not asked."""
        sequence, at = rows[0].sequence, [asked.row for asked in rows]
        kv_len, window = call.kv_len[sequence, at], call.window + sequence
        budgets = _budgets([one for one in done if one.runner.name in found], sequence, at)
        results = {one.runner.name: one.out[sequence, at] for one in done}
        results |= {name: x.out for name, x in found.items()}
        for one in done:
            if one.runner.name in found and one.runner.arm.reference in results:
                theirs = results[one.runner.arm.reference]
                one.runner.check_beyond(call, found[one.runner.name].out[None], theirs[None])
            arm, many = one.runner.arm, one.out[sequence, at]
            # Rows of calls of several tokens are no single tokens.
            if arm.kernel is None or arm.path != "decode" or (is_asked(arm) and arm.name not in found):
                continue
            out = many
            if (alone := found.get(one.runner.name)) is not None:
                out = alone.out
                exact = one.exact[sequence, at]
                self.in_place.enter_rows(
                    window,
                    call.layer,
                    alone_name(arm.name),
                    arm.path,
                    error=(out.double() - exact)[None],
                    exact=exact[None],
                    budget=budgets[one.runner.name],
                    call=of_sequence(one.own, sequence, at),
                    lse=alone.lse[None] if arm.kernel.capabilities().lse else None,
                )
            aim = one.aim[sequence, at]
            figures = torch.stack(
                [
                    _square(out, aim),
                    _square(many, aim),
                    aim.square().mean(-1),
                    smallest_squares(aim, arm.kernel.result_type(one.whole)),
                    (~different(out, many).any(-1)).double(),
                ]
            )  # [figures, rows, H]
            self._figures += figures.unbind(1)
            lengths = kv_len.tolist()
            self._rows += [
                (window, call.layer, arm.name, n, call.k.shape[1] if asked.spare else n, arm.name in found)
                for n, asked in zip(lengths, rows, strict=True)
            ]

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"rows": self._rows, "figures": self._figures, "left_out": self.share.left_out}

    def restore(self, state: dict[str, Any]) -> None:
        self._rows, self._figures = list(state["rows"]), list(state["figures"])
        self.share.left_out = state["left_out"]

    def table(self) -> pa.Table:
        """Everything so far as rows of ALONE_SCHEMA, a row a head."""
        if not self._rows:
            return ALONE_SCHEMA.empty_table()
        columns: dict[str, list[Any]] = {name: [] for name in ALONE_SCHEMA.names}
        for (window, layer, arm, n_kv, keys, asked), figures in zip(self._rows, self._figures, strict=True):
            heads = figures.shape[1]
            for name, value in (
                ("window", window), ("layer", layer), ("arm", arm), ("n_kv", n_kv), ("keys", keys),
                ("asked", asked),
            ):  # fmt: skip
                columns[name] += [value] * heads
            columns["head"] += range(heads)
            for name, values in zip(_OF_ROW, figures.tolist(), strict=True):
                columns[name] += values if name != "same_bits" else [bool(x) for x in values]
        return pa.Table.from_pydict(columns, schema=ALONE_SCHEMA)


def _square(out: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
    """Mean square error [rows, H]; a NaN or Inf is off by the whole result."""
    return torch.where(torch.isfinite(out), out.double() - aim, aim).square().mean(-1)


def _budgets(due: Sequence[WholeCall], sequence: int, rows: Sequence[int]) -> dict[str, Budget]:
    """The budget of each kernel's rows; what follows of keys and values alone is computed once."""
    groups: dict[int, list[WholeCall]] = {}
    for one in due:
        groups.setdefault(id(one.own), []).append(one)
    found: dict[str, Budget] = {}
    for group in groups.values():
        call = of_sequence(group[0].own, sequence, rows)
        arithmetics = []
        for one in group:
            assert one.runner.arm.kernel is not None
            arithmetics.append(one.runner.arm.kernel.arithmetic_of(call))
        budgets = error_budgets(call, arithmetics)
        found |= {one.runner.name: budget for one, budget in zip(group, budgets, strict=True)}
    return found
