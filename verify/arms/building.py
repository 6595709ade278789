"""The arms of a run, from what was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from verify.arms.arm import Arm, Role, common_cache
from verify.arms.split_mode import build_shared_kernel
from verify.kernels.cache_types import run_cache
from verify.kernels.call import AttentionPath
from verify.kernels.formed import PLAIN_CALLS, CallForm, in_form, whole_path


def build_arms(
    baselines: Sequence[str],
    candidates: Sequence[str],
    *,
    paths: Sequence[AttentionPath] = ("decode",),
    gpus: int = 1,
    noise: Sequence[str] = (),
    engines: Sequence[str] = (),
    form: CallForm = PLAIN_CALLS,
    baseline_form: CallForm | None = None,
) -> list[Arm]:
    """exact and floor once; baselines, controls, candidates and noise arms on each path; engines.

    baselines: that of each candidate, those that are equal one arm, and the first the noise arms';
    candidates, noise: specifications; engines: logits files; form: of the calls of all kernels, or of the
    candidates' alone where the others have a form of their own, baseline_form. Raises SpecError, with every
    kernel that was built closed again.
    """
    arms = [Arm("exact", "exact", "exact", paths[0]), Arm("floor", "floor", "exact", paths[0])]

    def add(name: str, spec: str, path: AttentionPath, role: Role, reference: str | None) -> None:
        own = form if baseline_form is None or role == "candidate" else baseline_form
        arms.append(
            Arm(
                name=name,
                role=role,
                spec=spec,
                path=path if own.n_q > 1 else whole_path(path),
                kernel=in_form(build_shared_kernel(spec, gpus), own),
                reference=reference,
                form=own,
            )
        )

    try:
        for path in paths:
            suffix = f"/{path}" if len(paths) > 1 else ""
            references: dict[str, str] = {}
            for baseline in baselines:
                if baseline in references:
                    continue
                nth = f"-{len(references) + 1}" if references else ""
                references[baseline] = f"baseline{nth}{suffix}"
                add(references[baseline], baseline, path, "baseline", None)
                add(f"control{nth}{suffix}", baseline, path, "control", references[baseline])
            for (number, spec), baseline in zip(_numbered(candidates), baselines, strict=True):
                add(f"candidate{number}{suffix}", spec, path, "candidate", references[baseline])
            for i, spec in enumerate(noise):
                add(f"noise-{i + 1}{suffix}", spec, path, "noise", references[baselines[0]])
        arms += [Arm(f"engine{number}", "engine", file, paths[0]) for number, file in _numbered(engines)]
    except BaseException:
        close_kernels(arms)
        raise
    return arms


def _numbered(specs: Sequence[str]) -> list[tuple[str, str]]:
    """`-1`, `-2`, ... and each of several; one alone has no number."""
    return [(f"-{i + 1}" if len(specs) > 1 else "", spec) for i, spec in enumerate(specs)]


def close_kernels(arms: Iterable[Arm]) -> None:
    for arm in arms:
        if arm.kernel is not None:
            arm.kernel.close()


def kernel_notes(arms: Sequence[Arm], cache_type: str) -> set[str]:
    """What a reader of the verdict must know about the kernels: a fallback that ran, a common cache.

    cache_type: of the run.
    """
    notes = {note for arm in arms if arm.kernel for note in arm.kernel.notes}
    if (cache := common_cache(arms)) is not None:
        notes.add(f"all kernels hold {cache}: what that loses is in no distance")
    if not run_cache(cache_type).cache.as_given:
        notes.add(f"all arms, exact too, have the cache {cache_type}: what that loses is in no distance")
    return notes
