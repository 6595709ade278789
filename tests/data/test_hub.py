import time
from collections.abc import Callable
from typing import Any

import datasets
import pytest

from verify.data.corpora import WIKITEXT_2_SHA256
from verify.data.hub import HubUnavailable, hub_rows, why_unreachable
from verify.data.rows import DatasetSpec

WIKITEXT_2 = DatasetSpec("Salesforce/wikitext", "wikitext-2-raw-v1")


def test_slow_download_is_finished_and_then_read_without_a_network(
    load_in_new_process: Callable[..., dict], fake_hub: Any, wiki_rows: list[str], silent_url: str
):
    fake_hub.serve_wikitext(wiki_rows)
    fake_hub.delay_s = 2.5
    cold = load_in_new_process(hub=fake_hub.url, timeout_s=2.0)
    assert (cold["source"], cold["sha256"], cold["notice"]) == ("hub", WIKITEXT_2_SHA256, None)
    assert cold["seconds"] > fake_hub.delay_s, "the file came before it was sent"

    warm = load_in_new_process(hub=silent_url)
    assert (warm["source"], warm["sha256"], warm["notice"]) == ("hub", WIKITEXT_2_SHA256, None)


@pytest.mark.parametrize("status", [200, 401, 404, 429])
def test_a_hub_that_answers_is_reachable(hub_at: Callable[[str], None], fake_hub: Any, status: int):
    hub_at(fake_hub.url)
    fake_hub.status = status
    assert why_unreachable("org/name", 5.0) is None
    assert fake_hub.requests == ["/api/datasets/org/name"]


@pytest.mark.parametrize("status", [407, 502, 503, 504])
def test_a_proxy_that_answers_for_a_hub_is_not_the_hub(
    hub_at: Callable[[str], None], fake_hub: Any, status: int
):
    hub_at(fake_hub.url)
    fake_hub.status = status
    assert str(status) in (why_unreachable("org/name", 5.0) or "")


def test_deadline_holds_where_the_socket_timeout_does_not(monkeypatch: pytest.MonkeyPatch):
    class SlowNames:
        def head(self, url: str, timeout: float) -> None:
            time.sleep(2.0)

    monkeypatch.setattr("huggingface_hub.utils.get_session", SlowNames)
    start = time.monotonic()
    assert "no answer in 0.2 s" in (why_unreachable("org/name", 0.2) or "")
    assert time.monotonic() - start < 1.0


def test_where_the_network_is_forbidden_nobody_is_asked(
    hub_at: Callable[[str], None], fake_hub: Any, monkeypatch: pytest.MonkeyPatch
):
    hub_at(fake_hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE or its like is set"):
        hub_rows(WIKITEXT_2, timeout_s=5.0)
    assert fake_hub.requests == []


def test_spoilt_cache_leads_to_the_hub(
    hub_at: Callable[[str], None], fake_hub: Any, monkeypatch: pytest.MonkeyPatch
):
    hub_at(fake_hub.url)
    tried = []

    def load(path: str, config: str | None) -> datasets.DatasetDict:
        tried.append(datasets.config.HF_HUB_OFFLINE)
        if datasets.config.HF_HUB_OFFLINE:
            raise ValueError("half of it is gone")
        return datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["row"]})})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert hub_rows(WIKITEXT_2, timeout_s=5.0) == ["row"]
    assert tried == [True, False]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailable, match="half of it is gone"):
        hub_rows(WIKITEXT_2, timeout_s=5.0)


def test_download_that_fails_gives_its_reason_in_one_line(
    hub_at: Callable[[str], None], fake_hub: Any, monkeypatch: pytest.MonkeyPatch
):
    hub_at(fake_hub.url)

    def load(path: str, config: str | None) -> None:
        raise RuntimeError("storage is down\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(HubUnavailable, match=r"\(RuntimeError: storage is down\)$"):
        hub_rows(WIKITEXT_2, timeout_s=5.0)
