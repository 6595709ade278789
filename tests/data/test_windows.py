import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verify.data.errors import CorpusError
from verify.data.windows import cut_windows

BOS = 1_000_000


def test_wikitext_2_gives_the_known_number_of_windows():
    windows = cut_windows(np.arange(303_415), n_ctx=512)
    assert windows.tokens.shape == (592, 512) and windows.n_windows == 592
    assert windows.tokens.dtype == np.int32
    assert windows.n_tokens_total == 303_415
    assert windows.first_scored == 256
    assert windows.scored_per_window == 255
    assert windows.scored_positions == range(256, 511)
    assert windows.targets.shape == (592, 255)


@pytest.mark.parametrize(
    ("n_ctx", "first", "scored"),
    [(4, 2, 1), (5, 2, 2), (7, 3, 3), (8, 4, 3), (511, 255, 255), (512, 256, 255)],
)
def test_scored_half_of_even_and_odd_windows(n_ctx: int, first: int, scored: int):
    windows = cut_windows(range(2 * n_ctx), n_ctx=n_ctx)
    assert (windows.first_scored, windows.scored_per_window) == (first, scored)
    assert list(windows.scored_positions) == list(range(first, n_ctx - 1))
    assert windows.targets.shape == (2, scored)


def test_target_is_the_token_after_each_scored_position():
    windows = cut_windows([100 + i for i in range(15)], n_ctx=5)
    assert windows.tokens.tolist() == [
        [100, 101, 102, 103, 104],
        [105, 106, 107, 108, 109],
        [110, 111, 112, 113, 114],
    ]
    assert windows.targets.tolist() == [[103, 104], [108, 109], [113, 114]]


def test_bos_precedes_the_text_and_overwrites_every_first_token():
    windows = cut_windows(range(10, 22), n_ctx=4, bos_id=1)
    assert windows.tokens.tolist() == [[1, 10, 11, 12], [1, 14, 15, 16], [1, 18, 19, 20]]
    assert windows.text_tokens.tolist() == [[1, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20]]
    assert windows.targets.tolist() == [[12], [16], [20]]
    assert windows.n_tokens_total == 13


def test_bos_counts_as_a_token_of_the_text():
    assert cut_windows(range(7), n_ctx=4, bos_id=9).n_windows == 2
    with pytest.raises(CorpusError):
        cut_windows(range(7), n_ctx=4)


def test_bos_of_id_zero_is_a_bos():
    windows = cut_windows([5] * 8, n_ctx=4, bos_id=0)
    assert windows.tokens.tolist() == [[0, 5, 5, 5], [0, 5, 5, 5]]
    assert windows.n_tokens_total == 9


@pytest.mark.parametrize(("chunks", "n_windows"), [(-1, 3), (1, 1), (2, 2), (3, 3), (4, 3), (10**9, 3)])
def test_chunks_caps_the_windows(chunks: int, n_windows: int):
    windows = cut_windows(range(14), n_ctx=4, chunks=chunks)
    assert windows.tokens.tolist() == np.arange(4 * n_windows).reshape(-1, 4).tolist()
    assert windows.n_tokens_total == 14


def test_short_text_is_refused_with_both_numbers():
    assert cut_windows(range(1024), n_ctx=512).n_windows == 2
    with pytest.raises(CorpusError, match=r"at least 1024 .*got 1023"):
        cut_windows(range(1023), n_ctx=512, chunks=1)
    with pytest.raises(CorpusError, match=r"at least 8 .*got 0"):
        cut_windows([], n_ctx=4)


@pytest.mark.parametrize("chunks", [0, -2])
def test_chunks_that_mean_nothing_are_refused(chunks: int):
    with pytest.raises(CorpusError, match=f"chunks: .*got {chunks}"):
        cut_windows(range(100), n_ctx=4, chunks=chunks)


@pytest.mark.parametrize("n_ctx", [3, 0, -1])
def test_windows_too_small_to_score_are_refused(n_ctx: int):
    with pytest.raises(CorpusError, match=f"n_ctx: .*got {n_ctx}"):
        cut_windows(range(100), n_ctx=n_ctx)


@pytest.mark.parametrize("ids", [[0.5] * 8, np.zeros((16, 4), int), [-1] * 8, [2**31] * 8, ["a"] * 8])
def test_what_cannot_be_token_ids_is_refused(ids: object):
    with pytest.raises(CorpusError, match="tokens: expected i"):
        cut_windows(ids, n_ctx=4)  # type: ignore[arg-type]


def test_windows_do_not_share_memory_with_the_tokens():
    ids = np.arange(8, dtype=np.int32)
    windows = cut_windows(ids, n_ctx=4, bos_id=7)
    windows.tokens[:] = -5
    assert ids.tolist() == list(range(8))
    plain = cut_windows(ids, n_ctx=4)
    plain.tokens[:] = -5
    assert ids.tolist() == list(range(8))


@given(
    n_ctx=st.integers(4, 40),
    n_tokens=st.integers(80, 400),
    chunks=st.sampled_from([-1, 1, 2, 3, 1000]),
    bos=st.booleans(),
)
def test_windows_cover_a_prefix_once_and_leave_less_than_one_window(
    n_ctx: int, n_tokens: int, chunks: int, bos: bool
):
    ids = list(range(n_tokens))
    windows = cut_windows(ids, n_ctx=n_ctx, chunks=chunks, bos_id=BOS if bos else None)
    text = [BOS, *ids] if bos else ids

    # One after the other the windows are the text: none overlaps, nothing between two is left out.
    flat = windows.text_tokens.ravel().tolist()
    assert flat == text[: len(flat)]
    if chunks == -1:
        assert len(text) - len(flat) < n_ctx
    else:
        assert windows.n_windows == min(chunks, len(text) // n_ctx)

    # Evaluated and text windows differ in position 0 at most, and targets are the text's.
    assert (windows.tokens[:, 1:] == windows.text_tokens[:, 1:]).all()
    assert not bos or (windows.tokens[:, 0] == BOS).all()
    for window in range(windows.n_windows):
        after = [text[window * n_ctx + position + 1] for position in windows.scored_positions]
        assert windows.targets[window].tolist() == after
