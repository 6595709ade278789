"""Text of any size: the same ids in pieces of any size, and memory that does not grow with it."""

from __future__ import annotations

import hashlib
import random
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import pytest

from support.tiny_model import byte_symbols, write_text, write_tiny_model
from verify.data import CorpusError, LongText, read_any_text
from verify.data.embedded import embedded_corpus
from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile
from verify.model.text_cuts import encode_in_pieces, slices
from verify.model.tokenizer import Tokenizer

WAYS = ["smollm", "gpt-2", "default", "llama-bpe", "qwen2", "qwen35", "deepseek-v3"]
ODD = (
    " the  the\n\n\nthe_the.the...The the's 1234567 12 345 the,the -- the\r\n\tthe  \n x",
    "你好，世界。これは文章です。一二三 the 四五六, привет мир e\u0301 the\u00a0the 🙂🙂 the",
    "<|own|>the<|own|> the <|own|> <s> the</s>the",
)


def bpe(folder: Path, pre: str) -> Tokenizer:
    """Merges of pairs that a corpus has, so that there is something to cut wrongly, and an own token."""
    symbols = byte_symbols()
    pairs = [
        "t h",
        "th e",
        "Ġ th",
        "Ġth e",
        "e n",
        "i n",
        "Ġ t",
        "o n",
        "1 2",
        "3 4",
        ". .",
        "Ġ Ġ",
        "Ċ Ċ",
        "e r",
    ]
    made = list(dict.fromkeys(pair.replace(" ", "") for pair in pairs))
    writer = gguf.GGUFWriter(folder / f"{pre}.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = [*symbols, *made, "<|own|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [4])
    writer.add_token_merges(pairs)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    return written(writer, folder / f"{pre}.gguf")


def sentence_piece(folder: Path, *, prefixed: bool) -> Tokenizer:
    path = folder / f"spm-{prefixed}.gguf"
    letters = sorted(set("the quick brown fox jumps over lazy dog.,\n0123456789TSaeiounw_-") - {" "})
    words = ["▁", *letters, "th", "the", "▁th", "▁the", "▁t", "in", "on", "er", "▁▁", "e▁", "▁o", "of", "▁of"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, "<|own|>"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(words), 4]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(words))] + [0.0])
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(prefixed)
    return written(writer, path)


def written(writer: gguf.GGUFWriter, path: Path) -> Tokenizer:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file)


@pytest.fixture(scope="module")
def prose() -> str:
    """Prose, and what is awkward in between, in an order that a seed gives."""
    draw, parts = random.Random(3), []
    words = embedded_corpus().text[:60_000].split("\n")
    for line in words:
        parts.append(line)
        if draw.random() < 0.2:
            parts.append(draw.choice(ODD) * draw.randint(1, 3))
    return "\n".join(parts)


@pytest.fixture(scope="module", params=[*WAYS, "spm", "spm without prefix"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param.startswith("spm"):
        return sentence_piece(folder, prefixed=request.param == "spm")
    return bpe(folder, request.param)


def test_pieces_of_every_size_give_the_ids_of_the_whole(tokenizer: Tokenizer, prose: str) -> None:
    whole = tokenizer._encode(prose)
    for piece in (2048, 5003, 20_011):
        found, all_of_it = tokenizer.encode_texts(slices(prose, 777), piece=piece)
        assert all_of_it
        assert np.array_equal(found, whole), piece


def test_it_stops_once_there_is_enough(tokenizer: Tokenizer, prose: str) -> None:
    read = []

    def texts() -> Iterable[str]:
        for part in slices(prose, 1000):
            read.append(part)
            yield part

    found, all_of_it = tokenizer.encode_texts(texts(), enough=500, piece=4096)
    assert not all_of_it and len(found) >= 500
    assert sum(map(len, read)) < 12_000
    assert np.array_equal(found, tokenizer._encode(prose)[: len(found)])


def test_a_text_without_a_place_to_cut_stays_whole_and_has_an_end(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("x" * 30_000, "7" * 30_001, " " * 30_000, "\n" * 9_000):
        found, all_of_it = tokenizer.encode_texts(slices(text, 1000), piece=2048)
        assert all_of_it and np.array_equal(found, tokenizer._encode(text))
    monkeypatch.setattr("verify.model.text_cuts.LONGEST_PIECE", 8192)
    with pytest.raises(ModelError, match="no place to be cut"):
        tokenizer.encode_texts(slices("x" * 30_000, 1000), piece=2048)


def test_a_cut_that_would_change_a_token_is_not_made() -> None:
    """A vocabulary that nothing can be cut in: every letter pair across a space is one token."""

    def encode(text: str) -> np.ndarray:
        return np.array([len(text)], dtype=np.int32)

    found, _ = encode_in_pieces(slices("ab cd " * 2000, 100), encode, piece=2048)
    assert found.tolist() == [12_000]


@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "\r\n", "é", "\n🙂"])
def test_a_long_file_is_the_text_that_a_short_one_is(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(("naïve café 🙂\n" * 3000 + ending).encode())
    held, streamed = read_any_text(path), read_any_text(path, most=100)
    assert isinstance(streamed, LongText)
    assert (streamed.name, streamed.n_bytes, streamed.sha256) == (held.name, held.n_bytes, held.sha256)
    for letters in (7, 4096):
        assert "".join(streamed.pieces(letters)) == "".join(held.pieces(letters))


def test_what_is_no_text_is_refused_at_its_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    monkeypatch.setattr("verify.data.long_text._READ_BYTES", 10)
    for at, bad in ((0, b"\xff"), (9, b"\xc3"), (23, b"\xe2\x82"), (10, b"\x80")):
        path.write_bytes(b"x" * at + bad + b"y" * 20)
        for most in (1 << 20, 1):
            with pytest.raises(CorpusError, match=f"byte 0x{bad[0]:02x} at byte offset {at}"):
                read_any_text(path, most=most)
    path.write_bytes(b"x" * 9 + b"\xc3")
    with pytest.raises(CorpusError, match="at byte offset 9"):
        read_any_text(path, most=1)


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("a text\n" * 100)
    text = read_any_text(path, most=1)
    path.write_text("another\n" * 100)
    with pytest.raises(CorpusError, match="changed while it was read"):
        list(text.pieces(10))


def test_a_device_is_no_text() -> None:
    with pytest.raises(CorpusError, match="found a device"):
        read_any_text("/dev/zero")


_MEASURED = """
import resource, sys
from verify.__main__ import main
sys.argv = ["verify", *sys.argv[1:]]
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_text_of_a_gigabyte_with_four_windows(tmp_path: Path) -> None:
    """Under 1.5 GB of memory."""
    text, prose = tmp_path / "text", write_text(tmp_path / "short").read_bytes() + b"\n"
    digest = hashlib.sha256()
    with text.open("wb") as file:
        block = prose * ((1 << 24) // len(prose))
        for _ in range(64):
            file.write(block)
            digest.update(block)
    model = write_tiny_model(tmp_path / "tiny.gguf")
    words = ["ppl", "-m", str(model), "-f", str(text), "-c", "64", "--chunks", "4", "--device", "cpu"]
    words += ["--baseline", "eager", "--candidate", "eager:block=16", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *words], capture_output=True, text=True, timeout=500, check=False
    )
    text.unlink()
    assert done.returncode in (0, 3), done.stderr
    kilobytes = int(done.stderr.split()[-1])
    assert kilobytes * 1024 < 1.5e9, kilobytes
    assert digest.hexdigest() in (tmp_path / "run/run.json").read_text()


def test_memory_of_tokenising_is_bounded(tmp_path: Path) -> None:
    """3 MB of text: at 128 bytes a byte it would take 400 MB."""
    tokenizer = bpe(tmp_path, "llama-bpe")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part = "the quick brown fox, the 12 345 foxes. " * 300
    found, _ = tokenizer.encode_texts((part for _ in range(1000)), enough=500_000)
    assert len(found) >= 500_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000
