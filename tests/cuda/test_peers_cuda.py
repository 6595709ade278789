"""Kernels of other libraries on the device, against the oracle. FlexAttention compiles: one shape alone."""

from __future__ import annotations

import pytest
import torch

from support.peer_checks import agrees_with_exact
from verify.kernels.catalogue import LIBRARY_CAPABILITIES
from verify.kernels.here import why_not_library

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")


@pytest.mark.parametrize("variant", ["flash", "cudnn", "math", "efficient"])
def test_every_backend_of_sdpa(variant: str) -> None:
    agrees_with_exact(f"sdpa:{variant}", CUDA)


def test_flex_is_compiled_and_returns_a_natural_lse() -> None:
    kernel = agrees_with_exact("flex", CUDA)
    assert kernel.notes == []


@pytest.mark.parametrize("name", LIBRARY_CAPABILITIES)
def test_libraries(name: str) -> None:
    reason = why_not_library(name)
    if reason is not None:
        pytest.skip(reason)
    agrees_with_exact(name, CUDA)
