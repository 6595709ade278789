"""`top1_changes` of run.json: changed tokens with their text, margins in units of rounding alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from verify.data import Windows
from verify.judge.ties import moved_by_rounding
from verify.model.tokenizer import Tokenizer
from verify.ppl.record import Top1Record

MOST = 100
# Tokens of text shown before a changed one.
CONTEXT = 16


def changed_token_records(table: pa.Table, windows: Windows, tokenizer: Tokenizer) -> list[Top1Record]:
    """The first MOST rows of top1.parquet, ready to be read."""
    return [_change(row, windows, tokenizer) for row in table.slice(0, MOST).to_pylist()]


def floor_at(row: Mapping[str, Any]) -> float:
    """How far rounding alone moves the two tokens of a row of top1.parquet apart; NaN: not measured there."""
    return moved_by_rounding(float(row["floor_kld"]))


def _change(row: dict[str, Any], windows: Windows, tokenizer: Tokenizer) -> Top1Record:
    window, position = row["window"], row["position"]
    tokens = windows.tokens[window]
    before = tokens[max(position + 1 - CONTEXT, 0) : position + 1]

    def p(arm: str) -> tuple[float, float]:
        """That this arm gives to the reference's token, and to the candidate's."""
        return math.exp(row[f"logp_{arm}_reference"]), math.exp(row[f"logp_{arm}_candidate"])

    margin = row["logp_exact_reference"] - row["logp_exact_candidate"]
    floor = floor_at(row)
    return Top1Record(
        candidate=row["candidate"],
        reference=row["reference"],
        window=window,
        position=position,
        n_kv=position + 1,
        context=tokenizer.decode(before.tolist()),
        target=tokenizer.decode([int(tokens[position + 1])]),
        reference_token=tokenizer.decode([row["reference_token"]]),
        candidate_token=tokenizer.decode([row["candidate_token"]]),
        p_reference=p("reference"),
        p_candidate=p("candidate"),
        p_exact=p("exact"),
        margin=margin,
        floor=floor,
        margin_in_floors=margin / floor if floor > 0 else math.nan,
    )
