from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from verify.data.corpora import WIKITEXT_2_SHA256, load_corpus
from verify.data.errors import CorpusError
from verify.data.local import rows_of
from verify.data.rows import DatasetSpec


@pytest.fixture(autouse=True)
def no_network(hub_at: Callable[[str], None], refusing_url: str):
    hub_at(refusing_url)


Save = Callable[[datasets.Dataset, Path], str]


def as_saved_data_set(rows: datasets.Dataset, folder: Path) -> str:
    rows.save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_saved_splits(rows: datasets.Dataset, folder: Path) -> str:
    datasets.DatasetDict({"train": rows.select([0]), "test": rows}).save_to_disk(folder / "splits")
    return str(folder / "splits")


def as_parquet(rows: datasets.Dataset, folder: Path) -> str:
    rows.to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def as_folder(rows: datasets.Dataset, folder: Path) -> str:
    (folder / "set").mkdir()
    rows.to_parquet(folder / "set" / "test-00000-of-00001.parquet")
    return str(folder / "set")


def as_json_lines(rows: datasets.Dataset, folder: Path) -> str:
    rows.to_json(folder / "rows.jsonl")
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize("save", [as_saved_data_set, as_saved_splits, as_parquet, as_folder, as_json_lines])
def test_local_copy_of_wikitext_gives_its_file_to_the_byte(save: Save, wiki_rows: list[str], tmp_path: Path):
    name = save(datasets.Dataset.from_dict({"text": wiki_rows}), tmp_path)
    corpus = load_corpus(name)
    assert corpus.sha256 == WIKITEXT_2_SHA256
    assert (corpus.name, corpus.source, corpus.notice) == (name, "file", None)


def test_split_and_column_are_chosen(tmp_path: Path):
    train = datasets.Dataset.from_dict({"text": ["no"], "body": ["a"]})
    test = datasets.Dataset.from_dict({"text": ["no"], "body": ["no"]})
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "set")
    assert load_corpus(f"{tmp_path / 'set'}::train:body").text == "a"


def test_selected_rows_keep_their_selection():
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).select([2, 0])
    assert rows_of(rows, DatasetSpec("org/name")) == ["c", "a"]


def refusal(name: str) -> str:
    with pytest.raises(CorpusError) as caught:
        load_corpus(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_split_and_column_are_refused_with_those_there_are(tmp_path: Path):
    rows = datasets.Dataset.from_dict({"body": ["a"]})
    datasets.DatasetDict({"train": rows, "dev": rows}).save_to_disk(tmp_path / "set")
    message = refusal(str(tmp_path / "set"))
    assert "split" in message and "train, dev" in message and "'test'" in message
    message = refusal(f"{tmp_path / 'set'}::dev")
    assert "column" in message and "body" in message and "'text'" in message


@pytest.mark.parametrize(("values", "kind"), [(["a", None], "NoneType"), ([1, 2], "int")])
def test_rows_that_are_not_text_are_refused(values: list, kind: str, tmp_path: Path):
    datasets.Dataset.from_dict({"text": values}).save_to_disk(tmp_path / "set")
    message = refusal(str(tmp_path / "set"))
    assert "'text'" in message and kind in message


def test_data_sets_without_text_are_refused(tmp_path: Path):
    with pytest.raises(CorpusError, match="expected rows, found none"):
        rows_of(datasets.Dataset.from_dict({"text": []}), DatasetSpec("org/name"))
    datasets.Dataset.from_dict({"text": [""]}).save_to_disk(tmp_path / "blank")
    assert "expected at least one character" in refusal(str(tmp_path / "blank"))


def test_what_is_no_data_set_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("prose")
    assert "-f FILE" in refusal(str(tmp_path / "a.txt"))
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    assert "a.parquet" in refusal(str(tmp_path / "a.parquet"))
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(str(tmp_path / "empty"))


def test_settings_of_datasets_are_left_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_info()
    refusal(as_parquet(datasets.Dataset.from_dict({"other": ["a"]}), tmp_path))
    assert datasets.config.HF_HUB_OFFLINE is False
    assert datasets.logging.get_verbosity() == datasets.logging.INFO
    datasets.logging.set_verbosity(verbosity)
