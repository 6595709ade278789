"""docs/scale.md: what is computed there is what its scripts compute, and agrees with what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/scale.md"


@pytest.fixture(scope="module")
def scripts() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import scale
        import sliced_oracle

        return {"scale": scale, "sliced_oracle": sliced_oracle}


@pytest.fixture(scope="module")
def measured() -> Any:
    return json.loads((ROOT / "benchmarks/results/h100-glm-layers.json").read_text())


def test_it_says_of_measured_layers_what_was_measured(scripts: Any, measured: Any) -> None:
    scale = scripts["scale"]
    rates = scale.measured_rates(measured)
    for line in scale.checks(measured, rates):
        for figure, most in (("read_bytes", 0.03), ("groups_s", 0.05)):
            said, was = line[figure]
            assert abs(said / was - 1) < most, (line["layers"], figure)
    # One layer of experts by itself: nothing of the first layer's sharing is in it.
    one = scale.MEASURED._replace(layers=1, dense=0, vocabulary=0)
    flop = one.flop(measured["windows"] * measured["n_ctx"] * scale.PASSES)
    assert flop == pytest.approx(measured["layer_flop_without_padding"], rel=0.01)


def test_the_page_has_its_figures(scripts: Any, measured: Any) -> None:
    scale = scripts["scale"]
    rates = scale.measured_rates(measured)
    rows = {row[0]: row[1:] for row in re.findall(r"\| (.*?) \| (\d+) GB \| (.*) \|", PAGE.read_text())}
    for model in scale.MODELS:
        found = scale.of_model(model, rates, 64)["by_type_of_experts"]["Q4_K"]
        size, rest = rows[model.name]
        assert float(size) == round(found["bytes"] / 1e9)
        told = [float(x) for x in rest.split("|")]
        due = [found["reading_s"], *found["seconds_by_gpus"].values()]
        assert told[:-1] == [round(x) for x in due]
        assert told[-1] == pytest.approx(found["gpus_at_which_reading_dominates"], abs=0.06)
        for card in found["cards"].values():
            assert f"{card['seconds']:,.0f}" in PAGE.read_text()


@pytest.mark.parametrize(("index", "agrees"), [(1, False), (3, True)])
def test_seven_slices_of_a_byte_agree_with_float64_and_five_do_not(
    scripts: Any, index: int, agrees: bool
) -> None:
    oracle = scripts["sliced_oracle"]
    kind = oracle.KINDS[index]
    error = oracle.error_of(oracle.Counted(kind), "massive")
    assert (error <= oracle.AGREE) is agrees, kind.name
    stored = json.loads((ROOT / "benchmarks/results/sliced-oracle.json").read_text())
    assert stored["lines"][index]["kind"] == kind.name and stored["lines"][index]["agrees"] is agrees


def test_the_cards_have_the_seconds_of_the_oracle_that_are_counted(scripts: Any) -> None:
    oracle = scripts["sliced_oracle"]
    stored = json.loads((ROOT / "benchmarks/results/sliced-oracle.json").read_text())
    rows = dict(re.findall(r"\| (RTX \d+|H200) \| (.* s \| .* to .*) \|", PAGE.read_text()))
    assert set(rows) == {card.name for card in oracle.CARDS}
    for card in oracle.CARDS:
        built = oracle.built_seconds(card, oracle.LAYER, oracle.LAYER_HEAD)
        assert stored["built"][card.name] == pytest.approx(built)
        float64 = stored["lines"][3]["seconds"][card.name]["float64"]
        told = [float(x) for x in re.findall(r"[\d.]+", rows[card.name].replace("float16", ""))]
        due = [
            float64,
            built["sliced"],
            built["at_most"],
            float64 / built["at_most"],
            float64 / built["sliced"],
        ]
        assert [told[0], *told[3:]] == pytest.approx(due, rel=0.05)
