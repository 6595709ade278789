"""Token ids against llama.cpp's own tokenizer, on vocabularies in which any other cut gives other ids."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from support.model_engine import ModelEngine, model_engine
from support.tiny_model import byte_symbols
from verify.model.gguf.file import GGUFFile
from verify.model.pretokenizers import PRETOKENIZERS
from verify.model.tokenizer import ALWAYS_SHOWN, CONTROL_LOOKING, Tokenizer

SYMBOLS = byte_symbols()
# One name of each way of cutting.
WAYS = list({pretokenizer: name for name, pretokenizer in reversed(PRETOKENIZERS.items())}.values())
# Of scripts with and without cases, marks, digits, punctuation; what has to do with cuts more often.
COMMON = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" * 3
    + "0123456789" * 3
    + " \n\r\t" * 12
    + "'sStTrevVmMdDlL" * 2
    + '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~' * 2
    + "éßÄøñçœЖяЩюдЁαβΩςΈ漢字文語你好世界かなカナー한국어가힣العربيةעבריתहिन्दीकांไทยภาษา"
    + "١٢٣४५²³½Ⅷ🙂🚀👍🏽❤️\u0301\u093f\u200d…—“”«»、。！？$€£∑√ǅǈʼˈªº"
)
# With few unlike bytes, so that a vocabulary is made quickly.
FEWER = "aAbBsStT12 \n\r\t'.,/_$~éÉ漢かжЖ٢½" * 2 + "lLdD9( -\\x"
RARE_SPACES = "\u00a0\u1680\u2000\u2003\u200a\u2028\u2029\u3000\u0085\u000b\u000c"
# These two are known to differ there.
NOT_ON_RARE_SPACES = ("deepseek-coder", "deepseek-llm")


@pytest.fixture(scope="module")
def engine() -> Iterator[ModelEngine]:
    found = model_engine()
    yield found
    found.close()


def write(path: Path, vocabulary: list[str], merges: list[str], **keys: Any) -> Path:
    """A `gpt2` vocabulary; keys: `tokenizer.ggml.*`, None to leave one out."""
    writer = gguf.GGUFWriter(path, "llama")
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": vocabulary, "token_type": [1] * len(vocabulary)}
    values |= {"merges": merges, "bos_token_id": 0, "eos_token_id": 0}
    for name, value in (values | keys).items():
        full = f"tokenizer.ggml.{name}"
        if isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif value is not None:
            writer.add_array(full, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def check(engine: ModelEngine, path: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer.from_gguf(GGUFFile.open(path))
    for text, expected in zip(texts, engine.token_ids(path, texts), strict=True):
        assert tokenizer.encode(text).tolist() == expected, repr(text)


def check_pre(engine: ModelEngine, folder: Path, pre: str, count: int, *, among: str = COMMON) -> None:
    """On a vocabulary of all pairs of the bytes that characters have."""
    some = [SYMBOLS[byte] for byte in sorted(set((among + RARE_SPACES).encode()))]
    pairs = [(a, b) for a in some for b in some]
    tokens = [*SYMBOLS, *(a + b for a, b in pairs)]
    path = write(folder / "pairs.gguf", tokens, [f"{a} {b}" for a, b in pairs], pre=pre)
    rng = random.Random(pre)
    characters = among + ("" if pre in NOT_ON_RARE_SPACES else RARE_SPACES)
    check(engine, path, ["".join(rng.choices(characters, k=rng.randint(1, 60))) for _ in range(count)])


@pytest.mark.parametrize("pre", WAYS)
def test_every_way_of_cutting_is_the_engines(engine: ModelEngine, tmp_path: Path, pre: str) -> None:
    check_pre(engine, tmp_path, pre, 100, among=FEWER)


@pytest.mark.slow
@pytest.mark.parametrize("pre", PRETOKENIZERS)
def test_every_name_cuts_as_the_engine_does(engine: ModelEngine, tmp_path: Path, pre: str) -> None:
    check_pre(engine, tmp_path, pre, 4000)


ABC = [*SYMBOLS, "ab", "bc"]
# What files in the wild do, and the ids that the engine gave: text, ids, merges, keys.
FOUND: dict[str, tuple[str, list[int], list[str], dict[str, Any]]] = {
    "a merge twice": ("abc", [97, 257], ["b c", "a b", "b c"], {}),
    "no kinds of tokens": ("abc", [256, 99], ["a b", "b c"], {"token_type": None}),
    "no name of a pre-tokenizer": ("abc", [256, 99], ["a b", "b c"], {"pre": None}),
    "two empty tokens": ("abc", [256, 99], ["a b", "b c"], {"tokens": [*ABC, "", ""], "token_type": None}),
    "control by its looks": (
        "a<|im_end|>b<|im_start|>",
        [*b"a<|im_end|>b", 259],
        ["a b"],
        {"tokens": [*ABC, "<|im_end|>", "<|im_start|>"], "token_type": [1] * 258 + [4, 4]},
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_vocabularies_as_they_are_found(tmp_path: Path, name: str) -> None:
    text, ids, merges, keys = FOUND[name]
    path = write(tmp_path / "found.gguf", ABC, merges, **keys)
    assert Tokenizer.from_gguf(GGUFFile.open(path)).encode(text).tolist() == ids


@pytest.mark.parametrize("name", FOUND)
def test_the_engine_says_so(engine: ModelEngine, tmp_path: Path, name: str) -> None:
    text, ids, merges, keys = FOUND[name]
    assert engine.token_ids(write(tmp_path / "found.gguf", ABC, merges, **keys), [text]) == [ids]


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_tokens_are_retyped_by_their_looks(engine: ModelEngine, tmp_path: Path, kind: int) -> None:
    """Whatever kind the file says: ordinary, control, the user's own."""
    others = {"<|im_start|>", "<|end_of_turn|>", "<s>", "▁<EOT>", "<eot>", "[INST]"}
    for looks in sorted(CONTROL_LOOKING | ALWAYS_SHOWN | others):
        path = write(tmp_path / "one.gguf", [*ABC, looks], ["a b"], token_type=[1] * 258 + [kind])
        check(engine, path, [f"a{looks}b"])


@pytest.mark.parametrize(
    "among", [["<|return|>", "<|call|>"], ["<|calls|>", "<|flush|>"], ["<|call|>"], ["<|tool_response>"]]
)
def test_tokens_are_retyped_by_others_that_are_there(
    engine: ModelEngine, tmp_path: Path, among: list[str]
) -> None:
    tokens = [*ABC, "<|end|>", "</s>", *among]
    path = write(tmp_path / "one.gguf", tokens, ["a b"], token_type=[1] * 258 + [4] * (len(tokens) - 258))
    check(engine, path, [f"a{looks}b" for looks in tokens[258:]])


def pieces(path: Path, scores: str) -> Path:
    """A vocabulary of pieces: characters, their pairs and some triples, with scores all equal or in order."""
    letters = [*"abcdest", "▁", "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokens += [a + b for a in letters for b in letters if a != "▁" or b != "▁"]
    tokens += [a + b + "s" for a in "abcdet" for b in "ets"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    some = {"equal": -1000.0, "in fours": None, "in order": None}[scores]
    values = [
        some if some is not None else -float(i // (4 if scores == "in fours" else 1))
        for i in range(len(tokens))
    ]
    writer.add_token_scores(values)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259 - 1), 4])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("scores", ["equal", "in fours", "in order"])
def test_of_equal_scores_the_leftmost_pair_is_merged(
    engine: ModelEngine, tmp_path: Path, scores: str
) -> None:
    rng = random.Random(scores)
    texts = ["".join(rng.choices("abcdest  éx漢", k=rng.randint(1, 50))) for _ in range(300)]
    check(engine, pieces(tmp_path / "pieces.gguf", scores), texts)


def test_equal_scores_without_the_engine(tmp_path: Path) -> None:
    """From the left: `bc`, then `de`, and not `cd`."""
    tokenizer = Tokenizer.from_gguf(GGUFFile.open(pieces(tmp_path / "pieces.gguf", "equal")))
    assert [tokenizer.token_text(i) for i in tokenizer.encode("abcde")] == [" a", "bc", "de"]


def characters(path: Path) -> Path:
    """A `gemma4` vocabulary: bytes, letters, all their pairs, and runs of line ends."""
    letters = [*"abcdeé漢", "▁", "\n"]
    pairs = [(a, b) for a in letters for b in letters if "\n" not in (a, b)]
    tokens = ["<pad>", "<unk>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokens += [a + b for a, b in pairs] + ["\n\n", "\n\n\n", "<mine>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 2, 3, *[6] * 256, *[1] * (len(tokens) - 260), 4])
    writer.add_token_merges([f"{a} {b}" for a, b in pairs])
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_characters_of_gemma_4_merge_as_the_engine_has_it(engine: ModelEngine, tmp_path: Path) -> None:
    rng = random.Random(4)
    texts = [
        "".join(rng.choices([*"abcdeé漢x語  \n\n\t", "<mine>"], k=rng.randint(1, 40))) for _ in range(400)
    ]
    check(engine, characters(tmp_path / "characters.gguf"), texts)


def test_text_of_gemma_4_comes_back(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(GGUFFile.open(characters(tmp_path / "characters.gguf")))
    for text in ("a b\n\n\nc", "x語 <mine>é", " ab "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.token_text(i) for i in tokenizer.encode("ab\n\n\nc")] == ["ab", "\n\n\n", "c"]
