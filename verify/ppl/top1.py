"""Tokens whose most likely token changed: both tokens, with their log probabilities in every arm concerned.

A change of the most likely token is what a reader of generated text sees. It happens where two tokens are
nearly as likely; what it says about a kernel is known only beside the margin and what rounding alone does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from verify.arms.arm import Arm
from verify.ppl.scoring import BestTwo

# logp_ARM_TOKEN: natural logarithm of the probability that ARM (reference, candidate, exact) gives to the
# reference's or the candidate's most likely token; NaN where that is not among the arm's two most likely.
# floor_kld: of the floor arm to exact, at this token.
TOP1_SCHEMA = pa.schema(
    [
        ("window", pa.int32()),
        ("position", pa.int32()),
        ("candidate", pa.string()),
        ("reference", pa.string()),
        ("reference_token", pa.int32()),
        ("candidate_token", pa.int32()),
        ("logp_reference_reference", pa.float64()),
        ("logp_reference_candidate", pa.float64()),
        ("logp_candidate_reference", pa.float64()),
        ("logp_candidate_candidate", pa.float64()),
        ("logp_exact_reference", pa.float64()),
        ("logp_exact_candidate", pa.float64()),
        ("floor_kld", pa.float64()),
    ]
)


def changed_tokens(
    best: Mapping[str, BestTwo],
    floor_kld: np.ndarray | None,
    candidates: Sequence[Arm],
    exact: str | None,
    windows: range,
    positions: range,
) -> pa.Table:
    """Rows of TOP1_SCHEMA, in order of the text. best: by arm, the group's scored tokens window by window;
    floor_kld: the floor arm's KLD to exact at each of them."""
    tables = [TOP1_SCHEMA.empty_table()]
    for arm in candidates:
        reference = arm.reference or ""
        if arm.name not in best or reference not in best:
            continue
        rows = np.flatnonzero(best[arm.name].tokens[:, 0] != best[reference].tokens[:, 0])
        tokens = [best[name].tokens[rows, 0] for name in (reference, arm.name)]
        columns = [
            windows.start + rows // len(positions),
            positions.start + rows % len(positions),
            np.full(len(rows), arm.name),
            np.full(len(rows), reference),
            *tokens,
        ]
        for name in (reference, arm.name, exact or ""):
            columns += [_log_probability(best.get(name), rows, token) for token in tokens]
        columns.append(np.full(len(rows), np.nan) if floor_kld is None else floor_kld[rows])
        arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, TOP1_SCHEMA, strict=True)]
        tables.append(pa.Table.from_arrays(arrays, schema=TOP1_SCHEMA))
    return pa.concat_tables(tables)


def _log_probability(best: BestTwo | None, rows: np.ndarray, token: np.ndarray) -> np.ndarray:
    """ln p of one token a row, NaN where it is not among the two most likely."""
    if best is None:
        return np.full(len(rows), np.nan)
    among = best.tokens[rows] == token[:, None]
    found: np.ndarray = np.where(among, best.logp[rows], -np.inf).max(1)
    return np.where(among.any(1), found, np.nan)
