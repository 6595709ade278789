"""The first token at which two kernels disagree: how close the two tokens were, and what rounding does there.

The logits of two tokens are l_x and l_y; their margin l_x - l_y is, in nats, the logarithm of the ratio of
their probabilities. Greedy text changes where a margin changes sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch

from verify.arms.arm import Arm, ArmRunner
from verify.gen.record import FirstDifference, ShownToken
from verify.judge.ties import is_tie
from verify.model.steps import Stepper

# Passes of the exact arm with noise at the place of a difference; fewer where the text is long.
MOST_DRAWS, TOKENS_OF_DRAWS = 8, 8192


@dataclass
class Difference:
    """A step at which a candidate's most likely token is not the baseline's."""

    candidate: str  # name of its arm
    step: int  # counted from 0
    n_kv: int  # keys that the step sees
    before: str  # the end of the text so far
    baseline_token: ShownToken  # that was written
    candidate_token: ShownToken  # that the candidate prefers
    logits: dict[str, tuple[float, float]]  # arm -> those of (baseline's token, candidate's token)
    probabilities: dict[str, tuple[float, float]]  # arm -> of the same two
    # Rms of how far one rounding of noise moves exact's margin; None: not measured.
    floor: float | None = None
    draws: int = 0  # that this is the rms of
    margins: dict[str, float] = field(init=False)  # arm -> nats between the two tokens

    def __post_init__(self) -> None:
        self.margins = {arm: x - y for arm, (x, y) in self.logits.items()}

    @property
    def margin(self) -> float:
        """Nats between the two tokens with the baseline."""
        return self.margins["baseline"]

    @property
    def moved(self) -> float:
        """How far the candidate moves that."""
        return abs(self.margins[self.candidate] - self.margins["baseline"])

    def sentences(self) -> list[str]:
        """What a user needs to know about it."""
        x, y = self.baseline_token.text, self.candidate_token.text
        exact = self.margins["exact"]
        where = f"token {self.step + 1}: after {self.before[-40:]!r} the baseline writes {x!r}, the candidate"
        if not math.isfinite(self.moved):
            return [f"{where} has NaN or Inf among its logits, which no token is the largest of"]
        said = [
            f"{where} {y!r}",
            f"the two top tokens were {_nats(self.margin)} apart; the candidate moves them by"
            f" {_nats(self.moved)}" + self._floor_words(),
            f"exact attention prefers {x if exact > 0 else y!r}, by {_nats(abs(exact))}"
            if exact
            else "exact attention prefers neither",
        ]
        if self.floor:
            said.append(self._conclusion())
        return said

    def _floor_words(self) -> str:
        if self.floor is None:
            return ""
        return f"; rounding alone moves them by {_nats(self.floor)} (rms of {self.draws} draws)"

    def _conclusion(self) -> str:
        assert self.floor is not None
        # The candidate turned the order round, so it moved the two farther than they were apart.
        if is_tie(self.moved, self.floor):
            return "so either token was as good: any other rounding could have changed the text here"
        return f"so rounding alone does not explain it: the move is {self.moved / self.floor:.2g} times that"

    def record(self) -> FirstDifference:
        """As `run.json` holds it."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return FirstDifference(**own, margin=self.margin, moved=self.moved, sentences=self.sentences())


def difference_at(
    candidate: str,
    tokens: tuple[ShownToken, ShownToken],
    logits: Mapping[str, torch.Tensor],
    *,
    step: int,
    n_kv: int,
    before: str,
) -> Difference:
    """The difference of a step, from the logits [vocabulary] of every arm there."""
    ids = [token.id for token in tokens]
    found = {name: tuple(float(x[i]) for i in ids) for name, x in logits.items()}
    likely = {name: torch.softmax(x.double(), -1) for name, x in logits.items()}
    return Difference(
        candidate=candidate,
        step=step,
        n_kv=n_kv,
        before=before,
        baseline_token=tokens[0],
        candidate_token=tokens[1],
        logits={name: (a, b) for name, (a, b) in found.items()},
        probabilities={name: (float(p[ids[0]]), float(p[ids[1]])) for name, p in likely.items()},
    )


def measure_floor(difference: Difference, stepper: Stepper, tokens: Sequence[int], *, seed: int) -> None:
    """Fill in how far rounding alone moves the margin there.

    tokens: the whole sequence that the step saw. It goes through exact attention once more, in one call, and
    through as many copies of it with noise as are affordable; margins are compared among these.
    """
    draws = max(min(MOST_DRAWS, TOKENS_OF_DRAWS // len(tokens)), 2)
    arms = [ArmRunner(Arm("exact", "exact", "exact", "prefill"), {})]
    for i in range(draws):
        arm = Arm(f"floor-{i + 1}", "floor", "exact", "prefill")
        arms.append(ArmRunner(arm, {}, seed=seed + 7919 * (i + 1)))
    logits = stepper.beside(arms).step(torch.tensor(tokens), scored=1)
    x, y = difference.baseline_token.id, difference.candidate_token.id
    margins = {name: float(found[0, x]) - float(found[0, y]) for name, found in logits.items()}
    exact = margins.pop("exact")
    difference.floor = math.sqrt(sum((m - exact) ** 2 for m in margins.values()) / draws)
    difference.draws = draws


def _nats(x: float) -> str:
    return f"{x:.2g} nats"
