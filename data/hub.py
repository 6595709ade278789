"""Rows of a data set on the Hugging Face hub: from the local cache at once, else over the network, else a
reason in good time.

`datasets` alone tries an unreachable hub again and again for more than 20 s. So the hub is asked one cheap
question first, under a deadline; only a download that has begun may take as long as it takes.
"""

import os
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from verify.data.errors import one_line
from verify.data.local import load_quietly, rows_of, without_network
from verify.data.rows import DatasetSpec

_TRUE = {"1", "ON", "YES", "TRUE"}

# Of the time before the fallback, the share spent waiting for an answer; the rest pays for what comes
# around it.
_WAITING_SHARE = 0.8

_PROXY_WANTS_LOGIN = 407


class HubUnavailable(Exception):
    """The hub gave no rows. The message is a clause: `the Hugging Face hub could not be reached (REASON)`."""


def hub_rows(spec: DatasetSpec, *, timeout_s: float) -> list[str]:
    """The rows of `spec`, in order.

    A copy in the local cache is used without asking the network. Otherwise the hub has `timeout_s` seconds,
    from the call on, to give a sign of life. `datasets` keeps what it downloads, and downloads all splits
    of a configuration to read one.

    Raises HubUnavailable where the hub does not answer or the download fails; CorpusError where the data set
    was read and has no such split, no such column, or values that are not text.
    """
    return rows_of(_find(spec, time.monotonic() + timeout_s), spec)


def _find(spec: DatasetSpec, deadline: float) -> Any:
    offline = offline_variable()
    if is_cached(spec):
        try:
            return _load(spec, offline=True)
        except Exception as error:
            # The cache holds something of this name, but not this configuration or not whole: ask the hub.
            if offline:
                raise HubUnavailable(
                    f"the Hugging Face hub could not be reached ({offline} is set), "
                    f"nor its local cache read ({one_line(error)})"
                ) from error
    if offline:
        raise HubUnavailable(
            f"the Hugging Face hub could not be reached "
            f"({offline} is set, and {spec.path} is not in the local cache)"
        )
    silence = why_unreachable(spec.path, (deadline - time.monotonic()) * _WAITING_SHARE)
    if silence:
        raise HubUnavailable(f"the Hugging Face hub could not be reached ({silence})")
    try:
        return _load(spec, offline=False)
    except Exception as error:
        raise HubUnavailable(
            f"nothing could be loaded from the Hugging Face hub ({one_line(error)})"
        ) from error


def offline_variable() -> str | None:
    """The environment variable that forbids the network, or None. `datasets` gives its own the last word."""
    own = os.environ.get("HF_DATASETS_OFFLINE")
    if own is not None:
        return "HF_DATASETS_OFFLINE" if own.upper() in _TRUE else None
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in _TRUE:
            return name
    return None


def is_cached(spec: DatasetSpec) -> bool:
    """Whether the cache of `datasets` has a folder for this data set and configuration: worth a look inside.

    Told without importing `datasets`, which takes a second or more.
    """
    wanted = _folded(spec.path.replace("/", "___"))
    root = _cache_root()
    try:
        if not root.is_dir():
            return False
        return any(
            any(folder.glob("*/*/dataset_info.json"))
            for folder in (
                config
                for owner in root.iterdir()
                if _folded(owner.name) == wanted
                for config in owner.glob("*")
            )
            if spec.config is None or folder.name == spec.config
        )
    except OSError:
        return False


def why_unreachable(repo: str, timeout_s: float) -> str | None:
    """None where the hub's address answers a question about `repo` within `timeout_s` seconds; else why not.

    The question goes the way the download would go (the endpoint, proxies and certificates that
    huggingface_hub is set to). Any answer counts, a refusal too: what the hub thinks of `repo` is for the
    download to find out.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    verdicts: list[str | None] = []

    def ask() -> None:
        try:
            url = f"{constants.ENDPOINT}/api/datasets/{repo}"
            status = get_session().head(url, timeout=max(timeout_s, 0.01)).status_code
        except Exception as error:
            verdicts.append(f"{constants.ENDPOINT}: {one_line(error)}")
        else:
            # These come from a proxy, or from a front of the hub with nothing behind it.
            dead = status >= 500 or status == _PROXY_WANTS_LOGIN
            verdicts.append(f"{constants.ENDPOINT}: HTTP status {status}" if dead else None)

    # In a thread because a socket's timeout does not cover the look-up of a name, which alone can take 30 s.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(max(timeout_s, 0.01))
    return verdicts[0] if verdicts else f"{constants.ENDPOINT}: no answer in {max(timeout_s, 0.0):.1f} s"


def _load(spec: DatasetSpec, *, offline: bool) -> Any:
    import datasets

    with load_quietly(datasets), without_network(datasets) if offline else nullcontext():
        return datasets.load_dataset(spec.path, spec.config)


def _cache_root() -> Path:
    loaded = sys.modules.get("datasets")
    if loaded is not None:
        return Path(loaded.config.HF_DATASETS_CACHE).expanduser()
    named = os.environ.get("HF_DATASETS_CACHE")
    if named:
        return Path(named).expanduser()
    from huggingface_hub import constants

    return Path(constants.HF_HOME).expanduser() / "datasets"


def _folded(name: str) -> str:
    # The cache spells WikiText wiki_text; without case and underscores both are the same.
    return name.replace("_", "").lower()
