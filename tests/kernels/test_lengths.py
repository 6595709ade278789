"""Lengths that are kept are those of the tensor as it is now."""

from __future__ import annotations

import torch

from kernels.lengths import lengths_of


def test_a_tensor_that_is_written_to_is_read_again() -> None:
    kv_len = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    assert lengths_of(kv_len) == ((1, 2, 3, 4), None, 1, 4)
    assert lengths_of(kv_len) is lengths_of(kv_len)
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
