"""From what a run of `verify gen` wrote to the verdict on each candidate, and to `run.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from verify.arms.arm import Arm, void_reasons
from verify.arms.kernel_errors import IN_PLACE, faults_in_common, kernel_errors, rows_of
from verify.arms.model_facts import model_json
from verify.arms.model_health import model_fault
from verify.arms.split_mode import tensor_parallel_json
from verify.gen.checks import log_squares
from verify.gen.difference import Difference
from verify.gen.run import Generation, Step, Written
from verify.judge.statistics import DistanceRatio, ratio_of_samples
from verify.judge.verdict import EXIT_CODES, Decision, PairEvidence, decide, overall
from verify.kernels.judging.figures import graveness
from verify.machine import environment
from verify.machine.exits import EXIT_VOID
from verify.ppl.evidence.pairs import refusal
from verify.ppl.groups import TOKEN_SCHEMA

SCHEMA = 2
FEWEST_SAMPLES = 2


class Compared(NamedTuple):
    """One candidate: the verdict, and what it rests on.

    disagreements: steps at which its most likely token is not the baseline's; moved, floor_moved: root mean
    square, over the steps, of how far the candidate moves the margin of the two top tokens from the
    baseline's, and one rounding of noise from the exact arm's; closest: the step where these two were
    closest in the baseline.
    """

    arm: Arm
    decision: Decision
    distance: DistanceRatio | None
    coverage: float
    disagreements: list[int]
    first: Difference | None
    moved: float
    floor_moved: float
    kld_mean: float
    kld_max: float
    bitwise_equal: bool
    closest: int | None


def compare(generation: Generation, found: Written, candidate: Arm) -> Compared:
    """Everything about one candidate."""
    steps = [step for step in found.steps if candidate.name in step.arms]
    baseline = next(arm for arm in generation.arms if arm.role == "baseline")
    findings = candidate.findings
    equal = bool(steps) and not candidate.failed and findings.attention_equal and findings.logits_equal
    logs = log_squares(generation.exact.checks, candidate.name, "baseline")
    enough = bool(steps) and len(logs) >= FEWEST_SAMPLES
    finite = all(c.nonfinite == 0 for c in generation.exact.checks if c.arm in (candidate.name, "baseline"))
    distance = ratio_of_samples(np.array(logs), "this text only") if enough and finite else None
    coverage = _coverage(generation, candidate, steps)
    decision = decide(
        PairEvidence(
            faults=[*_faults(generation, found, candidate), *_faults(generation, found, baseline)],
            same_spec=candidate.spec == baseline.spec,
            coverage=coverage,
            bitwise_equal=equal,
            distance=distance,
            min_coverage=generation.settings.min_coverage,
            margin=generation.settings.margin,
            not_compared=refusal(candidate, "candidate") or refusal(baseline, "baseline"),
            unit="tokens",
            narrowed_by="more tokens (-n) narrow it",
        )
    )
    klds = [step.arms[candidate.name].kld_to_baseline for step in steps]
    return Compared(
        candidate,
        decision,
        distance,
        coverage,
        [i for i, step in enumerate(steps) if step.arms[candidate.name].top1 != step.chosen],
        found.first.get(candidate.name),
        _moved(steps, candidate.name, "baseline"),
        _moved(steps, "floor", "exact"),
        sum(klds) / len(klds) if klds else math.nan,
        max(klds, default=math.nan),
        equal,
        min(range(len(steps)), key=lambda i: steps[i].arms["baseline"].top1_margin, default=None),
    )


def _coverage(generation: Generation, candidate: Arm, steps: Sequence[Step]) -> float:
    """Share of the steps whose plan or kernel differed from the baseline's."""
    changed = generation.launched(candidate.name).differs_from(generation.launched("baseline"))
    return sum(step.n_kv in changed for step in steps) / max(len(steps), 1)


def _faults(generation: Generation, found: Written, arm: Arm) -> list[str]:
    """What makes an arm `broken`, as sentences."""
    called = "candidate" if arm.role == "candidate" else f"baseline {arm.spec}"
    findings, faults = arm.findings, []
    if findings.failure is not None and not findings.refused:
        steps = len([s for s in found.steps if arm.name in s.arms])
        at = "the prompt" if arm.name in found.failed_in_prompt else f"token {steps + 1}"
        layer = f", layer {findings.failure_place.layer}" if findings.failure_place else ""
        faults.append(f"{called} failed at {at}{layer}: {findings.failure}")
    infinite = [i for i, s in enumerate(found.steps) if arm.name in s.arms and not s.arms[arm.name].finite]
    if findings.nonfinite_rows:
        layer = f", first in layer {findings.nonfinite_place.layer}" if findings.nonfinite_place else ""
        faults.append(f"{called}: NaN or Inf in {findings.nonfinite_rows} attention rows{layer}")
    elif infinite:
        faults.append(f"{called}: NaN or Inf in the logits of token {infinite[0] + 1}")
    checks = [c for c in generation.exact.checks if c.arm == arm.name]
    wrong = [c for c in checks if c.fault]
    if wrong:
        worst = max(wrong, key=lambda c: graveness(c.nonfinite, c.max_budget_ratio, c.relative_max))
        faults.append(
            f"{called}: {worst.fault}{IN_PLACE}"
            f" ({len(wrong)} of {len(checks)} checks of a step and layer failed)"
        )
    whole = kernel_errors(rows_of(generation.exact.table(), arm.name))
    return [*faults, *(faults_in_common(whole, called) if whole is not None else [])]


def _moved(steps: Sequence[Step], arm: str, reference: str) -> float:
    """Root mean square difference of the margin of the baseline's two top tokens."""
    moves = [s.arms[arm].margin - s.arms[reference].margin for s in steps if arm in s.arms]
    return math.sqrt(sum(m * m for m in moves) / len(moves)) if moves else math.nan


def conclude(generation: Generation, found: Written) -> tuple[list[Compared], dict[str, Any]]:
    """Every candidate's comparison, and run.json."""
    compared = [compare(generation, found, arm) for arm in generation.candidates]
    if not all(step.arms["exact"].finite for step in found.steps if "exact" in step.arms):
        exact = next(arm for arm in generation.arms if arm.role == "exact")
        if exact.findings.nonfinite_place is None:
            exact.findings.model_fault = model_fault(generation.architecture)
    void = void_reasons(generation.arms)
    verdict = None if void else overall([c.decision for c in compared])
    several = len(compared) > 1
    reasons = void or [
        f"{c.arm.spec}: {reason}" if several else reason
        for c in compared
        if c.decision.verdict == verdict
        for reason in c.decision.reasons
    ]
    notes = generation.notes
    if found.ended:
        notes = [*notes, f"{found.ended} after {len(found.steps)} of {generation.settings.n_predict} tokens"]
    tokenizer = generation.tokenizer
    run = {
        "schema": SCHEMA,
        "command": "gen",
        "verdict": verdict or "void",
        "exit_code": EXIT_VOID if verdict is None else EXIT_CODES[verdict],
        "reasons": reasons,
        "notes": notes,
        "settings": generation.settings.to_json(),
        "environment": environment.describe(str(generation.device)),
        "model": model_json(generation.architecture),
        "tensor_parallel": tensor_parallel_json(generation.architecture, generation.settings.gpus),
        "prompt": {
            "text": generation.settings.prompt,
            "tokens": len(generation.prompt),
            "last": tokenizer.token_text(generation.prompt[-1]),
        },
        "arms": [_arm_json(generation, found, arm) for arm in generation.arms],
        "pairs": [_pair_json(generation, found, c) for c in compared],
        "coverage": [
            {"arm": arm.name, "spec": arm.spec, **line.to_json()}
            for arm in generation.arms
            if arm.kernel is not None
            for line in generation.launched(arm.name).coverage()
        ],
        "detectable": {c.arm.name: c.distance.detectable if c.distance else None for c in compared},
        "speed": {"seconds": generation.stepper.stopwatch.seconds, "weights_resident": generation.resident},
    }
    return compared, run


def _arm_json(generation: Generation, found: Written, arm: Arm) -> dict[str, Any]:
    mine = [step.arms[arm.name] for step in found.steps if arm.name in step.arms]
    tokens = [step.chosen for step in found.steps]
    own = found.own_tokens.get(arm.name)
    if own is not None:
        tokens = tokens[: found.first[arm.name].step] + own
    decode = generation.tokenizer.decode
    writes = arm.role in ("baseline", "candidate")
    return {
        "name": arm.name,
        "role": arm.role,
        "spec": arm.spec,
        "tokens": len(mine),
        "text": decode(tokens) if writes else None,
        "kld_to_exact_mean": sum(a.kld_to_exact for a in mine) / len(mine) if mine else math.nan,
        "agrees_with_baseline": sum(a.top1 == s.chosen for a, s in zip(mine, found.steps, strict=False)),
        "failure": arm.findings.failure,
    }


def _pair_json(generation: Generation, found: Written, c: Compared) -> dict[str, Any]:
    d, text = c.distance, generation.tokenizer.token_text
    return {
        "reference": "baseline",
        "candidate": c.arm.name,
        "path": "decode",
        "verdict": c.decision.verdict,
        "reasons": c.decision.reasons,
        "distance_ratio": d.ratio if d else None,
        "distance_ratio_ci": [d.low, d.high] if d else None,
        "distance_kind": "attention output, on the exact arm's q, k, v",
        "distance_scope": d.scope if d else None,
        "detectable_distance_ratio": d.detectable if d else None,
        "kld_mean": c.kld_mean,
        "kld_max": c.kld_max,
        "tokens": len([s for s in found.steps if c.arm.name in s.arms]),
        "bitwise_equal": c.bitwise_equal,
        "coverage": c.coverage,
        "first_difference": c.first.to_json() if c.first else None,
        "disagreements": [
            {
                "step": i,
                "baseline_token": text(found.steps[i].chosen),
                "candidate_token": text(found.steps[i].arms[c.arm.name].top1),
                "margin": found.steps[i].arms["baseline"].top1_margin,
            }
            for i in c.disagreements
        ],
        "margin_moved_rms": c.moved,
        "margin_moved_rms_floor": c.floor_moved,
        "closest": None
        if c.closest is None
        else {
            "step": c.closest,
            "token": text(found.steps[c.closest].chosen),
            "margin": found.steps[c.closest].arms["baseline"].top1_margin,
        },
    }


def token_table(generation: Generation, found: Written) -> pa.Table:
    """tokens.parquet: a row a step and arm; `target` is the baseline's token, `window` is 0."""
    rows = []
    for step in found.steps:
        for arm in generation.arms:
            if arm.name in step.arms:
                a = step.arms[arm.name]
                scores = (a.nll, a.kld_to_exact, a.kld_to_baseline, a.top1, a.target_logit, a.top1_margin)
                rows.append((0, step.n_kv - 1, step.n_kv, step.token, step.chosen, arm.name, *scores))
    columns = list(zip(*rows, strict=True)) or [()] * len(TOKEN_SCHEMA)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, TOKEN_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=TOKEN_SCHEMA)
