"""Rows of a data set on the Hugging Face hub: from the local cache at once, else over the network, else a
reason in good time.

`datasets` alone tries an unreachable hub again and again, whatever number of retries it is given: for 24 s
where nobody listens, and for minutes where nobody answers. So the hub is asked one cheap question first,
under a deadline; only a download that has begun may take as long as it takes.
"""

import threading
from typing import Any

from verify.data.errors import one_line
from verify.data.local import load_quietly, rows_of, without_network
from verify.data.rows import DatasetSpec

_PROXY_WANTS_LOGIN = 407


class HubUnavailable(Exception):
    """The hub gave no rows. The message is a clause: `the Hugging Face hub could not be reached (REASON)`."""


def hub_rows(spec: DatasetSpec, *, timeout_s: float) -> list[str]:
    """The rows of `spec`, in order.

    A copy in the local cache is used without asking the network, which an environment variable may forbid:
    both are known to `datasets`. Otherwise the hub has `timeout_s` seconds, from when it is asked, to give a
    sign of life. `datasets` keeps what it downloads, and downloads all splits of a configuration to read one.

    Raises HubUnavailable where the hub does not answer or the download fails; CorpusError where the data set
    was read and has no such split, no such column, or values that are not text.
    """
    return rows_of(_find(spec, timeout_s), spec)


def _find(spec: DatasetSpec, timeout_s: float) -> Any:
    import datasets

    with load_quietly(datasets):
        try:
            with without_network(datasets):
                return datasets.load_dataset(spec.path, spec.config)
        except Exception as error:
            # Not there, another configuration, or not whole.
            not_cached = one_line(error)
        if datasets.config.HF_HUB_OFFLINE:
            raise HubUnavailable(
                "the Hugging Face hub could not be reached (HF_HUB_OFFLINE or its like is set), nor its local"
                f" cache read ({not_cached})"
            )
        if silence := why_unreachable(spec.path, timeout_s):
            raise HubUnavailable(f"the Hugging Face hub could not be reached ({silence})")
        try:
            return datasets.load_dataset(spec.path, spec.config)
        except Exception as error:
            raise HubUnavailable(
                f"nothing could be loaded from the Hugging Face hub ({one_line(error)})"
            ) from error


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
