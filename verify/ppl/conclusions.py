"""From what the groups of a run left to its record: pairs and their verdicts, and all that is told beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from verify.arms.arm import void_reasons
from verify.arms.cache_proof import CacheProof
from verify.arms.kernel_errors import in_place_record, said_in_common
from verify.arms.model_facts import any_call
from verify.arms.records import SCHEMA, coverage_records
from verify.judge.run_verdict import run_verdict
from verify.judge.verdict import Decision
from verify.machine import environment
from verify.ppl.drift import drift_record
from verify.ppl.engine_logits import engine_records
from verify.ppl.evidence import (
    Scores,
    arm_record,
    by_n_kv,
    changed_plan,
    changed_token_records,
    detectable_record,
    noise_notes,
    noise_records,
    pair_record,
    power_record,
)
from verify.ppl.evidence.alone import SingleTokensBeside, alone_record
from verify.ppl.evidence.caches import cache_proofs, cache_records
from verify.ppl.evidence.path_alone import path_alone_record
from verify.ppl.groups import GroupResult
from verify.ppl.headroom import headroom_notes, headroom_record
from verify.ppl.preparation import Preparation
from verify.ppl.reasking import OnceMore
from verify.ppl.record import LengthRecord, PairRecord, PathAloneRecord, PplRun, SpeedRecord


class HeldPairs(NamedTuple):
    """Candidates held against their baselines."""

    pairs: list[PairRecord]
    by_n_kv: list[LengthRecord]
    path_alone: list[PathAloneRecord]


def conclude(
    prepared: Preparation,
    joined: GroupResult,
    again: OnceMore,
    *,
    measuring_notes: set[str],
    measured_windows: int,
    rooms: Path | None,
    speed: Callable[[], SpeedRecord],
) -> PplRun:
    """The record of a run.

    again: what was asked once more; measuring_notes: how kernels were measured; measured_windows: on which;
    rooms: the folder that holds what was seen of the headroom, if it was looked at; speed: of everything up
    to now, and so asked last.
    """
    settings = prepared.settings
    scores = Scores(joined, prepared.windows.scored_per_window)
    arms = [arm_record(arm, joined.findings[arm.name], scores) for arm in prepared.arms]
    specs = {arm.name: arm.spec for arm in prepared.arms}
    proofs = cache_proofs(prepared.arms, prepared.architecture, settings.cache_type, prepared.device)
    ratio = prepared.architecture.sizes.ratio
    beside = {
        arm.name: SingleTokensBeside(joined.alone, arm.name, arm.reference, ratio)
        for arm in prepared.arms
        if arm.reference is not None
    }
    held = _held_pairs(prepared, joined, scores, again.unsteady, proofs, beside)
    verdict, exit_code, reasons = run_verdict(
        [(f"{specs[p.candidate]} ({p.path})", Decision(p.verdict, p.reasons)) for p in held.pairs],
        void_reasons(prepared.arms, joined.findings),
    )
    baseline = next(arm.name for arm in prepared.arms if arm.role == "baseline")
    engines = engine_records(
        prepared.logits_files,
        {arm.name: arm.kld_to_exact_mean for arm in arms},
        baseline,
        [tensor.type_name for tensor in prepared.file.tensors.values()],
    )
    power = power_record(prepared.faults, held.pairs, baseline, joined, scores, settings.margin)
    noise = noise_records(prepared.arms, held.pairs, joined, scores)
    launching = [*prepared.arms, *([prepared.prompt] if prepared.prompt else [])]
    in_place = [in_place_record(joined.layers, arm.name) for arm in prepared.arms]
    alone = [
        alone_record(
            arm,
            joined,
            beside[arm.name].judge(settings.margin) if arm.role == "candidate" else None,
            _scored_n_kv(prepared),
        )
        for arm in prepared.arms
        if arm.kernel is not None
    ]
    room = None if rooms is None else headroom_record(rooms, prepared.ordering)
    return PplRun(
        schema=SCHEMA,
        command="ppl",
        verdict=verdict,
        exit_code=exit_code,
        reasons=reasons,
        notes=[
            # Now: what has run by now may have left some.
            *sorted(prepared.notes | measuring_notes),
            *said_in_common(joined.layers, prepared.arms, any_call(prepared.architecture)),
            *noise_notes(noise),
            *headroom_notes(room, prepared.ordering, settings.cache_type),
            *(engine.said for engine in engines),
        ],
        engines=engines,
        settings=settings.to_json(),
        environment=environment.describe(str(prepared.device)),
        model=prepared.model,
        tensor_parallel=prepared.tensor_parallel,
        corpus=prepared.corpus_record(measured_windows),
        arms=arms,
        pairs=held.pairs,
        coverage=coverage_records(launching, joined.traces),
        in_place=[record for record in in_place if record is not None],
        headroom=room,
        caches=cache_records(prepared.arms, prepared.architecture, proofs, joined.layers),
        alone=[record for record in alone if record is not None],
        path_alone=held.path_alone,
        by_n_kv=held.by_n_kv,
        drift=drift_record(joined.drift),
        top1_changes=changed_token_records(joined.top1, prepared.windows, prepared.tokenizer),
        noise=noise,
        free_noise=again.free_noise,
        power=power,
        detectable={pair.candidate: detectable_record(pair, joined, power) for pair in held.pairs},
        speed=speed(),
    )


def _held_pairs(
    prepared: Preparation,
    joined: GroupResult,
    scores: Scores,
    unsteady: Mapping[str, str],
    proofs: Mapping[str, CacheProof],
    beside: Mapping[str, SingleTokensBeside],
) -> HeldPairs:
    """By arm, unsteady: its free-running pass that nothing explains, in words; proofs: what was proved of its
    cache; beside: its single tokens."""
    settings, scored_n_kv = prepared.settings, _scored_n_kv(prepared)
    by_name = {arm.name: arm for arm in prepared.arms}
    floor = next((arm.name for arm in prepared.arms if arm.role == "floor"), None)
    pairs, lengths, path_alone = [], [], []
    exact = next(arm.name for arm in prepared.arms if arm.role == "exact")
    for arm in prepared.arms:
        if arm.role != "candidate":
            continue
        reference = by_name[arm.reference or ""]
        changed = changed_plan(joined.traces[arm.name], joined.traces[reference.name], scored_n_kv)
        pairs.append(
            pair_record(
                arm,
                reference,
                joined,
                scores,
                changed=changed,
                floor=floor,
                min_coverage=settings.min_coverage,
                margin=settings.margin,
                allow_same=settings.allow_same,
                rows=settings.score_last or settings.n_ctx,
                unsteady=unsteady.get(arm.name, ""),
                cache_faults=[
                    f"{called}: {fault}"
                    for one, called in ((arm.name, "candidate"), (reference.name, "baseline"))
                    for fault in (proofs[one].faults[:1] if one in proofs else [])
                ],
                single_tokens=beside[arm.name],
            )
        )
        path_alone.append(path_alone_record(arm, reference, joined, scores, exact=exact, floor=floor))
        lengths += by_n_kv(
            arm.name,
            reference.name,
            scores,
            scored_n_kv=scored_n_kv,
            changed_n_kv=changed.n_kv,
            floor=floor,
        )
    return HeldPairs(pairs, lengths, [record for record in path_alone if record is not None])


def _scored_n_kv(prepared: Preparation) -> range:
    """Visible keys of the scored positions of a window."""
    positions = prepared.windows.scored_positions
    return range(positions.start + 1, positions.stop + 1)
