"""Each kind of input that is drawn shows a fault that the others hide, and no right kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support import hidden_faults
from verify.diff.cells import faults_of, say_what_is_hidden
from verify.diff.examining import KernelEvidence, examine
from verify.diff.inputs import DiffSettings, all_inputs, count_inputs, families_of
from verify.kernels.eager import EagerKernel
from verify.kernels.foreign.function_kernel import FunctionKernel
from verify.kernels.judging.families import ALL_FAMILIES, FORMS, HIDDEN
from verify.kernels.kernel import Kernel
from verify.kernels.plans.shapes import shape_named
from verify.kernels.plans.tile_options import TileOptions
from verify.machine.errors import UsageError
from verify.machine.stages import StageClock

CPU = torch.device("cpu")
PREFILL = {"path": "prefill"}
# A fault, the inputs that show it, and the settings that have them.
SHOWN_BY: list[tuple[str, str, dict[str, Any]]] = [
    ("finite_floor", "massive", {}),
    ("sink_again", "window+sinks", {"n_kvs": (700,)}),
    ("cap_after_mask", "window+softcap", {"n_kvs": (700,)}),
    ("capped_sink", "sinks+softcap", {}),
    ("first_length", "sequences", {}),
    ("third_sequence", "sequences", {}),
    ("many_entries", "sequences", {}),
    ("four_of_prefill", "four-tokens", PREFILL),
    ("few_of_prefill", "four-tokens", PREFILL),
    ("spoiled_by_nan", "hidden-nan", {"strict": True}),
    ("spoiled_by_nan", "hidden-nan+window", {"strict": True}),
    ("long_bfloat16", "one-sign", {"dtype": "bf16", "n_kvs": (1101,)}),
    ("sixteen_heads", "gaussian", {"shapes": ("20/1x64",)}),
    ("newest_cells", "window", {"n_kvs": (900,)}),
    ("captured_lengths", "shorter", {}),
    # What the options of the command draw.
    ("first_length", "gaussian", {"sequences": 3}),
    ("third_sequence", "gaussian", {"sequences": 3}),
    ("four_of_prefill", "gaussian", {**PREFILL, "n_q": 4}),
    ("sink_again", "gaussian", {"shapes": ("gpt-oss@8",), "n_kvs": (700,)}),
]
NAMED = [f"{name} by {family}" for name, family, _ in SHOWN_BY]


def user(name: str) -> FunctionKernel:
    """A function whose sums are stated to be float32."""
    return FunctionKernel(getattr(hidden_faults, name), acc="f32")


def asked(family: str, **more: Any) -> DiffSettings:
    given: dict[str, Any] = {"shapes": ("4/2x64",), "n_kvs": (200,), "rows": 6, "path": "decode", **more}
    return DiffSettings(families=(family,), baseline="eager", candidates=("eager",), device="cpu", **given)


def found(kernel: Kernel, settings: DiffSettings) -> list[KernelEvidence]:
    """What the kernel's first cells show, with these settings."""
    clock = StageClock(CPU)
    evidence = []
    for inputs in list(all_inputs(settings, CPU, clock))[:2]:
        (one,) = examine([kernel], inputs, clock)  # type: ignore[arg-type, list-item]
        say_what_is_hidden(inputs, [one])  # type: ignore[arg-type]
        assert one is not None, f"{kernel.spec} does not take {inputs.family}"
        evidence.append(one)
    return evidence


def faults(kernel: Kernel, settings: DiffSettings) -> list[str]:
    return [fault for one in found(kernel, settings) for fault in faults_of(one, "")]


@pytest.mark.parametrize(("name", "family", "settings"), SHOWN_BY, ids=NAMED)
def test_a_fault_shows_in_the_inputs_that_are_drawn_for_it(
    name: str, family: str, settings: dict[str, Any]
) -> None:
    wrong = user(name)
    assert faults(wrong, asked(family, **settings))
    # And in no plain inputs of the same length, which is why it is drawn.
    plain = {"n_kvs": settings.get("n_kvs", (200,)), "path": settings.get("path", "decode")}
    plain["rows"] = 9 if name == "few_of_prefill" else 6
    again = user(name)
    assert faults(again, asked("window" if name == "sink_again" else "gaussian", **plain)) == []


@pytest.mark.parametrize(("_", "family", "settings"), SHOWN_BY, ids=lambda x: x if isinstance(x, str) else "")
def test_right_kernels_show_nothing_there(_: str, family: str, settings: dict[str, Any]) -> None:
    # A function of plain torch does not bear NaN: that is the very fault.
    right = EagerKernel("eager", TileOptions()) if family in HIDDEN else user("right")
    assert faults(right, asked(family, **settings)) == []


def test_what_hidden_nan_does_is_said_and_is_a_fault_where_that_is_asked_for() -> None:
    kernel = user("right")
    for family in ("hidden-nan", "hidden-nan+window"):
        (said,) = found(kernel, asked(family))
        assert (
            faults_of(said, "") == []
            and "NaN and Inf in keys that no row sees reach its result" in said.contract
        )
        assert said.severity == 0
        (strict,) = found(kernel, asked(family, strict=True))
        assert faults_of(strict, "") and not strict.contract


def test_eager_bears_nan_before_the_window_of_the_shortest_row() -> None:
    (evidence,) = found(EagerKernel("eager", TileOptions()), asked("hidden-nan+window", strict=True))
    assert evidence.measures is not None and evidence.measures.budget <= 1


def test_a_shape_has_its_own_options() -> None:
    clock = StageClock(CPU)
    for inputs in all_inputs(asked("gaussian", shapes=("gpt-oss@8", "gpt-oss-full@8")), CPU, clock):
        shape = shape_named(inputs.shape)
        call = inputs.call  # type: ignore[union-attr]
        assert call.sinks is not None and call.sliding_window == shape.sliding_window
    (inputs,) = all_inputs(asked("window", shapes=("gpt-oss@8",)), CPU, clock)
    assert inputs.call.sliding_window == 128  # type: ignore[union-attr]


def test_calls_have_the_sizes_that_are_asked_for() -> None:
    settings = asked("gaussian", **PREFILL, n_q=3, sequences=2, dtype="bf16", rows=8)
    cells = list(all_inputs(settings, CPU, StageClock(CPU)))
    assert len(cells) == count_inputs(settings) == 3
    for cell in cells:
        call = cell.call  # type: ignore[union-attr]
        assert call.q.shape[:2] == (2, 3) and call.q.dtype == torch.bfloat16
        assert call.kv_len.tolist() == [[198, 199, 200], [131, 132, 133]]


def test_all_means_probes_and_every_kind_that_the_path_has() -> None:
    decode, prefill = families_of("all", "decode"), families_of("all", "prefill")
    assert set(prefill) - set(decode) == {"four-tokens"}
    every = {"probes", *ALL_FAMILIES} - set(FORMS)
    assert set(families_of("all", "prefill", hidden=True)) == every
    assert not set(decode) & set(HIDDEN)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "f8"}, "--dtype f8: expected one of f16, bf16, f32"),
        ({"sequences": 0}, "--sequences 0: expected at least 1"),
        ({"n_q": 4}, "--n-q 4: expected at least 1, and --path prefill"),
        ({"family": "four-tokens"}, "--inputs four-tokens: expected --path prefill"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        asked(settings.pop("family", "gaussian"), **settings)


def test_a_finite_mask_is_right_and_what_overcomes_it_is_said() -> None:
    """A mask of -65,504 hides any key of a real cache, and not one that is 60,000 in every number."""
    kernel = user("masks_by_adding")
    assert faults(kernel, asked("gaussian")) == []
    said = found(kernel, asked("hidden-far"))[0]
    assert faults_of(said, "") == [] and "adding a finite number" in said.contract
    assert faults(kernel, asked("hidden-far", strict=True))
    # Not hidden at all shows in anything that is drawn.
    assert faults(user("hides_nothing"), asked("gaussian"))
