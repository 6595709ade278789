"""What `docs/library.md` shows runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import verify

PAGE = Path(__file__).parents[2] / "docs/library.md"


@pytest.mark.slow
def test_every_block_of_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert "would have seen" in capsys.readouterr().out


def test_it_names_everything_that_is_public() -> None:
    page = PAGE.read_text()
    assert [name for name in verify.__all__ if f"verify.{name}" not in page] == []
    # And every keyword that the functions share.
    assert [name for name in verify.CallOptions.__annotations__ if f"`{name}`" not in page] == []
