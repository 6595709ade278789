"""The flash kernel on a CUDA device keeps every law."""

from __future__ import annotations

import pytest

from support.subjects import assert_keeps
from verify.laws import LAWS, Law, subject_of

pytestmark = pytest.mark.cuda
SPECS = ["flash", "flash:p=bf16,kv=3,block=32", "flash:cache=q8_0", "flash:heads=split,kv=auto,out=f16"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_flash_keeps(law: Law, spec: str) -> None:
    assert_keeps(law, subject_of(spec, "cuda"))
