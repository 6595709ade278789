import hashlib
import platform
import random
import sys

import pytest

from verify.data.embedded import embedded_corpus
from verify.data.errors import CorpusError


def test_name_says_which_text_it_is():
    corpus = embedded_corpus()
    assert corpus.source == "embedded"
    assert (
        corpus.name
        == f"embedded:pydoc_data.topics ({platform.python_implementation()} {platform.python_version()})"
    )


def test_text_is_prose_and_long_enough_for_many_windows():
    text = embedded_corpus().text
    # Well over 20 windows of 512 tokens at some 4 characters a token.
    assert len(text) > 20 * 512 * 4
    assert text.count(" the ") > 1000


def test_hash_and_size_are_of_the_text_with_its_newline():
    corpus = embedded_corpus()
    raw = corpus.text.encode("utf-8") + b"\n"
    assert (corpus.n_bytes, corpus.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())


def test_text_does_not_depend_on_the_order_of_the_topics(monkeypatch: pytest.MonkeyPatch):
    from pydoc_data import topics

    before = embedded_corpus()
    shuffled = list(topics.topics.items())
    random.Random(0).shuffle(shuffled)
    monkeypatch.setattr(topics, "topics", dict(shuffled))
    assert embedded_corpus() == before


def test_every_topic_is_there():
    from pydoc_data.topics import topics

    text = embedded_corpus().text
    assert all(topic.strip("\n") in text for topic in topics.values())


def test_notice_is_carried():
    assert embedded_corpus().notice is None
    assert embedded_corpus(notice="do not quote").notice == "do not quote"


def test_python_without_its_topics_gives_one_clear_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CorpusError, match=r"pydoc_data.*-f FILE"):
        embedded_corpus()
