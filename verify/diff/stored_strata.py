"""The rows that a diff was judged by, as a file: `strata.npz` of a run's folder, judged again by other rules.

`rows`: float32, arrays [samples, heads] one after another, each different one once, for candidates share
their inputs and mostly their baseline. `pairs`: JSON in UTF-8, a record a candidate, whose strata say where
their arrays begin and how large they are.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from verify.judge.strata import Stratum, judge_strata
from verify.judge.verdict import EXIT_CODES, Decision, PairEvidence, Verdict, decide
from verify.kernels.said import all_visible
from verify.machine.errors import UsageError

STRATA = "strata.npz"
_ARRAYS = ("candidate", "reference", "floor", "power")
# How often a stratum was looked at; files of before know of none.
_LOOKS = ("look", "looks", "first", "overflows")
# What decides beside the strata.
_EVIDENCE = (
    *("faults", "same_spec", "coverage", "bitwise_equal", "not_compared", "margin", "unit", "reference"),
    *("narrowed_by", "allow_same", "ran"),
)
# What reading something else raises.
_UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError),
    *(EOFError, MemoryError, zipfile.BadZipFile, zlib.error),
)


class StoredPair(NamedTuple):
    """One candidate of a diff, as it was judged."""

    spec: str  # of the candidate
    verdict: Verdict  # on it
    reasons: Sequence[str]  # for it
    evidence: PairEvidence  # all but the strata
    strata: Sequence[Stratum]  # what the kinds of input showed
    alone: Sequence[Stratum] | None  # of single tokens; None: it was asked none

    def judge(self) -> Decision:
        """By today's rules."""
        margin = self.evidence.margin
        alone = judge_strata(self.alone, margin) if self.alone else None
        return decide(replace(self.evidence, strata=judge_strata(self.strata, margin), alone=alone))


def packed(pairs: Sequence[tuple[str, StoredPair]], *, digits: int = 24) -> bytes:
    """The file of some pairs, each with a name that is the caller's.

    digits: binary ones of each number that are kept, of float32's 24; fewer make a smaller file.
    """
    places: dict[bytes, int] = {}
    held: list[np.ndarray] = []

    def place(array: np.ndarray) -> list[int]:
        rows = _rounded(array, digits)
        content = repr(rows.shape).encode() + rows.tobytes()
        if content not in places:
            places[content] = sum(x.size for x in held)
            held.append(rows.reshape(-1))
        return [places[content], *rows.shape]

    def kept(stratum: Stratum) -> dict[str, Any]:
        of = {"shape": stratum.shape, "n_kv": stratum.n_kv, "family": stratum.family}
        arrays = {name: place(getattr(stratum, name)) for name in _ARRAYS}
        of |= {name: getattr(stratum, name) for name in _LOOKS}
        of["typical"] = stratum.typical
        return {**of, "heads": list(stratum.heads), "a_kv_head": stratum.a_kv_head, "arrays": arrays}

    records = []
    for name, pair in pairs:
        evidence = {key: getattr(pair.evidence, key) for key in _EVIDENCE}
        record: dict[str, Any] = {"name": name, "spec": pair.spec, "verdict": pair.verdict}
        record |= {"reasons": list(pair.reasons)}
        record |= {"evidence": {**evidence, "faults": list(pair.evidence.faults)}}
        record |= {"strata": [kept(s) for s in pair.strata]}
        record |= {"alone": None if pair.alone is None else [kept(s) for s in pair.alone]}
        records.append(record)
    text = np.frombuffer(json.dumps(records).encode(), dtype=np.uint8)
    file = io.BytesIO()
    np.savez_compressed(file, pairs=text, rows=np.concatenate([np.zeros(0, np.float32), *held]))
    return file.getvalue()


def _rounded(array: np.ndarray, digits: int) -> np.ndarray:
    """To float32 of so many binary digits: what is lost are zeros, which compress."""
    rows = np.ascontiguousarray(array, dtype=np.float32)
    lost = 24 - digits
    bits = rows.view(np.int32)
    return rows if not lost else ((bits + (1 << lost >> 1)) & -(1 << lost)).view(np.float32)


def unpacked(path: Path) -> list[tuple[str, StoredPair]]:
    """The pairs of a file. Raises UsageError where it is none."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            # A stranger's, it may be: no text in it steers a terminal.
            records = all_visible(json.loads(stored["pairs"].tobytes()))
            rows = stored["rows"].astype(np.float64)
        return [(record["name"], _pair(record, rows)) for record in records]
    except _UNREADABLE as error:
        said = " ".join(str(error).split())
        raise UsageError(f"{path}: expected the strata of a diff: {said}") from None


def _pair(record: Mapping[str, Any], rows: np.ndarray) -> StoredPair:
    def array(place: Sequence[int]) -> np.ndarray:
        first, samples, heads = place
        return rows[first : first + samples * heads].reshape(samples, heads)

    def stratum(kept: Mapping[str, Any]) -> Stratum:
        more: dict[str, Any] = {name: array(kept["arrays"][name]) for name in _ARRAYS}
        more |= {name: int(kept[name]) for name in _LOOKS if kept.get(name) is not None}
        more["typical"] = float(kept.get("typical", 0.0))
        return Stratum(
            shape=str(kept["shape"]),
            n_kv=int(kept["n_kv"]),
            family=str(kept["family"]),
            heads=tuple(int(h) for h in kept["heads"]),
            a_kv_head=int(kept["a_kv_head"]),
            **more,
        )

    evidence = {name: record["evidence"][name] for name in _EVIDENCE}
    if record["verdict"] not in EXIT_CODES or not 1 < float(evidence["margin"]) < math.inf:
        raise ValueError(f"verdict {record['verdict']}, margin {evidence['margin']}")
    return StoredPair(
        spec=str(record["spec"]),
        verdict=record["verdict"],
        reasons=[str(reason) for reason in record["reasons"]],
        evidence=PairEvidence(distance=None, **evidence),
        strata=[stratum(s) for s in record["strata"]],
        alone=None if record["alone"] is None else [stratum(s) for s in record["alone"]],
    )
