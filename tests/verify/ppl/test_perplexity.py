from __future__ import annotations

import math

import numpy as np
import pytest

from verify.ppl.perplexity import final_line, perplexity, running_line, running_perplexity


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices() -> None:
    result = perplexity(np.full(10, math.log(7)))
    assert result.ppl == pytest.approx(7)
    assert result.se == pytest.approx(0, abs=1e-6)
    assert result.tokens == 10


def test_the_error_bar_is_that_of_a_mean_of_independent_tokens() -> None:
    nll = np.array([1.0, 2.0, 3.0, 6.0])
    result = perplexity(nll)
    assert result.ppl == pytest.approx(math.exp(3))
    # mean 3, mean square 12.5: sqrt((12.5 - 9) / 3)
    assert result.se == pytest.approx(math.exp(3) * math.sqrt(3.5 / 3))


def test_the_running_value_is_over_all_windows_so_far() -> None:
    nll = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert running_perplexity(nll) == pytest.approx([math.exp(1.5), math.exp(2.5)])


def test_lines_are_laid_out_as_llama_perplexity_prints_them() -> None:
    assert running_line([12.9562, 21.37524], 0) == "[1]12.9562,[2]21.3752,"
    assert running_line([5.0], 6) == "[7]5.0000,"
    result = perplexity(np.array([3.0, 3.2]))
    line = final_line(result, n_ctx=512, windows=4)
    assert line == f"Final estimate: PPL over 4 chunks for n_ctx=512 = {result.ppl:.4f} +/- {result.se:.5f}"


def test_nothing_and_nan_stay_visible() -> None:
    assert math.isnan(perplexity(np.array([])).ppl)
    assert math.isnan(perplexity(np.array([1.0, math.nan])).ppl)
    assert perplexity(np.array([1e4, 1e4])).ppl == math.inf
