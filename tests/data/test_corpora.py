import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from verify.data import corpora
from verify.data.corpora import check_wikitext_2, load_corpus, read_text_file
from verify.data.errors import CorpusError


def one_line_error(call: Callable[[], object]) -> str:
    with pytest.raises(CorpusError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- text files ---


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"no newline", "no newline"),
        (b"one\n", "one"),
        (b"two\n\n", "two\n"),
        (b"dos\r\nlines\r\n", "dos\r\nlines\r"),
        (b"old\rmac\r", "old\rmac\r"),
        ("\ufeffmark, Grüße, 語, \U0001f642\n".encode(), "\ufeffmark, Grüße, 語, \U0001f642"),
        (b"nul\0 and \x1a\n", "nul\0 and \x1a"),
    ],
)
def test_text_file_is_read_byte_exact_less_one_newline(tmp_path: Path, raw: bytes, text: str):
    path = tmp_path / "some text.txt"
    path.write_bytes(raw)
    corpus = read_text_file(path)
    assert corpus.text == text
    assert (corpus.n_bytes, corpus.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert (corpus.name, corpus.source, corpus.notice) == ("some text.txt", "file", None)


def test_path_of_a_text_file_may_be_a_string(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"x")
    assert read_text_file(str(tmp_path / "a")).text == "x"


def test_wikitext_file_has_the_published_hash(wiki_raw: bytes, tmp_path: Path):
    path = tmp_path / "wiki.test.raw"
    path.write_bytes(wiki_raw)
    corpus = read_text_file(path)
    assert (corpus.n_bytes, corpus.sha256) == (corpora.WIKITEXT_2_BYTES, corpora.WIKITEXT_2_SHA256)
    assert corpus.text.encode() + b"\n" == wiki_raw


@pytest.mark.parametrize(
    ("raw", "offset", "byte"), [(b"ok \xff", 3, "0xff"), ("é".encode() + b"\xc3(", 2, "0xc3")]
)
def test_invalid_utf8_is_refused_with_its_offset(tmp_path: Path, raw: bytes, offset: int, byte: str):
    path = tmp_path / "latin1.txt"
    path.write_bytes(raw)
    message = one_line_error(lambda: read_text_file(path))
    assert str(path) in message and f"byte offset {offset}" in message and byte in message


@pytest.mark.parametrize("raw", [b"", b"\n"])
def test_file_without_text_is_refused(tmp_path: Path, raw: bytes):
    path = tmp_path / "empty.txt"
    path.write_bytes(raw)
    message = one_line_error(lambda: read_text_file(path))
    assert str(path) in message and f"{len(raw)} bytes" in message


def test_missing_file_and_folder_are_refused(tmp_path: Path):
    missing = one_line_error(lambda: read_text_file(tmp_path / "none.txt"))
    assert "none.txt" in missing and "nothing there" in missing
    assert "folder" in one_line_error(lambda: read_text_file(tmp_path))
    assert "readable" in one_line_error(lambda: read_text_file("nul\0in the name"))


# --- names ---


@pytest.mark.parametrize(
    "name", ["", "wikitext-3", "a/b/c", "./gone", "~/gone", "gone.txt", "org/", "/org", "a" * 5000]
)
def test_names_that_mean_nothing_are_refused_without_asking_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpora, "hub_rows", lambda *_, **__: pytest.fail("the hub was asked"))
    assert repr(name) in one_line_error(lambda: load_corpus(name))


def test_named_data_set_is_read_from_the_hub_as_named(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def rows(spec: object, *, timeout_s: float) -> list[str]:
        asked.append((spec, timeout_s))
        return ["one", "two"]

    monkeypatch.setattr(corpora, "hub_rows", rows)
    corpus = load_corpus("org/name:cfg", timeout_s=1.5)
    assert asked == [(corpora.DatasetSpec("org/name", "cfg", "test", "text"), 1.5)]
    assert (corpus.name, corpus.source, corpus.text) == ("org/name:cfg", "hub", "one\ntwo")
    assert corpus.sha256 == hashlib.sha256(b"one\ntwo").hexdigest()


# --- WikiText ---


def test_wikitext_2_is_the_published_file(wiki_rows: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpora, "hub_rows", lambda spec, timeout_s: wiki_rows)
    corpus = load_corpus()
    assert (corpus.name, corpus.source, corpus.notice) == ("wikitext-2", "hub", None)
    assert (corpus.n_bytes, corpus.sha256) == (corpora.WIKITEXT_2_BYTES, corpora.WIKITEXT_2_SHA256)


def test_altered_wikitext_2_is_refused_and_not_replaced(
    wiki_rows: list[str], monkeypatch: pytest.MonkeyPatch
):
    altered = list(wiki_rows)
    altered[1] = altered[1].replace("Robert", "Rupert")
    assert altered != wiki_rows and len(altered[1]) == len(wiki_rows[1])
    monkeypatch.setattr(corpora, "hub_rows", lambda spec, timeout_s: altered)
    message = one_line_error(lambda: load_corpus("wikitext-2"))
    assert message.startswith("wikitext-2") and corpora.WIKITEXT_2_SHA256 in message
    assert load_corpus("wikitext-103").sha256 not in ("", corpora.WIKITEXT_2_SHA256)


def test_wikitext_2_check_names_the_sizes():
    assert "1290590 bytes" in one_line_error(lambda: check_wikitext_2(b"short"))
    assert "got 5 bytes" in one_line_error(lambda: check_wikitext_2(b"short"))


# --- no hub ---


def test_default_falls_back_where_the_hub_is_silent(
    load_in_new_process: Callable[..., dict], silent_url: str
):
    corpus = load_in_new_process(hub=silent_url, timeout_s=1.0)
    assert corpus["source"] == "embedded" and corpus["name"].startswith("embedded:")
    notice = corpus["notice"]
    assert "\n" not in notice
    assert "hub could not be reached" in notice and silent_url in notice
    assert "embedded text is used" in notice and "must not be quoted" in notice


def test_default_falls_back_at_once_where_nobody_listens(hub_at: Callable[[str], None], refusing_url: str):
    hub_at(refusing_url)
    corpus = load_corpus()
    assert corpus.source == "embedded"
    assert corpus.notice is not None and refusing_url in corpus.notice


@pytest.mark.parametrize("name", ["wikitext-103", "org/name", "Salesforce/wikitext:wikitext-2-raw-v1"])
def test_what_the_user_named_is_never_replaced(hub_at: Callable[[str], None], refusing_url: str, name: str):
    hub_at(refusing_url)
    message = one_line_error(lambda: load_corpus(name))
    assert name in message and "could not be reached" in message and "-f FILE" in message


def test_default_is_not_replaced_where_that_is_forbidden(hub_at: Callable[[str], None], refusing_url: str):
    hub_at(refusing_url)
    assert "-f FILE" in one_line_error(lambda: load_corpus(allow_fallback=False))
