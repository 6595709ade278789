"""Pictures of a run of `verify ppl`, as SVG that stands inside a page.

Each is drawn from a run's record and is None where the run has nothing to draw it from. The same record gives
the same text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from verify.judge.strata import improvement_of
from verify.judge.verdict import DEFAULT_MARGIN
from verify.ppl.record import FROZEN_SUFFIX
from verify.reports.colours import (
    ARMS,
    CANDIDATES,
    HARM,
    MARGIN_BAND,
    NOISE,
    OF_NOISE,
    OTHER_PLAN_BAND,
    ZERO,
)
from verify.reports.drawing import (
    PERPLEXITY_CAPTIONS,
    Picture,
    finish,
    legend,
    new_figure,
    perplexity_lines,
    plain_numbers,
    plain_powers,
    plain_ratios,
    with_prefix,
)
from verify.reports.record import StoredPpl
from verify.reports.templating import is_known

# Tokens of a dot along the text, and the most dots: of a longer text each is of more tokens.
BLOCK_TOKENS, MOST_BLOCKS = 32, 600
RANGES = 8


# A stranger's folder may hold any figures; what numpy warns of while they are drawn is nothing to a reader.
@np.errstate(all="ignore")
def pictures(stored: StoredPpl, *, prefix: str = "") -> dict[str, Picture]:
    """Every picture that this run has the data for, by name.

    prefix: goes before ids in the SVG, where pictures of several runs stand in one page.
    """
    drawers: tuple[Callable[[StoredPpl], Picture | None], ...] = (
        distance_ratios,
        drift,
        drift_by_position,
        own_error,
        nll_differences,
        divergence_by_length,
        perplexity_by_window,
        perplexity_by_position,
        noise,
    )
    found = (draw(stored) for draw in drawers)
    return {picture.name: with_prefix(picture, prefix) for picture in found if picture is not None}


def distance_ratios(stored: StoredPpl) -> Picture | None:
    """Each candidate's distance ratio with its interval, the limits of the verdicts beside it."""
    pairs = [
        (p.candidate, p.distance_ratio, p.distance_ratio_ci)
        for p in stored.run.pairs
        if is_known(p.distance_ratio) and p.distance_ratio_ci is not None
    ]
    if not pairs:
        return None
    margin = stored.run.settings.get("margin", DEFAULT_MARGIN)
    figure, axis = new_figure(height=1.0 + 0.35 * len(pairs))
    axis.axvspan(improvement_of(margin), margin, color=MARGIN_BAND, lw=0)
    axis.axvline(1, color=ZERO, lw=0.8)
    axis.axvline(margin, color=HARM, lw=0.8, ls="--")
    for i, (candidate, ratio, limits) in enumerate(pairs):
        # A limit that is not known is one without end.
        low, high = (math.inf if math.isnan(x) else x for x in limits)
        colour = _colour(stored, candidate)
        axis.plot([max(low, 1e-3), min(high, 1e6)], [i, i], color=colour, lw=2)
        axis.plot([ratio], [i], "o", color=colour)
    axis.set(xscale="log", xlabel="distance to exact, over the baseline's", ylim=(len(pairs) - 0.5, -0.5))
    axis.set_yticks(range(len(pairs)), [candidate for candidate, *_ in pairs])
    plain_ratios(axis)
    return finish(
        "distance",
        figure,
        "Distance ratio and its 99.9 % interval. Shaded: from where improved begins"
        f" to the margin of harm, {margin:g} (dashed).",
    )


def drift(stored: StoredPpl) -> Picture | None:
    """How far the residual stream of each arm is from the exact arm's, after each layer."""
    arms = [a for a in stored.run.drift.arms if a.layers]
    lines = {a.arm: ([x.layer for x in a.layers], [x.relative for x in a.layers]) for a in arms}
    return _lines(
        stored,
        "drift",
        lines,
        xlabel="layer entered",
        ylabel="relative distance",
        caption="Distance of each arm's residual stream to the exact arm's, layer by layer. Dashed: the same"
        " kernel's error alone, with casts frozen.",
    )


def drift_by_position(stored: StoredPpl) -> Picture | None:
    """The same at the last layer, along the window."""
    middle = [(a + b - 1) / 2 for a, b in pairwise(stored.run.drift.edges)]
    lines = {
        a.arm: (middle, a.layers[-1].by_position)
        for a in stored.run.drift.arms
        if a.layers and len(a.layers[-1].by_position) == len(middle) > 1
    }
    return _lines(
        stored,
        "drift by position",
        lines,
        xlabel="position in the window",
        ylabel="relative distance",
        caption="The same before the last layer, along the window.",
    )


def own_error(stored: StoredPpl) -> Picture | None:
    """Relative error of each kernel on the exact arm's q, k and v, by layer."""
    lines = {}
    for arm in stored.run.arms:
        layer, error = (stored.layer_column(arm.name, c) for c in ("layer", "relative_rms"))
        if not error.size or arm.role not in ("baseline", "candidate"):
            continue
        layers = np.unique(layer)
        known = np.isfinite(error)
        if not known.all():
            layers = np.unique(layer[known])
        rms = [float(np.sqrt(np.mean(np.square(error[known & (layer == x)])))) for x in layers]
        lines[arm.name] = (layers.tolist(), rms)
    return _lines(
        stored,
        "own error",
        lines,
        xlabel="layer",
        ylabel="relative rms error",
        caption="Each kernel's own error by layer, on the exact arm's q, k and v: nothing has drifted yet.",
    )


def nll_differences(stored: StoredPpl) -> Picture | None:
    """Candidate minus baseline, block by block of the text, in the band that rounding alone spans."""
    roles = {arm.role: arm.name for arm in reversed(stored.run.arms)}
    exact, floor = roles.get("exact"), roles.get("floor")
    if exact is None or floor is None:
        return None
    columns = {
        pair.candidate: [stored.column(name, "nll") for name in (pair.candidate, pair.reference)]
        for pair in stored.run.pairs
    }
    longest = max((len(nll) for nll, _ in columns.values()), default=0)
    tokens = BLOCK_TOKENS * max(-(-longest // (BLOCK_TOKENS * MOST_BLOCKS)), 1)
    noise_of_blocks = _blocks(*stored.both(floor, exact, "nll"), tokens)
    drawn = {
        candidate: _blocks(nll, reference, tokens)
        for candidate, (nll, reference) in columns.items()
        if len(nll) == len(reference) > 0
    }
    if not drawn or not noise_of_blocks.size:
        return None
    figure, axis = new_figure()
    band = 2 * float(np.sqrt(np.mean(np.square(noise_of_blocks))))
    axis.axhspan(-band, band, color=NOISE, lw=0)
    axis.axhline(0, color=ZERO, lw=0.8)
    most = max(len(values) for values in drawn.values())
    for name, values in drawn.items():
        x = (np.arange(len(values)) + 0.5) * tokens
        axis.plot(
            x, values, "." if most > 60 else ".-", color=_colour(stored, name), ms=4, lw=0.8, label=name
        )
    axis.set(xlabel="scored token", ylabel="nats a token")
    plain_numbers(axis)
    legend(axis, len(drawn))
    return finish(
        "nll",
        figure,
        f"NLL of candidate minus baseline, means of {tokens} tokens. Band: twice what one rounding of"
        " noise in the exact arm does to such means.",
    )


def perplexity_by_window(stored: StoredPpl) -> Picture | None:
    """Of the baseline and of each candidate, whose lines lie on one another unless a kernel is wrong."""
    lines = [
        (name, range(1, len(nll) + 1), np.exp(nll.mean(1)).tolist()) for name, nll in _nll_of_arms(stored)
    ]
    return _perplexity_picture(stored, "by_window", lines)


def perplexity_by_position(stored: StoredPpl) -> Picture | None:
    """The same by the number of keys that a row sees."""
    lines = []
    for name, nll in _nll_of_arms(stored):
        parts = np.array_split(np.arange(nll.shape[1]), min(RANGES, nll.shape[1]))
        n_kv = [stored.run.corpus.first_scored + 1 + float(part.mean()) for part in parts]
        lines.append((name, n_kv, [float(np.exp(nll[:, part].mean())) for part in parts]))
    return _perplexity_picture(stored, "by_position", lines)


def _nll_of_arms(stored: StoredPpl) -> Iterator[tuple[str, np.ndarray]]:
    """(arm, nll [windows, scored]) of baseline and candidates, where every token of a window is there."""
    scored = stored.run.corpus.scored_per_window
    for arm in stored.run.arms:
        nll = stored.column(arm.name, "nll") if arm.role in ("baseline", "candidate") else np.empty(0)
        if scored > 0 and nll.size and nll.size % scored == 0:
            yield arm.name, nll.reshape(-1, scored)


def _perplexity_picture(
    stored: StoredPpl, kind: str, lines: Sequence[tuple[str, Sequence[float], Sequence[float]]]
) -> Picture | None:
    xlabel, caption = PERPLEXITY_CAPTIONS[kind]
    coloured = [(name, xs, ys, _colour(stored, name)) for name, xs, ys in lines]
    return perplexity_lines(kind, coloured, xlabel=xlabel, caption=caption)


def divergence_by_length(stored: StoredPpl) -> Picture | None:
    """KLD to exact against n_kv, frozen casts where the run has them, and where the plans differ."""
    lines = {}
    for arm in stored.run.arms:
        if arm.role in ("floor", "baseline", "candidate"):
            for name in (arm.name, arm.name + FROZEN_SUFFIX):
                lines[name] = _by_length(stored.column(name, "n_kv"), stored.column(name, "kld_to_exact"))
    changed = [pair.changed_n_kv for pair in stored.run.pairs if pair.changed_n_kv]

    def shade(axis: Any) -> None:
        low, high = axis.get_xlim()
        for first, last in changed:
            axis.axvspan(max(first, low), min(last, high), color=OTHER_PLAN_BAND, lw=0, zorder=0)
        axis.set_xlim(low, high)

    return _lines(
        stored,
        "kld",
        {name: points for name, points in lines.items() if points[0]},
        xlabel="n_kv",
        ylabel="mean KLD to exact, nats",
        caption="KL divergence to exact against the number of visible keys."
        + (" Shaded: where the candidate ran another plan." if changed else "")
        + (" Dashed: casts frozen." if any(FROZEN_SUFFIX in n and p[0] for n, p in lines.items()) else ""),
        also=shade if changed else None,
    )


def noise(stored: StoredPpl) -> Picture | None:
    """The candidates among arms whose cuts were moved at random."""
    groups = [g for g in stored.run.noise if g.arms]
    if not groups:
        return None
    figure, axis = new_figure(height=1.4 + 0.45 * len(groups))
    for i, group in enumerate(groups):
        thetas = [math.nan if arm.theta is None else arm.theta for arm in group.arms]
        axis.plot(thetas, [i] * len(thetas), "o", color=OF_NOISE, ms=5)
        if group.theta_limits:
            axis.plot(group.theta_limits, [i, i], "|-", color=OF_NOISE, lw=1, ms=14)
        for c in group.candidates:
            axis.plot([c.theta], [i], "D", color=_colour(stored, c.candidate), label=c.candidate)
    axis.set_yticks(range(len(groups)), [g.reference for g in groups])
    # Room above for the legend.
    axis.set(xlabel="theta, mean of ln(KLD / KLD of the baseline)", ylim=(len(groups) - 0.5, -1.3))
    legend(axis, 1)
    return finish(
        "noise",
        figure,
        "Dots: the baseline with its KV cuts moved at random. Bar: where 99.9 % of such arms lie."
        " Diamonds: the candidates.",
    )


def _lines(
    stored: StoredPpl,
    name: str,
    lines: dict[str, tuple[list[Any], list[Any]]],
    *,
    xlabel: str,
    ylabel: str,
    caption: str,
    also: Callable[[Any], None] | None = None,
) -> Picture | None:
    """One logarithmic plot, a line an arm; values that are missing or not positive are left out."""
    figure, axis = new_figure()
    drawn = 0
    for arm, (xs, ys) in lines.items():
        points = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and y > 0]
        base = arm.removesuffix(FROZEN_SUFFIX)
        role = next((a.role for a in stored.run.arms if a.name == base), "")
        # Passes with planted faults are no arms of the run: they have a table of their own.
        if not points or role in ("", "exact", "control"):
            continue
        is_noise = role == "noise"
        axis.plot(
            [x for x, _ in points],
            [y for _, y in points],
            marker="." if len(points) < 20 else "",
            ls="--" if arm.endswith(FROZEN_SUFFIX) else "-",
            lw=0.8 if is_noise else 1.3,
            zorder=1 if is_noise else 2,
            color=NOISE if is_noise else _colour(stored, base),
            label="_" if is_noise or (arm != base and base in lines) else base,
        )
        drawn += 1
    if not drawn:
        return None
    axis.set(yscale="log", xlabel=xlabel, ylabel=ylabel)
    axis.xaxis.get_major_locator().set_params(integer=True)
    plain_powers(axis)
    if also is not None:
        also(axis)
    legend(axis, drawn)
    return finish(name, figure, caption)


def _by_length(n_kv: np.ndarray, values: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean n_kv and mean value in RANGES ranges of n_kv with as many tokens each."""
    known = np.isfinite(values)
    n_kv, values = n_kv[known], values[known]
    if not values.size:
        return [], []
    order = np.argsort(n_kv, kind="stable")
    parts = [p for p in np.array_split(order, min(RANGES, len(order))) if p.size]
    return [float(n_kv[p].mean()) for p in parts], [float(values[p].mean()) for p in parts]


def _blocks(a: np.ndarray, b: np.ndarray, tokens: int) -> np.ndarray:
    """Means of a - b over consecutive blocks; a short rest is left out unless it is all there is."""
    difference = a - b if len(a) == len(b) else np.empty(0)
    whole = len(difference) // tokens * tokens
    if whole == 0:
        return difference.mean(keepdims=True) if difference.size else difference
    means: np.ndarray = difference[:whole].reshape(-1, tokens).mean(1)
    return means


def _colour(stored: StoredPpl, arm: str) -> str:
    role = next((a.role for a in stored.run.arms if a.name == arm), "")
    if role in ARMS:
        return ARMS[role]
    names = [a.name for a in stored.run.arms if a.role == "candidate"]
    return CANDIDATES[names.index(arm) % len(CANDIDATES)] if arm in names else NOISE
