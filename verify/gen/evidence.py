"""From what a run of `verify gen` wrote to the verdict on each candidate, and to `run.json`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from verify.arms.arm import Arm, Findings, void_reasons
from verify.arms.kernel_errors import IN_PLACE, faults_in_common, kernel_errors, rows_of, said_in_common
from verify.arms.model_facts import any_call, model_record
from verify.arms.model_health import model_fault
from verify.arms.records import OWN, SCHEMA, coverage_records
from verify.arms.split_mode import tensor_parallel_record
from verify.gen.checks import log_squares
from verify.gen.difference import Difference
from verify.gen.record import (
    ClosestStep,
    Disagreement,
    GenArmRecord,
    GenPairRecord,
    GenRun,
    GenSpeed,
    PromptRecord,
)
from verify.gen.run import Generation, Step, Written
from verify.judge.run_verdict import run_verdict
from verify.judge.statistics import ratio_of_samples
from verify.judge.ties import is_tie, moved_by_rounding
from verify.judge.verdict import Decision, PairEvidence, decide
from verify.kernels.judging.figures import graveness, shared_fault
from verify.machine import environment
from verify.ppl.evidence.path_alone import path_alone_of
from verify.ppl.groups import TOKEN_SCHEMA
from verify.ppl.record import PathAloneRecord

FEWEST_SAMPLES = 2


def pair_record(
    generation: Generation, written: Written, candidate: Arm, findings: Mapping[str, Findings]
) -> GenPairRecord:
    """Everything about one candidate, and the verdict on it."""
    steps = [step for step in written.steps if candidate.name in step.arms]
    baseline = next(arm for arm in generation.arms if arm.name == candidate.reference)
    of_candidate, of_baseline = findings[candidate.name], findings[baseline.name]
    equal = bool(steps) and of_candidate.kept_all_bits
    drafts = generation.settings.draft > 0
    logs = log_squares(generation.exact.checks, candidate.name, baseline.name, text_alone=drafts)
    enough = bool(steps) and len(logs) >= FEWEST_SAMPLES
    both = candidate.name, baseline.name
    finite = all(c.nonfinite == 0 for c in generation.exact.checks if c.arm in both)
    distance = ratio_of_samples(np.array(logs), "this text only") if enough and finite else None
    coverage = _coverage(generation, candidate, steps)
    faults = [
        *_faults(generation, written, candidate, of_candidate, "candidate"),
        *_faults(generation, written, baseline, of_baseline, f"baseline {baseline.spec}"),
    ]
    shared = ""
    if equal and (both_have := _faults(generation, written, baseline, of_baseline, "both")):
        shared, faults = shared_fault(both_have), []
    elif overflows_nowhere_else(generation, candidate, of_candidate):
        shared = (
            f"both: NaN or Inf in {of_candidate.nonfinite_rows} attention rows, in elements that are so with"
            " the baseline too: not this change"
        )
        faults = [
            *_faults(generation, written, candidate, of_candidate, "candidate", nonfinite=False),
            *_faults(
                generation, written, baseline, of_baseline, f"baseline {baseline.spec}", nonfinite=False
            ),
        ]
    decision = decide(
        PairEvidence(
            faults=faults,
            same_spec=(candidate.spec, candidate.form) == (baseline.spec, baseline.form),
            coverage=coverage,
            bitwise_equal=equal,
            distance=distance,
            min_coverage=generation.settings.min_coverage,
            margin=generation.settings.margin,
            allow_same=generation.settings.allow_same,
            not_compared=of_candidate.refusal("candidate") or of_baseline.refusal("baseline"),
            unit="tokens",
            through="another plan" if candidate.form == baseline.form else str(candidate.form),
            narrowed_by="more tokens (-n) narrow it",
        )
    )
    if shared:
        decision = Decision(decision.verdict, [*decision.reasons, shared])
    text = generation.tokenizer.token_text
    klds = [step.arms[candidate.name].kld_to_baseline for step in steps]
    first = written.first.get(candidate.name)
    closest = min(range(len(steps)), key=lambda i: steps[i].arms["baseline"].top1_margin, default=None)
    calls = {(c.call, c.layer) for c in generation.exact.checks if c.arm == candidate.name and c.step >= 0}
    judged = Counter(layer for _, layer in calls)
    layers = [i for i in range(generation.architecture.sizes.layers) if generation.architecture.attends(i)]
    return GenPairRecord(
        reference=baseline.name,
        candidate=candidate.name,
        path=candidate.path,
        verdict=decision.verdict,
        reasons=decision.reasons,
        distance_ratio=distance.ratio if distance else None,
        distance_ratio_ci=(distance.low, distance.high) if distance else None,
        distance_scope=distance.scope if distance else None,
        detectable_distance_ratio=distance.detectable if distance else None,
        kld_mean=sum(klds) / len(klds) if klds else math.nan,
        kld_max=max(klds, default=math.nan),
        tokens=len(steps),
        bitwise_equal=equal,
        coverage=coverage,
        judged_calls=judged.total(),
        judged_least=min((judged[layer] for layer in layers), default=0),
        first_difference=first.record() if first else None,
        disagreements=[
            Disagreement(
                step=i,
                baseline_token=text(step.chosen),
                candidate_token=text(step.arms[candidate.name].top1),
                margin=step.arms["baseline"].top1_margin,
                moved=step.arms[candidate.name].moved,
                floor=(floor := _floor_at(i, step, first)),
                tie=is_tie(step.arms[candidate.name].moved, floor),
            )
            for i, step in enumerate(steps)
            if step.arms[candidate.name].top1 != step.chosen
        ],
        margin_moved_rms=_moved(steps, candidate.name, baseline.name),
        margin_moved_rms_floor=_moved(steps, "floor", "exact"),
        closest=None
        if closest is None
        else ClosestStep(
            step=closest,
            token=text(steps[closest].chosen),
            margin=steps[closest].arms["baseline"].top1_margin,
        ),
    )


def path_alone_record(
    generation: Generation, written: Written, candidate: Arm, pair: GenPairRecord
) -> PathAloneRecord:
    """What calls of some tokens change by themselves: whether the text with drafts is the text without."""
    both = [s.arms for s in written.steps if "floor" in s.arms and "exact" in s.arms]
    return path_alone_of(
        candidate,
        [one.tie for one in pair.disagreements],
        tokens=pair.tokens,
        top1_changes=len(pair.disagreements),
        floor_changes=sum(arms["floor"].top1 != arms["exact"].top1 for arms in both),
        floor_tokens=len(both),
        bitwise_equal=pair.bitwise_equal,
    )


def _floor_at(i: int, step: Step, first: Difference | None) -> float:
    """How far one rounding of noise moves two likely tokens at a step: of the first difference by its own
    draws, of others by the floor arm's divergence."""
    if first is not None and first.step == i and first.floor is not None:
        return first.floor
    floor = step.arms.get("floor")
    return math.nan if floor is None else moved_by_rounding(floor.kld_to_exact)


def _other_than_written(written: Written) -> int:
    """Steps at which the baseline, given its own text, prefers another token than it wrote."""
    return sum(step.chosen != token for step, token in zip(written.steps, written.text, strict=False))


def _coverage(generation: Generation, candidate: Arm, steps: Sequence[Step]) -> float:
    """Share of the steps whose plan or kernel differed from the baseline's."""
    changed = generation.launched(candidate.name).differs_from(generation.launched(candidate.reference or ""))
    return sum(step.n_kv in changed for step in steps) / max(len(steps), 1)


def overflows_nowhere_else(generation: Generation, arm: Arm, found: Findings) -> bool:
    """Whether an arm has NaN or Inf, in place or in the text, and none where its reference has none."""
    checks = [c for c in generation.exact.checks if c.arm == arm.name]
    has = found.nonfinite_rows or any(c.nonfinite for c in checks)
    return bool(has) and not found.nonfinite_beyond and not found.failed


def _faults(
    generation: Generation,
    written: Written,
    arm: Arm,
    findings: Findings,
    called: str,
    *,
    nonfinite: bool = True,
) -> list[str]:
    """What makes an arm `broken`, sentences that begin with `called`. nonfinite: whether NaN and Inf do."""
    faults = []
    if findings.failure is not None and not findings.refused:
        steps = len([s for s in written.steps if arm.name in s.arms])
        if arm.role == "baseline" and written.failed_after is not None:
            steps = written.failed_after
        at = "the prompt" if arm.name in written.failed_in_prompt else f"token {steps + 1}"
        layer = f", layer {findings.failure_place.layer}" if findings.failure_place else ""
        faults.append(f"{called} failed at {at}{layer}: {findings.failure}")
    infinite = [i for i, s in enumerate(written.steps) if arm.name in s.arms and not s.arms[arm.name].finite]
    if not nonfinite:
        pass
    elif findings.nonfinite_rows:
        layer = f", first in layer {findings.nonfinite_place.layer}" if findings.nonfinite_place else ""
        faults.append(f"{called}: NaN or Inf in {findings.nonfinite_rows} attention rows{layer}")
    elif infinite:
        faults.append(f"{called}: NaN or Inf in the logits of token {infinite[0] + 1}")
    checks = [c for c in generation.exact.checks if c.arm == arm.name]
    if not nonfinite:
        checks = [c._replace(nonfinite=0) for c in checks]
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


def conclude(generation: Generation, written: Written) -> GenRun:
    """The whole run: every candidate's evidence, and the verdict."""
    findings = generation.findings()
    finite = all(step.arms["exact"].finite for step in written.steps if "exact" in step.arms)
    if not finite and findings["exact"].nonfinite_place is None:
        fault = model_fault(generation.architecture)
        findings["exact"] = replace(findings["exact"], model_fault=fault)
    candidates = generation.candidates
    pairs = [pair_record(generation, written, arm, findings) for arm in candidates]
    verdict, exit_code, reasons = run_verdict(
        [
            (arm.spec, Decision(pair.verdict, pair.reasons))
            for arm, pair in zip(candidates, pairs, strict=True)
        ],
        void_reasons(generation.arms, findings),
    )
    settings, shape = generation.settings, any_call(generation.architecture)
    notes = [*generation.notes, *said_in_common(generation.exact.table(), generation.arms, shape)]
    if others := _other_than_written(written):
        notes = [
            *notes,
            f"the baseline itself prefers another token than it wrote at {others} of {len(written.steps)}"
            f" steps, once the model's products have {settings.draft} rows instead of one: these are ties,"
            " and candidates are held against what it prefers then",
        ]
    if written.ended:
        notes = [*notes, f"{written.ended} after {len(written.steps)} of {settings.n_predict} tokens"]
    traces = {arm.name: generation.launched(arm.name) for arm in generation.arms if arm.kernel}
    return GenRun(
        schema=SCHEMA,
        command="gen",
        verdict=verdict,
        exit_code=exit_code,
        reasons=reasons,
        notes=notes,
        settings=settings.to_json(),
        environment=environment.describe(str(generation.device)),
        model=model_record(generation.architecture),
        tensor_parallel=tensor_parallel_record(generation.architecture, settings.gpus),
        prompt=PromptRecord(
            text=settings.prompt,
            tokens=len(generation.prompt),
            last=generation.tokenizer.token_text(generation.prompt[-1]),
        ),
        arms=[_arm_record(generation, written, arm, findings[arm.name].failure) for arm in generation.arms],
        pairs=pairs,
        path_alone=[
            path_alone_record(generation, written, arm, pair)
            for arm, pair in zip(candidates, pairs, strict=True)
            if settings.baseline == OWN and pair.tokens
        ],
        coverage=coverage_records(generation.arms, traces),
        detectable={pair.candidate: pair.detectable_distance_ratio for pair in pairs},
        speed=GenSpeed(seconds=generation.stepper.stopwatch.seconds, weights_resident=generation.resident),
    )


def _arm_record(generation: Generation, written: Written, arm: Arm, failure: str | None) -> GenArmRecord:
    mine = [step.arms[arm.name] for step in written.steps if arm.name in step.arms]
    tokens = list(written.text)
    own = written.own_tokens.get(arm.name)
    if own is not None:
        tokens = tokens[: written.first[arm.name].step] + own
    return GenArmRecord(
        name=arm.name,
        role=arm.role,
        spec=arm.spec,
        calls="" if arm.form.is_plain else str(arm.form),
        tokens=len(mine),
        text=generation.tokenizer.decode(tokens) if arm.role in ("baseline", "candidate") else None,
        kld_to_exact_mean=sum(a.kld_to_exact for a in mine) / len(mine) if mine else math.nan,
        agrees_with_baseline=sum(a.top1 == s.chosen for a, s in zip(mine, written.steps, strict=False)),
        failure=failure,
    )


def token_table(generation: Generation, written: Written) -> pa.Table:
    """tokens.parquet: a row a step and arm; `target` is the baseline's token, `window` is 0."""
    rows = []
    for step in written.steps:
        for arm in generation.arms:
            if arm.name in step.arms:
                a = step.arms[arm.name]
                scores = (a.nll, a.kld_to_exact, a.kld_to_baseline, a.top1, a.target_logit, a.top1_margin)
                rows.append((0, step.n_kv - 1, step.n_kv, step.token, step.chosen, arm.name, *scores))
    columns = list(zip(*rows, strict=True)) or [()] * len(TOKEN_SCHEMA)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, TOKEN_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=TOKEN_SCHEMA)
