"""Arms: one complete pass of the model each, by the role it has in a run.

exact       float64 attention
floor       exact * (1 + 2^-24 noise): how far apart two runs come to lie from one rounding alone
baseline    the kernel that the candidate is compared with
control     baseline again, by a second kernel of the same specification: must be equal to the bit
candidate   the kernel under test
engine      an engine's own logits file: scored, never run
noise       the baseline's kernel with another plan, drawn at random: what a change of plan alone does
prompt      float64 attention, prefill: computes what comes before the scored rows, once for all arms

Every kernel's arm runs twice, freely, as an engine would run it, and with frozen casts (`frozen`).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from verify.arms.attempt import attempt
from verify.kernels.bits import different, not_finite, same_bits
from verify.kernels.cache_types import AS_GIVEN
from verify.kernels.call import AttentionPath, Call, checked_call
from verify.kernels.exact import exact_attention
from verify.kernels.formed import PLAIN_CALLS, CallForm, whole_path
from verify.kernels.kernel import Kernel
from verify.kernels.trace import LaunchTrace
from verify.model.layer_call import LayerCall

Role = Literal["exact", "floor", "baseline", "control", "candidate", "engine", "noise", "prompt"]
FLOOR_NOISE = 2.0**-24


@dataclass(frozen=True)
class Place:
    """Where in the run something was seen; position and head are -1 where they do not apply."""

    window: int
    layer: int
    position: int = -1
    head: int = -1

    def __str__(self) -> str:
        words = [f"window {self.window + 1}", f"layer {self.layer}"]
        if self.position >= 0:
            words.append(f"position {self.position}")
        if self.head >= 0:
            words.append(f"head {self.head}")
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What went wrong in an arm, the first of each kind, and whether it stayed equal to its reference."""

    failure: str | None = None  # what its kernel failed with; it did not run from there on
    failure_place: Place | None = None  # where
    nonfinite_place: Place | None = None  # the first attention row with NaN or Inf
    nonfinite_rows: int = 0  # attention rows with NaN or Inf
    nonfinite_beyond: int = 0  # of its rows, in place too, those with one where the reference arm has none
    attention_equal: bool = True  # every attention output had the reference arm's bits
    logits_equal: bool = True  # so had every logit
    first_difference: Place | None = None  # the first row that has other bits
    unsteady: str | None = None  # where one call gave two results, and how far apart
    model_fault: str | None = None  # of the exact arm: that the model itself is not finite

    @property
    def failed(self) -> bool:
        return self.failure is not None

    @property
    def refused(self) -> bool:
        """Whether the kernel said that it does not take such calls, which is no evidence either way."""
        return self.failure is not None and self.failure.startswith(REFUSED)

    @property
    def kept_all_bits(self) -> bool:
        """Whether it ran to the end with the reference's bits, in every attention output and logit."""
        return not self.failed and self.attention_equal and self.logits_equal

    def refusal(self, called: str) -> str:
        """That a kernel does not take what the model asks for, or nothing."""
        return f"{called} does not take this call, {self.failure}" if self.refused else ""

    def of_failure(self) -> Findings:
        """The failure alone: what a later group must know."""
        return Findings(failure=self.failure, failure_place=self.failure_place)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Findings:
        places = ("failure_place", "nonfinite_place", "first_difference")
        values: dict[str, Any] = {k: Place(**v) if k in places and v else v for k, v in stored.items()}
        return cls(**values)

    def joined(self, later: Findings) -> Findings:
        """These, and the findings of a later group."""
        failure = self if self.failed else later
        return Findings(
            failure=failure.failure,
            failure_place=failure.failure_place,
            nonfinite_place=self.nonfinite_place or later.nonfinite_place,
            nonfinite_rows=self.nonfinite_rows + later.nonfinite_rows,
            nonfinite_beyond=self.nonfinite_beyond + later.nonfinite_beyond,
            attention_equal=self.attention_equal and later.attention_equal,
            logits_equal=self.logits_equal and later.logits_equal,
            first_difference=self.first_difference or later.first_difference,
            unsteady=self.unsteady or later.unsteady,
            model_fault=self.model_fault or later.model_fault,
        )


@dataclass(frozen=True)
class Arm:
    """One arm of a run. What comes to light about it is in `Findings`."""

    name: str  # unique in the run
    role: Role  # what it is for, see above
    spec: str  # of its kernel; of an engine, its file
    path: AttentionPath  # how rows are computed together
    kernel: Kernel | None = None  # None: float64 attention, or an engine's file
    reference: str | None = None  # name of the arm that it is compared with, if any
    form: CallForm = PLAIN_CALLS  # of the calls that its kernel is asked


def common_cache(arms: Iterable[Arm]) -> str | None:
    """The cache in which all kernels hold keys and values: no difference between them. Else None."""
    caches = {arm.kernel.cache for arm in arms if arm.kernel is not None}
    only = caches.pop() if len(caches) == 1 else AS_GIVEN
    return None if only.as_given else str(only)


class FirstResult(NamedTuple):
    """A kernel's result for a call that it will be given again; error: the norm of its error, float64 []."""

    window: int
    out: torch.Tensor
    error: torch.Tensor


def kernel_call(call: LayerCall, path: AttentionPath, rows: torch.Tensor | None = None) -> Call:
    """The kernel's call of a layer, whole windows; `rows` narrows it to some query rows."""
    q, kv_len, keys = call.q, call.kv_len, call.keys
    if rows is not None:
        q, kv_len = q[:, rows].contiguous(), kv_len[:, rows].contiguous()
        keys = None if keys is None else keys[:, rows].contiguous()
    made = checked_call(
        q,
        call.k,
        call.v,
        kv_len=kv_len,
        keys=keys,
        path=whole_path(path),
        **call.settings.options(q.device),
    )
    return replace(made, layer=call.layer)


# What kernels that do not take a call say first; and how far results of one call may lie apart, in units of
# their own error: sums in another order differ by less.
REFUSED, STEADY_TIMES = "unsupported:", 4.0


class _RowCheck(NamedTuple):
    """What was looked for in the rows of a call, and what there was of it, still on the device."""

    # Rows with NaN or Inf; with one where the reference has none; with other bits than the reference's.
    kind: Literal["nonfinite", "beyond", "different"]
    window: int  # the first of the call
    layer: int  # of the call
    kv_len: torch.Tensor  # [B, T]
    heads: int  # H
    counts: torch.Tensor  # [2]: rows that have it; the first element of [B, T, H] that has

    def place(self, element: int) -> Place:
        row, head = divmod(element, self.heads)
        window, row = divmod(row, self.kv_len.shape[1])
        return Place(self.window + window, self.layer, int(self.kv_len[window, row]) - 1, head)


class ArmRunner:
    """An arm as the model's runner sees it: attention, watched.

    outputs: of the layer and windows at hand, by arm: what others are compared with; all runners of a run
    share it. on_exact: called with each call of the exact arm and its float64 result; on_call: with the name
    and every call. wait: whether `findings` are complete after each call, which on a GPU has the host wait
    for it; else they are after `settle`. first_results: what kernels gave for this very call before, by arm:
    the next result is compared with it. findings, launched: what is known already. trusting: go on with the
    reference arm's own output in the place of this one's, which is to have its bits: whoever trusts looks at
    `trusted_wrongly` once `settle` has been called, and no device is waited for in the meantime.
    """

    def __init__(
        self,
        arm: Arm,
        outputs: dict[str, torch.Tensor],
        *,
        seed: int = 0,
        on_exact: Callable[[LayerCall, torch.Tensor], None] | None = None,
        on_call: Callable[[str, LayerCall], None] | None = None,
        wait: bool = True,
        first_results: dict[str, FirstResult] | None = None,
        findings: Findings | None = None,
        launched: LaunchTrace | None = None,
        trusting: bool = False,
    ) -> None:
        self.trusting = trusting
        self.arm, self.name, self.path, self.seed = arm, arm.name, arm.path, seed
        self.findings, self.launched = findings or Findings(), launched or LaunchTrace()
        self._outputs, self._on_exact, self._on_call = outputs, on_exact, on_call
        self._wait, self._first_results = wait, {} if first_results is None else first_results
        self._checks: list[_RowCheck] = []
        # Window, layer, and [2]: how far two results of one call lie apart, and the error of the first.
        self._again: list[tuple[int, int, torch.Tensor]] = []

    @property
    def failed(self) -> bool:
        return self.findings.failed

    def fail(self, failure: str, call: LayerCall) -> None:
        """Its kernel failed in this call, or in one that was made to measure it: it does not run any more."""
        if not self.failed:
            self.findings = replace(
                self.findings, failure=failure, failure_place=Place(call.window, call.layer)
            )

    def attend(self, call: LayerCall) -> torch.Tensor | None:
        arm = self.arm
        if self.failed:
            # Its output of other windows or layers is nothing to compare with.
            self._outputs.pop(arm.name, None)
            return None
        if self._on_call is not None:
            self._on_call(self.name, call)
        if arm.kernel is None:
            oracle = exact_attention(kernel_call(call, self.path), with_lse=False).out
            if arm.role == "exact":
                self._check_rows("nonfinite", call, not_finite(oracle).any(-1))
                if self._wait:
                    self.settle()
            if self._on_exact is not None:
                self._on_exact(call, oracle)
            if arm.role == "floor":
                oracle = oracle + floor_noise(call, oracle, self.seed)
            return oracle if call.x is not None and call.x.dtype == torch.float64 else oracle.float()
        tried = attempt(arm.kernel, kernel_call(call, self.path))
        self.launched.count(tried.launched)
        tried.check_memory(arm.spec)
        if tried.output is None:
            self.fail(tried.failure, call)
            self._outputs.pop(arm.name, None)
            return None
        out = tried.output.out
        bad = not_finite(out)
        self._check_rows("nonfinite", call, bad.any(-1))
        self._compare(call, out, bad)
        self._check_steady(call, out)
        if self._wait:
            self.settle()
        if self.trusting and arm.reference is not None:
            # The very tensor, so that what follows from it is computed once.
            return self._outputs.get(arm.reference, out)
        return out

    @property
    def trusted_wrongly(self) -> bool:
        """Whether the reference's output stood in the place of one that had other bits."""
        return self.trusting and not self.findings.attention_equal and not self.failed

    def _check_steady(self, call: LayerCall, out: torch.Tensor) -> None:
        """Compare with what the kernel gave for the same call before, if it did."""
        first = self._first_results.pop(self.arm.name, None)
        if first is not None and first.window == call.window:
            self.note_again(call, first.out, out, lambda: first.error)

    def note_again(
        self,
        call: LayerCall,
        first: torch.Tensor,
        second: torch.Tensor,
        error: Callable[[], torch.Tensor],
    ) -> None:
        """Two results of one call: unsteady if they lie farther apart than STEADY_TIMES the first's error,
        which is told by `settle`."""
        if not first.is_cuda and same_bits(first, second):
            return
        moved = torch.where(different(first, second), second.double() - first.double(), 0.0).norm()
        self._again.append((call.window, call.layer, torch.stack((moved, error()))))

    def settle(self) -> None:
        """Enter what the calls so far have shown; waits for the device."""
        self._settle_again()
        if not self._checks:
            return
        counts = torch.stack([check.counts for check in self._checks]).tolist()
        for check, (rows, first) in zip(self._checks, counts, strict=True):
            if not rows:
                continue
            now = self.findings
            if check.kind == "nonfinite":
                self.findings = replace(
                    now,
                    nonfinite_rows=now.nonfinite_rows + rows,
                    nonfinite_place=now.nonfinite_place or check.place(first),
                )
            elif check.kind == "beyond":
                self.findings = replace(now, nonfinite_beyond=now.nonfinite_beyond + rows)
            else:
                self.findings = replace(
                    now,
                    attention_equal=False,
                    first_difference=now.first_difference or check.place(first),
                )
        self._checks.clear()

    def _settle_again(self) -> None:
        if not self._again:
            return
        found = torch.stack([norms for _, _, norms in self._again]).tolist()
        for (window, layer, _), (moved, error) in zip(self._again, found, strict=True):
            if not moved <= STEADY_TIMES * error and self.findings.unsteady is None:
                times = moved / max(error, 1e-300)
                self.findings = replace(
                    self.findings,
                    unsteady=f"window {window + 1}, layer {layer}: {times:.3g} times its error",
                )
        self._again.clear()

    def _compare(self, call: LayerCall, out: torch.Tensor, bad: torch.Tensor) -> None:
        self._outputs[self.arm.name] = out
        if self.arm.reference is None:
            return
        reference = self._outputs.get(self.arm.reference)
        self.check_beyond(call, out, reference, bad)
        if reference is None:
            self.findings = replace(self.findings, attention_equal=False)
        elif out.is_cuda or not same_bits(out, reference):
            self._check_rows("different", call, different(out, reference).any(-1))

    def check_beyond(
        self,
        call: LayerCall,
        out: torch.Tensor,
        reference: torch.Tensor | None,
        bad: torch.Tensor | None = None,
    ) -> None:
        """Note the rows with NaN or Inf in elements that the reference's result of this call has finite.

        bad: where `out` has them, if that is known.
        """
        bad = not_finite(out) if bad is None else bad
        if out.is_cuda or bool(bad.any()):
            self._check_rows(
                "beyond", call, (bad if reference is None else bad & reference.isfinite()).any(-1)
            )

    def _check_rows(
        self, kind: Literal["nonfinite", "beyond", "different"], call: LayerCall, where: torch.Tensor
    ) -> None:
        """Note the rows of a call at which `where` [B, T, H] holds."""
        counts = torch.stack((where.any(-1).sum(), where.flatten().to(torch.uint8).argmax()))
        self._checks.append(
            _RowCheck(
                kind=kind,
                window=call.window,
                layer=call.layer,
                kv_len=call.kv_len,
                heads=where.shape[2],
                counts=counts,
            )
        )


def floor_noise(call: LayerCall, oracle: torch.Tensor, seed: int) -> torch.Tensor:
    """One rounding of noise on the oracle's result [B, T, H, Dv]: normal, 2^-24 of each element.

    Depends on seed, window and layer alone (and on the kind of device that draws it).
    """
    names = tuple(f"{seed}/{call.window + i}/{call.layer}" for i in range(len(oracle)))
    return _drawn(names, oracle.shape[1:], oracle.device, oracle.dtype).mul(oracle).mul_(FLOOR_NOISE)


@functools.lru_cache(maxsize=1)
def _drawn(
    names: tuple[str, ...], shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Normal numbers [names, *shape], of each name its own, not to be written to: the floor is measured with
    those of a layer and then runs it with them."""
    noise = torch.empty((len(names), *shape), dtype=dtype, device=device)
    generator = torch.Generator(device)
    for name, of_name in zip(names, noise, strict=True):
        generator.manual_seed(zlib.crc32(name.encode()))
        of_name.normal_(generator=generator)
    return noise


def void_reasons(arms: Sequence[Arm], findings: Mapping[str, Findings]) -> list[str]:
    """Why the run measured nothing: a control that is not its baseline, or nothing finite to measure."""
    reasons = []
    for arm in arms:
        of_arm = findings[arm.name]
        if of_arm.model_fault is not None:
            reasons.append(of_arm.model_fault)
        elif arm.role == "exact" and of_arm.nonfinite_place is not None:
            reasons.append(
                f"exact attention gives NaN or Inf, first at {of_arm.nonfinite_place}: the model's own"
                " q, k or v overflow the type that they are rounded to (--cache-type), or are not finite"
            )
    for arm in arms:
        if arm.role != "control":
            continue
        of_control, of_baseline = findings[arm.name], findings[arm.reference or ""]
        if of_control.failed and not of_baseline.failed:
            reasons.append(f"control {arm.spec} failed where its baseline did not: {of_control.failure}")
        elif not of_baseline.failed and not of_control.kept_all_bits:
            difference = of_control.first_difference
            where = f", first at {difference}" if difference else ""
            reasons.append(
                f"the control arm differs from its baseline{where}: {arm.spec} does not give the same bits"
                " twice, so no difference can be charged to the candidate"
            )
    return reasons
