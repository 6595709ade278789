import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from verify.data import hub
from verify.data.corpora import WIKITEXT_2_SHA256
from verify.data.hub import HubUnavailable, hub_rows, is_cached, offline_variable, why_unreachable
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
    assert warm["seconds"] < 5.0


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


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_variable_is_obeyed(
    hub_at: Callable[[str], None], fake_hub: Any, monkeypatch: pytest.MonkeyPatch, variable: str
):
    hub_at(fake_hub.url)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(HubUnavailable, match=f"{variable} is set"):
        hub_rows(WIKITEXT_2, timeout_s=5.0)
    assert fake_hub.requests == []


def test_offline_variable_of_datasets_has_the_last_word(empty_cache: Path, monkeypatch: pytest.MonkeyPatch):
    assert offline_variable() is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    assert offline_variable() == "HF_HUB_OFFLINE"
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    assert offline_variable() is None


def test_cache_is_told_by_data_set_and_configuration(empty_cache: Path):
    assert not is_cached(WIKITEXT_2)
    (empty_cache / "Salesforce___wikitext/wikitext-2-raw-v1/0.0.0/abc").mkdir(parents=True)
    assert not is_cached(WIKITEXT_2), "a folder without a finished data set in it"
    (empty_cache / "Salesforce___wikitext/wikitext-2-raw-v1/0.0.0/abc/dataset_info.json").write_text("{}")
    assert is_cached(WIKITEXT_2)
    assert is_cached(DatasetSpec("Salesforce/wikitext"))
    assert is_cached(DatasetSpec("Salesforce/WikiText")), "the cache folds the case of names"
    assert not is_cached(DatasetSpec("Salesforce/wikitext", "wikitext-103-raw-v1"))
    assert not is_cached(DatasetSpec("Salesforce/wiki", "wikitext-2-raw-v1"))


def test_spoilt_cache_leads_to_the_hub(
    hub_at: Callable[[str], None], fake_hub: Any, monkeypatch: pytest.MonkeyPatch
):
    hub_at(fake_hub.url)
    monkeypatch.setattr(hub, "is_cached", lambda spec: True)
    tried = []

    def load(spec: DatasetSpec, *, offline: bool) -> dict:
        tried.append(offline)
        if offline:
            raise ValueError("half of it is gone")
        import datasets

        return datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["row"]})})

    monkeypatch.setattr(hub, "_load", load)
    assert hub_rows(WIKITEXT_2, timeout_s=5.0) == ["row"]
    assert tried == [True, False]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnavailable, match="half of it is gone"):
        hub_rows(WIKITEXT_2, timeout_s=5.0)


def test_download_that_fails_gives_its_reason_in_one_line(
    hub_at: Callable[[str], None], fake_hub: Any, monkeypatch: pytest.MonkeyPatch
):
    hub_at(fake_hub.url)

    def load(spec: DatasetSpec, *, offline: bool) -> None:
        raise RuntimeError("storage is down\nand more")

    monkeypatch.setattr(hub, "_load", load)
    with pytest.raises(HubUnavailable, match=r"\(RuntimeError: storage is down\)$"):
        hub_rows(WIKITEXT_2, timeout_s=5.0)
