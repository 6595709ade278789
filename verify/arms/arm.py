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

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from verify.arms.attempt import attempt
from verify.kernels.bits import same_bits
from verify.kernels.call import AttentionPath, Call, checked_call
from verify.kernels.exact import exact_attention
from verify.kernels.kernel import Kernel
from verify.kernels.trace import LaunchTrace
from verify.model.runner import LayerCall

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


@dataclass
class Findings:
    """What went wrong in an arm, the first of each kind, and whether it stayed equal to its reference.

    attention_equal: every attention output had the reference arm's bits; logits_equal: so had every logit;
    model_fault: of the exact arm, that the model itself is not finite.
    """

    failure: str | None = None
    failure_place: Place | None = None
    nonfinite_place: Place | None = None
    nonfinite_rows: int = 0
    attention_equal: bool = True
    logits_equal: bool = True
    first_difference: Place | None = None
    unsteady: str | None = None
    model_fault: str | None = None

    @property
    def refused(self) -> bool:
        """Whether the kernel said that it does not take such calls, which is no evidence either way."""
        return self.failure is not None and self.failure.startswith(REFUSED)

    @property
    def kept_all_bits(self) -> bool:
        """Whether it ran to the end with the reference's bits, in every attention output and logit."""
        return self.failure is None and self.attention_equal and self.logits_equal

    def refusal(self, called: str) -> str:
        """That a kernel does not take what the model asks for, or nothing."""
        return f"{called} does not take this call, {self.failure}" if self.refused else ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Findings:
        places = ("failure_place", "nonfinite_place", "first_difference")
        fields: dict[str, Any] = {k: Place(**v) if k in places and v else v for k, v in found.items()}
        return cls(**fields)

    def merge(self, later: Findings) -> None:
        """Add the findings of a later group."""
        if self.failure is None:
            self.failure, self.failure_place = later.failure, later.failure_place
        self.nonfinite_place = self.nonfinite_place or later.nonfinite_place
        self.nonfinite_rows += later.nonfinite_rows
        self.attention_equal &= later.attention_equal
        self.logits_equal &= later.logits_equal
        self.first_difference = self.first_difference or later.first_difference
        self.unsteady = self.unsteady or later.unsteady
        self.model_fault = self.model_fault or later.model_fault


@dataclass
class Arm:
    """One arm of a run. `reference`: name of the arm that it is compared with, if any."""

    name: str
    role: Role
    spec: str
    path: AttentionPath
    kernel: Kernel | None = None
    reference: str | None = None
    findings: Findings = field(default_factory=Findings)

    @property
    def failed(self) -> bool:
        return self.findings.failure is not None


def common_cache(arms: Iterable[Arm]) -> str | None:
    """The quantised type in which all kernels hold keys and values: no difference between them. Else None."""
    caches = {arm.kernel.cache for arm in arms if arm.kernel is not None}
    return caches.pop() if len(caches) == 1 and caches != {"f16"} else None


class FirstResult(NamedTuple):
    """A kernel's result for a call that it will be given again; error: the norm of its error."""

    window: int
    out: torch.Tensor
    error: float


def kernel_call(call: LayerCall, path: AttentionPath, rows: torch.Tensor | None = None) -> Call:
    """The kernel's call of a layer; `rows` narrows it to some query rows."""
    q, kv_len = call.q, call.kv_len
    if rows is not None:
        q, kv_len = q[:, rows].contiguous(), kv_len[:, rows].contiguous()
    return checked_call(
        q,
        call.k,
        call.v,
        kv_len=kv_len,
        path=path,
        **call.settings.options(q.device),
    )


# What kernels that do not take a call say first; and how far results of one call may lie apart, in units of
# their own error: sums in another order differ by less.
REFUSED, STEADY_TIMES = "unsupported:", 4.0


class _Look(NamedTuple):
    """What was looked for in a call of some heads; found, on the device: how many rows have it, and which
    element of [B, T, H] is the first that has."""

    kind: Literal["nonfinite", "different"]
    window: int
    layer: int
    kv_len: torch.Tensor
    heads: int
    found: torch.Tensor

    def place(self, element: int) -> Place:
        row, head = divmod(element, self.heads)
        window, row = divmod(row, self.kv_len.shape[1])
        return Place(self.window + window, self.layer, int(self.kv_len[window, row]) - 1, head)


class ArmRunner:
    """An arm as the model's runner sees it: attention, watched; `launched` is what its kernel ran for it.

    `board` holds, for the layer and windows at hand, the outputs of arms that others are compared with.
    watch: called with each call of the exact arm and its float64 result; seen: with every call; wait: whether
    the findings are complete after each call, which on a GPU has the host wait for it; else they are after
    `settle`. again: what kernels gave for this very call, and the size of its error, by arm: the next result
    is compared with it.
    """

    def __init__(
        self,
        arm: Arm,
        board: dict[str, torch.Tensor],
        *,
        seed: int = 0,
        watch: Callable[[LayerCall, torch.Tensor], None] | None = None,
        seen: Callable[[str, LayerCall], None] | None = None,
        wait: bool = True,
        again: dict[str, FirstResult] | None = None,
    ) -> None:
        self.arm, self.board, self.seed, self.watch, self.seen = arm, board, seed, watch, seen
        self.wait, self.again = wait, {} if again is None else again
        self._looked: list[_Look] = []
        self.name = arm.name
        self.launched = LaunchTrace()

    def attend(self, call: LayerCall) -> torch.Tensor | None:
        arm = self.arm
        if arm.failed:
            # Its output of other windows or layers is nothing to compare with.
            self.board.pop(arm.name, None)
            return None
        if self.seen is not None:
            self.seen(self.name, call)
        if arm.kernel is None:
            oracle = exact_attention(kernel_call(call, arm.path), with_lse=False).out
            if arm.role == "exact":
                self._look("nonfinite", call, ~torch.isfinite(oracle).all(-1))
                if self.wait:
                    self.settle()
            if self.watch is not None:
                self.watch(call, oracle)
            if arm.role == "floor":
                oracle = oracle + floor_noise(call, oracle, self.seed)
            return oracle if call.x is not None and call.x.dtype == torch.float64 else oracle.float()
        tried = attempt(arm.kernel, kernel_call(call, arm.path))
        self.launched.count(tried.launched)
        tried.check_memory(arm.spec)
        if tried.output is None:
            arm.findings.failure = tried.failure
            arm.findings.failure_place = Place(call.window, call.layer)
            self.board.pop(arm.name, None)
            return None
        out = tried.output.out
        self._look("nonfinite", call, ~torch.isfinite(out).all(-1))
        self._compare(call, out)
        self._check_steady(call, out)
        if self.wait:
            self.settle()
        return out

    def _check_steady(self, call: LayerCall, out: torch.Tensor) -> None:
        """Compare with what the kernel gave for the same call before, if it did."""
        first = self.again.pop(self.arm.name, None)
        if first is None or first.window != call.window or same_bits(out, first.out):
            return
        moved = float((out.double() - first.out.double()).norm())
        if not moved <= STEADY_TIMES * first.error:
            self.arm.findings.unsteady = self.arm.findings.unsteady or (
                f"window {call.window + 1}, layer {call.layer}: {moved / max(first.error, 1e-300):.3g} times"
                " its error"
            )

    def settle(self) -> None:
        """Enter what the calls so far have shown; waits for the device."""
        if not self._looked:
            return
        findings = self.arm.findings
        for look, (rows, first) in zip(
            self._looked, torch.stack([look.found for look in self._looked]).tolist(), strict=True
        ):
            if not rows:
                continue
            if look.kind == "nonfinite":
                findings.nonfinite_rows += rows
                findings.nonfinite_place = findings.nonfinite_place or look.place(first)
            else:
                findings.attention_equal = False
                findings.first_difference = findings.first_difference or look.place(first)
        self._looked.clear()

    def _compare(self, call: LayerCall, out: torch.Tensor) -> None:
        self.board[self.arm.name] = out
        if self.arm.reference is None:
            return
        reference = self.board.get(self.arm.reference)
        if reference is None:
            self.arm.findings.attention_equal = False
        elif out.is_cuda or not same_bits(out, reference):
            self._look("different", call, (out.view(torch.int32) != reference.view(torch.int32)).any(-1))

    def _look(self, kind: Literal["nonfinite", "different"], call: LayerCall, where: torch.Tensor) -> None:
        """Note the rows of a call at which `where` [B, T, H] holds."""
        found = torch.stack((where.any(-1).sum(), where.flatten().to(torch.uint8).argmax()))
        self._looked.append(_Look(kind, call.window, call.layer, call.kv_len, where.shape[2], found))


def floor_noise(call: LayerCall, oracle: torch.Tensor, seed: int) -> torch.Tensor:
    """One rounding of noise on the oracle's result [B, T, H, Dv]: normal, 2^-24 of each element.

    Depends on seed, window and layer alone (and on the kind of device that draws it).
    """
    noise = torch.empty_like(oracle)
    generator = torch.Generator(oracle.device)
    for i, of_window in enumerate(noise):
        generator.manual_seed(zlib.crc32(f"{seed}/{call.window + i}/{call.layer}".encode()))
        of_window.normal_(generator=generator)
    return noise.mul_(oracle).mul_(FLOOR_NOISE)


def void_reasons(arms: Sequence[Arm]) -> list[str]:
    """Why the run measured nothing: a control that is not its baseline, or nothing finite to measure."""
    reasons = []
    for arm in arms:
        if arm.findings.model_fault is not None:
            reasons.append(arm.findings.model_fault)
        elif arm.role == "exact" and arm.findings.nonfinite_place is not None:
            reasons.append(
                f"exact attention gives NaN or Inf, first at {arm.findings.nonfinite_place}: the model's own"
                " q, k or v overflow the type that they are rounded to (--cache-type), or are not finite"
            )
    by_name = {arm.name: arm for arm in arms}
    for arm in arms:
        if arm.role != "control":
            continue
        baseline, found = by_name[arm.reference or ""], arm.findings
        if arm.failed and not baseline.failed:
            reasons.append(f"control {arm.spec} failed where its baseline did not: {found.failure}")
        elif not baseline.failed and not (found.attention_equal and found.logits_equal):
            where = f", first at {found.first_difference}" if found.first_difference else ""
            reasons.append(
                f"the control arm differs from its baseline{where}: {arm.spec} does not give the same bits"
                " twice, so no difference can be charged to the candidate"
            )
    return reasons
