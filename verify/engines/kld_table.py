"""The table that `llama-perplexity --kl-divergence` prints, from the columns of two logits files.

f is a mean, u its standard error, as the program takes them: u = sqrt((mean(x^2) - f^2) / (n - 1)), tokens as
independent, and 0 for fewer than 11 tokens; the covariance of two means likewise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from verify.engines.divergence import PairScores

# Below these numbers of tokens the program sets errors and covariances to 0.
_FEWEST_FOR_ERROR, _FEWEST_FOR_COVARIANCE = 11, 10
KLD_FRACTIONS = (0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001)
DP_FRACTIONS = (0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001)


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


class Table(NamedTuple):
    """Every figure of the program's table. Differences of probability are shares of 1, not per cent."""

    ppl: Estimate  # of the file, PPL(Q)
    ppl_base: Estimate  # PPL(base)
    correlation: float  # of ln PPL(Q) and ln PPL(base) over tokens
    ln_ratio: Estimate  # ln PPL(Q) / PPL(base)
    ratio: Estimate  # PPL(Q) / PPL(base)
    difference: Estimate  # PPL(Q) - PPL(base)
    kld: Estimate  # mean, nats a token
    kld_least: float  # of a token
    kld_most: float  # of a token
    kld_percentiles: dict[float, float]  # share -> KLD
    dp: Estimate  # mean change of p of the token that came
    dp_least: float  # of a token
    dp_most: float  # of a token
    dp_percentiles: dict[float, float]  # share -> change
    dp_rms: Estimate  # root mean square of the changes
    same_top: Estimate  # share of tokens with the same most likely token


def table_of(pair: PairScores) -> Table:
    """The figures of two files."""
    # The program's own numbers are float32.
    nll, base = (x.ravel().astype(np.float32).astype(np.float64) for x in (pair.other.nll, pair.base.nll))
    kld = pair.kld.ravel()
    n = len(nll)
    f, f_base = mean(nll), mean(base)
    covariance = 0.0
    if n >= _FEWEST_FOR_COVARIANCE:
        covariance = float((nll * base).mean() - nll.mean() * base.mean()) / (n - 1)
    u, u_base = f.error, f_base.error
    ppl, ppl_base = (Estimate(math.exp(x.value), math.exp(x.value) * x.error) for x in (f, f_base))
    ln_ratio = Estimate(f.value - f_base.value, _root(u * u + u_base * u_base - 2 * covariance))
    ratio = math.exp(ln_ratio.value)
    difference = Estimate(
        ppl.value - ppl_base.value,
        _root(ppl.error**2 + ppl_base.error**2 - 2 * ppl.value * ppl_base.value * covariance),
    )
    dp = (np.exp(-nll).astype(np.float32) - np.exp(-base).astype(np.float32)).astype(np.float64)
    square = mean(dp * dp)
    rms = math.sqrt(square.value)
    same = float((pair.other.top1 == pair.base.top1).mean())
    return Table(
        ppl=ppl,
        ppl_base=ppl_base,
        correlation=covariance / (u * u_base) if u and u_base else math.nan,
        ln_ratio=ln_ratio,
        ratio=Estimate(ratio, ratio * ln_ratio.error),
        difference=difference,
        kld=mean(kld),
        kld_least=float(kld.min()),
        kld_most=float(kld.max()),
        kld_percentiles={share: percentile(kld, share) for share in KLD_FRACTIONS},
        dp=mean(dp),
        dp_least=float(dp.min()),
        dp_most=float(dp.max()),
        dp_percentiles={share: percentile(dp, share) for share in DP_FRACTIONS},
        dp_rms=Estimate(rms, 0.5 / rms * square.error if rms else 0.0),
        same_top=Estimate(same, math.sqrt(same * (1 - same) / (n - 1)) if n > 1 else math.nan),
    )


def mean(x: np.ndarray) -> Estimate:
    """f and u of x [n]."""
    f = float(x.mean())
    spread = float((x * x).mean()) - f * f
    return Estimate(
        f, math.sqrt(spread / (len(x) - 1)) if spread > 0 and len(x) >= _FEWEST_FOR_ERROR else 0.0
    )


def percentile(x: np.ndarray, share: float) -> float:
    """The value at share * (n - 1) of x sorted, interpolated linearly."""
    return float(np.quantile(x, share))


def table_lines(t: Table) -> list[str]:
    """The table as the program prints it."""

    def wide(name: str, e: Estimate) -> str:
        return f"{name:<30}: {e.value:10.6f} ± {e.error:10.6f}"

    def kld_name(share: float) -> str:
        return "Median " if share == 0.5 else f"{100 * share:4.1f}%  "

    return [
        "====== Perplexity statistics ======",
        wide("Mean PPL(Q)", t.ppl),
        wide("Mean PPL(base)", t.ppl_base),
        f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * t.correlation:6.2f}%",
        wide("Mean ln(PPL(Q)/PPL(base))", t.ln_ratio),
        wide("Mean PPL(Q)/PPL(base)", t.ratio),
        wide("Mean PPL(Q)-PPL(base)", t.difference),
        "",
        "====== KL divergence statistics ======",
        f"Mean    KLD: {t.kld.value:10.6f} ± {t.kld.error:10.6f}",
        f"Maximum KLD: {t.kld_most:10.6f}",
        *(f"{kld_name(share)} KLD: {x:10.6f}" for share, x in t.kld_percentiles.items()),
        f"Minimum KLD: {t.kld_least:10.6f}",
        "",
        "====== Token probability statistics ======",
        f"Mean    Δp: {100 * t.dp.value:6.3f} ± {100 * t.dp.error:5.3f} %",
        f"Maximum Δp: {100 * t.dp_most:6.3f}%",
        *(f"{kld_name(share)} Δp: {100 * x:6.3f}%" for share, x in t.dp_percentiles.items()),
        f"Minimum Δp: {100 * t.dp_least:6.3f}%",
        f"RMS Δp    : {100 * t.dp_rms.value:6.3f} ± {100 * t.dp_rms.error:5.3f} %",
        f"Same top p: {100 * t.same_top.value:6.3f} ± {100 * t.same_top.error:5.3f} %",
    ]


def _root(x: float) -> float:
    return math.sqrt(max(x, 0.0))
