import hashlib

import pytest

from verify.data.corpora import WIKITEXT_2_SHA256
from verify.data.errors import CorpusError
from verify.data.rows import DatasetSpec, join_rows, parse_spec


def test_wikitext_rows_give_its_file_to_the_byte(wiki_rows: list[str]):
    assert len(wiki_rows) == 4358
    assert hashlib.sha256(join_rows(wiki_rows).encode()).hexdigest() == WIKITEXT_2_SHA256


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (["a\n", "", "b\n"], "a\n \nb\n"),
        (["", "a\n", ""], " \na\n \n"),
        (["a\n", "b"], "a\nb"),
        (["a\r\n", "b\r\n"], "a\r\nb\r\n"),
        (["a", "b\n", "c"], "a\nb\n\nc"),
        (["a", "", "b"], "a\n\nb"),
        (["", "a"], "\na"),
        (["one"], "one"),
    ],
)
def test_rows_with_line_ends_are_lines_and_others_are_not(rows: list[str], text: str):
    assert join_rows(rows) == text


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("org/name", DatasetSpec("org/name", None, "test", "text")),
        ("org/name:cfg", DatasetSpec("org/name", "cfg", "test", "text")),
        ("org/name:cfg:train:body", DatasetSpec("org/name", "cfg", "train", "body")),
        ("org/name:::body", DatasetSpec("org/name", None, "test", "body")),
    ],
)
def test_specification_fields_and_their_defaults(text: str, spec: DatasetSpec):
    assert parse_spec(text) == spec


@pytest.mark.parametrize("text", ["", ":cfg", "org/name:a:b:c:d"])
def test_specification_of_another_form_is_refused(text: str):
    with pytest.raises(CorpusError, match="ORG/NAME"):
        parse_spec(text)
