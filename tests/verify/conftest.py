"""Fixtures of the tool's tests."""

from __future__ import annotations

import pytest

from support.ppl_runs import Tiny, write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny model and a text for it."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))
