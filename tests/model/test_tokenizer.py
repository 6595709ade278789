from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
from support.tiny_model import byte_symbols, write_tiny_model

from model.errors import ModelError
from model.gguf_file import GGUFFile
from model.pretokenizers import PRETOKENIZERS
from model.tokenizer import Tokenizer

AWKWARD = [
    "",
    "\n",
    "\n\n \n",
    "one\r\ntwo\r\n",
    "  leading and   inner spaces ",
    "tabs\tand\x0bothers\u00a0too\u3000wide",
    "Löwe, naïve, Ærø, 東京タワー, العربية, हिन्दी, 🦁🏽",
    "e\u0301 is not \u00e9",
    "1234567890 3.14159 1,000,000 ½ ٣",
    "don't I'LL we've THEY'RE 's",
    "<|im_start|>user<|im_end|><|endoftext|>",
    "supercalifragilistic" * 40,
    "!!!???...--==>>[[]]{}\n\n\n)",
    "def f(x):\n    return x ** 2  # ok\n",
    "\x00\x01\x7f",
]


@pytest.fixture(scope="module")
def smollm_tokenizer(smollm: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile.open(smollm))


def test_the_whole_of_wikitext_has_the_published_ids(smollm_tokenizer: Tokenizer, wikitext: Path) -> None:
    text = wikitext.read_bytes().decode().removesuffix("\n")
    ids = smollm_tokenizer.encode(text)
    assert len(ids) == 303_415
    digest = hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
    assert digest == "5fd07bf3ef5c0ba1127c83f35687eded0e7c6b5d6f85e8426ad262fb04ed9725"


def by_hand(text: str, expressions: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding in a few lines: cut, spell as byte symbols, merge while a pair can be."""
    symbols = byte_symbols()
    pieces = [text]
    for expression in expressions:
        cut: list[str] = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(expression, piece):
                cut += [piece[end : match.start()], match.group()]
                end = match.end()
            cut.append(piece[end:])
        pieces = [piece for piece in cut if piece]
    found: list[str] = []
    for piece in pieces:
        word = [symbols[b] for b in piece.encode()]
        while len(word) > 1:
            ranks = [merges.get((a, b), 1 << 30) for a, b in itertools.pairwise(word)]
            best = min(ranks)
            if best == 1 << 30:
                break
            at = ranks.index(best)
            word[at : at + 2] = [word[at] + word[at + 1]]
        found += word
    return found


@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_awkward_texts_agree_with_a_plain_loop(smollm: Path, smollm_tokenizer: Tokenizer, text: str) -> None:
    file = GGUFFile.open(smollm)
    merges = {tuple(m.split(" ", 1)): i for i, m in enumerate(file.metadata["tokenizer.ggml.merges"])}
    # The regular expressions of the file's pre-tokenizer, written out here independently of the product's.
    expressions = [
        r"\p{N}",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    ]
    expected = by_hand(text, expressions, merges)  # type: ignore[arg-type]
    found = [smollm_tokenizer.token_text(i) for i in smollm_tokenizer.encode(text)]
    assert found == expected


@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_decoding_gives_the_text_back(smollm_tokenizer: Tokenizer, text: str) -> None:
    assert smollm_tokenizer.decode(smollm_tokenizer.encode(text)) == text


def test_control_tokens_in_a_text_are_text(smollm_tokenizer: Tokenizer) -> None:
    ids = smollm_tokenizer.encode("<|endoftext|>")
    assert len(ids) > 3
    assert smollm_tokenizer.eos_id not in ids


def test_what_smollm_says_of_itself(smollm_tokenizer: Tokenizer) -> None:
    assert smollm_tokenizer.kind == "gpt2"
    assert smollm_tokenizer.pre == "smollm"
    assert smollm_tokenizer.n_vocab == 49_152
    assert not smollm_tokenizer.add_bos


@pytest.mark.parametrize("name", PRETOKENIZERS)
def test_every_pretokenizer_agrees_with_a_plain_loop(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(GGUFFile.open(write_tiny_model(tmp_path / "t.gguf", pre=name)))
    merges = {("t", "h"): 0, ("th", "e"): 1}
    for text in [*AWKWARD, "the moth that they 12345 seethe\r\n\r\nThe's"]:
        expected = by_hand(text, list(PRETOKENIZERS[name]), merges)
        assert [tokenizer.token_text(i) for i in tokenizer.encode(text)] == expected


def test_digits_are_cut_as_the_name_says() -> None:
    def digits(name: str) -> list[str]:
        return [m for e in PRETOKENIZERS[name][:1] for m in regex.findall(e, "12345") if m]

    assert digits("smollm") == ["1", "2", "3", "4", "5"]
    assert digits("qwen2") == ["1", "2", "3", "4", "5"]
    assert digits("llama-bpe") == ["123", "45"]
    assert digits("gpt-2") == ["12345"]


def test_a_pretokenizer_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "t.gguf", pre="klingon")
    with pytest.raises(
        ModelError, match=r"t\.gguf: tokenizer\.ggml\.pre is 'klingon', expected one of: smollm"
    ):
        Tokenizer.from_gguf(GGUFFile.open(path))


SPM = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "t", "h", "e", "m", "o", "th"]
SPM += ["▁the", "the", "mo", "moth", "▁t", "he"]


def spm_file(path: Path, **more: Any) -> GGUFFile:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(SPM)
    # Later entries of the vocabulary merge later; single characters are never the result of a merge.
    writer.add_token_scores([-float(i) for i in range(len(SPM))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(SPM) - 259))
    writer.add_bos_token_id(1)
    writer.add_unk_token_id(0)
    for key, value in more.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile.open(path)


def test_sentence_piece_merges_the_best_score_first(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(spm_file(tmp_path / "s.gguf"))
    assert tokenizer.add_bos
    assert tokenizer.bos_id == 1
    # `th` is the best pair; nothing joins `▁` and `th`, so `▁the` follows only from `▁` + `the`.
    assert [tokenizer.token_text(i) for i in tokenizer.encode("the moth")] == ["▁the", "▁", "moth"]


def test_sentence_piece_falls_back_to_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(spm_file(tmp_path / "s.gguf"))
    assert [tokenizer.token_text(i) for i in tokenizer.encode("tü")] == ["▁t", "<0xC3>", "<0xBC>"]
    assert tokenizer.decode(tokenizer.encode("tü")).strip() == "tü"


def test_sentence_piece_without_a_space_before_the_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(
        spm_file(tmp_path / "s.gguf", add_space_prefix=False, add_bos_token=False)
    )
    assert [tokenizer.token_text(i) for i in tokenizer.encode("the")] == ["the"]
    assert not tokenizer.add_bos


def test_control_tokens_are_not_merged_from_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(spm_file(tmp_path / "s.gguf"))
    assert 2 not in tokenizer.encode("</s>")


def test_missing_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"none\.gguf: metadata key tokenizer\.ggml\.model is missing"):
        Tokenizer.from_gguf(GGUFFile.open(path))


def test_a_tokenizer_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kind.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("bert")
    writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'bert', expected gpt2 or llama"):
        Tokenizer.from_gguf(GGUFFile.open(path))


def test_ids_are_int32(smollm_tokenizer: Tokenizer) -> None:
    assert smollm_tokenizer.encode("a b").dtype == np.int32
