"""Lengths are those of the tensor as it is now; what a model owns is read once."""

from __future__ import annotations

import numpy as np
import torch

from verify.kernels.lengths import _kept, keep_lengths, lengths_of


def test_a_tensor_that_is_written_to_is_read_again() -> None:
    kv_len = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    assert lengths_of(kv_len) == ((1, 2, 3, 4), None, 1, 4)
    kv_len[0, 1] = 7
    assert lengths_of(kv_len) == ((1, 7, 3, 4), None, 1, 7)


def test_many_tensors_that_come_and_go() -> None:
    for n in range(200):
        assert lengths_of(torch.full((1, 3), n, dtype=torch.int32)) == ((n, n, n), (n, n, n), n, n)


def test_sequences_of_equal_lengths_are_known() -> None:
    rows = torch.arange(4, dtype=torch.int32)
    assert lengths_of(rows.expand(3, -1)).of_first == (0, 1, 2, 3)
    assert lengths_of(torch.stack((rows, rows.flip(0)))).of_first is None
    assert lengths_of(rows[:0].expand(2, -1)) == ((), (), 0, 0)


def test_memory_that_others_write_to_is_read_each_time() -> None:
    """NumPy's writes move no version of a tensor; tensors of inference mode have none."""
    numbers = np.array([[3]], dtype=np.int32)
    kv_len = torch.from_numpy(numbers)
    assert lengths_of(kv_len).greatest == 3
    numbers[0, 0] = 300
    assert lengths_of(kv_len).greatest == 300
    with torch.inference_mode():
        assert lengths_of(torch.full((1, 2), 5, dtype=torch.int32)).greatest == 5


def test_what_is_kept_goes_with_its_tensor() -> None:
    before = len(_kept)
    kv_len = keep_lengths(torch.ones((2, 3), dtype=torch.int32))
    assert lengths_of(kv_len) is lengths_of(kv_len)
    assert len(_kept) == before + 1
    del kv_len
    assert len(_kept) == before
