"""`verify tolerance`: right kernels stay below what it says, and gates see what they are said to see."""

from __future__ import annotations

import json
import math

import pytest

from support.cli import assert_refused, verify
from verify.identify.tolerance import tolerances
from verify.kernels.heads import Heads
from verify.kernels.judging.gates import NMSE_LIMIT
from verify.kernels.registry import build_kernel

HEADS = Heads(2, 1, 64, 64)


def test_other_draws_of_a_right_kernel_stay_below_and_coarser_ones_do_not() -> None:
    kernel = build_kernel("eager")
    (said,) = tolerances(kernel, HEADS, 200, ["gaussian"], seeds=2)
    (fresh,) = tolerances(kernel, HEADS, 200, ["gaussian"], seeds=2, first_seed=7)
    assert fresh.typical < said.nmse < said.nmse_most and said.absolute < said.absolute_most
    # 32 draws: the largest lies about two deviations up, where a thousand's lies three.
    assert fresh.nmse < 2 * said.nmse and fresh.absolute < 2 * said.absolute
    assert said.cosine == math.sqrt(1 - said.nmse) and said.relative == math.sqrt(said.nmse)
    (coarse,) = tolerances(build_kernel("eager:p=bf16"), HEADS, 200, ["gaussian"], seeds=2)
    assert coarse.typical > said.nmse and coarse.nmse_most > said.nmse_most


def test_the_smallest_factor_is_the_gates_own_limit() -> None:
    (said,) = tolerances(build_kernel("eager:p=f32"), HEADS, 200, ["gaussian"], seeds=1)
    # Relative to the result under test: f / (1 + f) = sqrt(5e-4), found to 2^(19/256).
    limit = math.sqrt(NMSE_LIMIT) / (1 - math.sqrt(NMSE_LIMIT))
    found = said.factors["llama.cpp"]
    assert found is not None and limit <= found <= limit * 2 ** (19 / 256)
    assert said.refuses == [] and said.dropped["assert_close"]
    assert all(f is not None and f < found for name, f in said.factors.items() if name != "llama.cpp")


def test_the_command() -> None:
    done = verify(
        "tolerance", "eager:out=f16", "--n-kv", "64", "--seeds", "1", "--inputs", "gaussian", "--json"
    )
    said = json.loads(done.stdout)
    assert done.returncode == 0 and said["families"][0]["draws"] == 16
    assert "99.9 %" in done.stderr and "llama.cpp" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--n-kv", "3"), ("--n-kv 3", "16")),
        (("--inputs", "none"), ("--inputs none",)),
        (("--seeds", "0"), ("--seeds 0",)),
    ],
)
def test_bad_options_of_tolerance_are_refused(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_refused(verify("tolerance", *arguments), *words)
