"""`verify identify`: regimes and where they change, what a kernel states against what is seen, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.cli import assert_refused, verify
from verify.identify.regimes import identify, path_of
from verify.identify.run import run_identify
from verify.kernels.capabilities import Capabilities
from verify.kernels.eager import EagerKernel
from verify.kernels.heads import Heads
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.registry import build_kernel
from verify.reports.identify import identify_json, identify_lines

# Right at every length; from 300 keys on P is float16.
SWITCHES = """
import torch

def attend(q, k, v, *, kv_len, scale):
    ratio = q.shape[2] // k.shape[2]
    s = scale * torch.einsum("bthd,bshd->bhts", q.float(), k.float().repeat_interleave(ratio, 2))
    s = s.masked_fill(torch.arange(k.shape[1]) >= kv_len[:, None, :, None], -torch.inf)
    p = torch.exp(s - s.amax(-1, keepdim=True))
    l = p.sum(-1, keepdim=True)
    p = p.half().float() if k.shape[1] >= 300 else p
    return (torch.einsum("bhts,bshd->bhtd", p, v.float().repeat_interleave(ratio, 2)) / l).transpose(1, 2)

def unsteady(q, k, v, *, kv_len, scale):
    return attend(q, k, v, kv_len=kv_len, scale=scale) * (1 + 1e-6 * torch.rand(()))
"""
# Every key that a regime of `verify identify --json` has.
KEYS = {
    "n_kv_min", "n_kv_max", "n_q_min", "n_q_max", "p", "offset", "l_of_rounded_p", "accumulator",
    "accumulator_bits", "rounding", "flushed_every", "mma_block", "first_product", "q_scaled_in", "logits",
    "rescale", "tile", "tile_order", "parts", "cuts", "merge", "result", "exponential", "deterministic",
    "row_alone", "confidence",
}  # fmt: skip


@pytest.fixture
def switches(tmp_path: Path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(SWITCHES)
    return f"py:{file}"


def test_a_change_with_length_is_found_to_the_key_and_a_false_statement_is_said(switches: str) -> None:
    outcome = run_identify(
        f"{switches}::attend,acc=f16", shape="4/2x64", n_kv="256,320", n_q="1", sequences=1, regimes="quick",
        seconds=300.0, device=torch.device("cpu"), tell=lambda line: None,
    )  # fmt: skip
    found = identify_json(outcome)
    first, second = found["regimes"]
    assert (first["n_kv_min"], first["n_kv_max"], first["p"]) == (256, 299, "f32")
    assert (second["n_kv_min"], second["n_kv_max"], second["p"]) == (300, 320, "f16")
    assert first.keys() >= KEYS and found["exit_code"] == 0 and found["not_looked_at"] == []
    assert found["contradictions"] == ["says acc=f16, sums in float32 at 256 keys"]
    text = "\n".join(identify_lines(outcome))
    assert "n_kv 300 to 320, n_q 1: P float16" in text and "head groups are not observable" in text


def test_full_tries_other_ratios_and_numbers_of_sequences(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SWITCHES.replace("k.shape[1] >= 300", "(q.shape[2] // k.shape[2] > 8 or q.shape[0] > 4)"))
    outcome = run_identify(
        f"py:{file}::attend", shape="4/1x64", n_kv="128", n_q="1", sequences=1, regimes="full", seconds=1.0,
        device=torch.device("cpu"), tell=lambda line: None,
    )  # fmt: skip
    found = {(r["ratio"], r["batch"]): r["p"] for r in identify_json(outcome)["regimes"]}
    assert found == {
        (4, 1): "f32", (1, 1): "f32", (8, 1): "f32", (12, 1): "f16", (16, 1): "f16", (4, 4): "f32",
        (4, 16): "f16",
    }  # fmt: skip
    text = "\n".join(identify_lines(outcome))
    assert "n_q 1, ratio 12, 1 sequences: P float16" in text and "n_q 1: P float32" in text
    # What it says of itself until it is read.
    assert "nothing is stated of its sums" not in text


def test_a_few_tokens_are_a_prompt_where_there_is_no_other_path() -> None:
    kernel = build_kernel("eager")
    assert path_of(4, kernel) == "several" and path_of(1, kernel) == "decode"

    class Prefills(EagerKernel):
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities(), paths=("prefill",))

    only = Prefills("eager", TileOptions())
    assert path_of(4, only) == "prefill" and path_of(1, only) is None
    found = identify(only, [64], heads=Heads(4, 1, 64, 64), n_qs=(1, 4))
    assert [(s.n_q, s.reading.p) for s in found.seen if s.reading is not None] == [(4, "f16")]
    assert found.not_looked_at[0] == "1 query tokens: it has no path decode"


def test_what_was_not_tried_is_said() -> None:
    kernel = build_kernel("eager:kv=2")
    found = identify(kernel, [8, 64, 128], heads=Heads(4, 1, 64, 64), n_qs=(1,), seconds=1e-9)
    assert found.seen == [] and "8 keys: fewer than 16 show nothing" in found.not_looked_at
    assert "128 keys, 1 query tokens: the time was spent" in found.not_looked_at
    options = "calls with windows, sinks, softcaps, ALiBi: their budget is the loosest"
    assert options in found.not_looked_at
    found = identify(kernel, [150], heads=Heads(4, 1, 64, 64), n_qs=(1, 2))
    assert [(s.n_q, s.reading.parts) for s in found.seen if s.reading is not None] == [(1, 2), (2, 2)]


def test_a_kernel_that_is_not_deterministic_ends_with_exit_3(switches: str) -> None:
    done = verify("identify", f"{switches}::unsteady", "--n-kv", "64", "--n-q", "1", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == said["exit_code"] == 3 and not said["identifiable"]
    assert "not deterministic" in said["reasons"][0] and "not deterministic" in done.stderr
    # A function that takes no options is asked for none.
    assert not any("sinks" in each for each in said["not_looked_at"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--regimes", "some"), ("--regimes some", "quick or full")),
        (("--n-q", "0"), ("--n-q 0", "from 1")),
        (("--sequences", "0"), ("--sequences 0",)),
        (("--shape", "glm-4.7-flash"), ("--shape glm-4.7-flash", "keys")),
    ],
)
def test_bad_options_are_refused(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_refused(verify("identify", "eager", *arguments), *words)
