"""Token ids: those known of WikiText-2; for awkward texts, plain loops over the published expressions."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from support.tiny_model import byte_symbols
from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile
from verify.model.pretokenizers import PRETOKENIZERS
from verify.model.tokenizer import Tokenizer

WIKITEXT_TOKENS = 303_415
WIKITEXT_SHA256 = "5fd07bf3ef5c0ba1127c83f35687eded0e7c6b5d6f85e8426ad262fb04ed9725"

# The expressions as published, once more and in full, so that a slip in the tables is seen.
C = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = C + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = C + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN35 = C + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
# Where the case of a letter ends a word.
CASES = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+%s|"
CASES += r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*%s|%s"
CASES += r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN, GPT4O = CASES % ("", "", r"\p{N}"), CASES % (f"{C}?", f"{C}?", r"\p{N}{1,3}")
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
CODER = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"]
# Its own list of letters is of those that have cases.
LLM = [r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", CJK, r"\p{N}+"]
PUBLISHED = {
    "smollm": [r"\p{N}", GPT2],
    "gpt-2": [GPT2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "llama-bpe": [LLAMA3],
    "llama3": [LLAMA3],
    "llama-v3": [LLAMA3],
    "glm4": [LLAMA3],
    "chatglm-bpe": [LLAMA3],
    "qwen2": [QWEN2],
    "deepseek-r1-qwen": [QWEN2],
    "qwen35": [QWEN35],
    "deepseek-v3": DEEPSEEK,
    "tekken": [TEKKEN],
    "gpt-4o": [GPT4O],
    "deepseek-coder": CODER,
    "deepseek-llm": LLM,
}
# Other names of the same.
SAME = {
    "smollm": "refact starcoder command-r exaone minerva-7b",
    "gpt-2": "phi-2 gigachat a.x-4.0 mpt olmo jais trillion",
    "llama-bpe": "falcon3 pixtral lfm2",
    "qwen2": "stablelm2 hunyuan megrez kormo solar-open",
    "glm4": "dbrx smaug-bpe",
    "deepseek-v3": "hunyuan-dense joyai-llm",
    "gpt-4o": "llama4 minimax-m2",
}
# One name for each way of cutting, and the names under which a word that is a token is taken whole.
DIFFERENT = [
    "smollm", "gpt-2", "default", "llama-bpe", "qwen2", "qwen35", "deepseek-v3", "tekken", "gpt-4o",
    "deepseek-coder", "deepseek-llm",
]  # fmt: skip
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "tekken"}

AWKWARD = [
    "",
    "aBaB aB1aB bB",
    " ",
    "\n",
    "\n\n\n",
    " \n \n",
    "a\r\nb\r\n\r\nc",
    "\r\r\n \r",
    "\t\tif x:\n\t\t    return  y   ",
    "   leading and trailing   ",
    "Don't, DON'T, we'll, WE'LL, I'm, 'tis, it's'S",
    "1234567 and 3.14159, ٣٤٥٦, ½Ⅷ, x86_64, 10,000 @-@ year",
    "naïve café e\u0301 Ångström ﬁ",
    "Привет, мир! 你好，世界。こんにちは カタカナ 안녕하세요",
    "हिन्दी में पाठ ในภาษาไทย עִבְרִית",
    "🙂👩‍👩‍👧‍👦🇩🇪 ☃️",
    "non\u00a0breaking\u2003wide\u3000spaces\u2028lines\u0085next",
    "<|im_start|>user\n<|im_end|> </s> <s> [INST]",
    "...!!! --- $$ ~~ ^^ `` <<>> +=-*/ {}[]()\\|",
    "#hashtag @name http://x.org/a?b=c&d=%20",
    "\x04\x00!\x04! t\x04he",
    "A" * 70 + "b" * 300 + "\u0301" * 9,
]


def pieces_of(text: str, patterns: Sequence[str]) -> list[str]:
    """The text cut by each expression in turn: every match is a piece, and so is what lies between."""
    pieces = [text] if text else []
    for pattern in patterns:
        cut = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(pattern, piece):
                cut += [piece[end : match.start()], match.group()]
                end = match.end()
            cut.append(piece[end:])
        pieces = [piece for piece in cut if piece]
    return pieces


def merged(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair merging as it is defined: again and again the first pair of the best rank."""
    while len(symbols) > 1:
        best = min(pairwise(symbols), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        place = list(pairwise(symbols)).index(best)
        symbols = [*symbols[:place], best[0] + best[1], *symbols[place + 2 :]]
    return symbols


class PlainByteLevel:
    """What `gpt2` tokenizers should do, in a few lines and slowly."""

    def __init__(self, file: GGUFFile, patterns: Sequence[str], whole_words: bool) -> None:
        self.ids = {token: i for i, token in enumerate(file.metadata["tokenizer.ggml.tokens"])}
        merges = [tuple(merge.split(" ")) for merge in file.metadata["tokenizer.ggml.merges"]]
        self.ranks: dict[Any, int] = {merge: rank for rank, merge in reversed(list(enumerate(merges)))}
        self.patterns, self.whole_words, self.symbols = patterns, whole_words, byte_symbols()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in pieces_of(text, self.patterns):
            symbols = [self.symbols[byte] for byte in piece.encode()]
            whole = "".join(symbols)
            if self.whole_words and whole in self.ids:
                ids.append(self.ids[whole])
            else:
                ids += [self.ids[token] for token in merged(symbols, self.ranks) if token in self.ids]
        return ids


def write(path: Path, kind: str = "gpt2", *, drop: str = "", **keys: Any) -> GGUFFile:
    """A file of tokenizer metadata alone; `drop` leaves a key out, `keys` are added or put in place."""
    tokens = keys.get("tokens", [*byte_symbols(), "ab"])
    values: dict[str, Any] = {"model": kind, "tokens": tokens, "token_type": [1] * len(tokens)}
    values |= {"pre": "smollm", "merges": ["a b"]} if kind == "gpt2" else {}
    values |= {"scores": [-float(i) for i in range(len(tokens))]} if kind == "llama" else {}
    writer = gguf.GGUFWriter(path / "tokenizer.gguf", "llama")
    for name, value in (values | keys).items():
        full = f"tokenizer.ggml.{name}"
        if name == drop:
            continue
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        else:
            writer.add_array(full, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFFile.open(path / "tokenizer.gguf")


@pytest.fixture(scope="module")
def smollm_file(smollm: Path) -> GGUFFile:
    return GGUFFile.open(smollm)


@pytest.fixture(scope="module")
def smollm_tokenizer(smollm_file: GGUFFile) -> Tokenizer:
    return Tokenizer.from_gguf(smollm_file)


@pytest.fixture(scope="module")
def smollm_plain(smollm_file: GGUFFile) -> PlainByteLevel:
    return PlainByteLevel(smollm_file, PUBLISHED["smollm"], False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    """Merges that cross every border that a pre-tokenizer draws: trained on text that is not cut at all."""
    alphabet = byte_symbols()
    rng = random.Random(0)
    parts = [
        "12",
        "345",
        "6",
        "١٢",
        " a",
        "b",
        "'s",
        "'S",
        "'LL",
        " ",
        "\n",
        "\r\n",
        "\t",
        "!",
        "~",
        "$",
        "_",
        ".",
    ]
    parts += ["e\u0301", "漢字", "かな", "?a", "aB"]
    text = "".join(rng.choice(parts) for _ in range(1500))
    symbols, merges = [alphabet[byte] for byte in text.encode()], []
    for _ in range(250):
        (left, right), _ = Counter(pairwise(symbols)).most_common(1)[0]
        if left + right not in merges:
            merges.append(f"{left} {right}")
        joined, i = [], 0
        while i < len(symbols):
            pair = tuple(symbols[i : i + 2]) == (left, right)
            joined.append(left + right if pair else symbols[i])
            i += 2 if pair else 1
        symbols = joined
    tokens = list(dict.fromkeys(alphabet + [merge.replace(" ", "") for merge in merges]))
    folder = tmp_path_factory.mktemp("trained")
    return write(folder, tokens=tokens, merges=list(dict.fromkeys(merges)), bos_token_id=0)


def with_pre(file: GGUFFile, pre: str) -> Tokenizer:
    file.metadata["tokenizer.ggml.pre"] = pre
    return Tokenizer.from_gguf(file)


def test_wikitext_gives_the_known_ids(smollm_tokenizer: Tokenizer, wikitext: Path) -> None:
    text = wikitext.read_bytes().removesuffix(b"\n").decode()
    ids = smollm_tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.shape == (WIKITEXT_TOKENS,)
    assert hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest() == WIKITEXT_SHA256
    assert smollm_tokenizer.decode(ids) == text


def test_what_the_small_model_says_of_itself(smollm_tokenizer: Tokenizer) -> None:
    tokenizer = smollm_tokenizer
    assert (tokenizer.kind, tokenizer.pre, tokenizer.n_vocab) == ("gpt2", "smollm", 49_152)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, False)


@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_awkward_texts_with_the_small_model(
    smollm_tokenizer: Tokenizer, smollm_plain: PlainByteLevel, text: str
) -> None:
    assert smollm_tokenizer.encode(text).tolist() == smollm_plain.encode(text)


# Letters, marks, digits, punctuation, spaces and line ends of several scripts; no others, because the two
# engines of regular expressions have tables of different versions of Unicode.
CHARACTERS = (
    "abzABZéßΩжя漢字かカ한가١२٣½Ⅷ0123456789 '\"~$^`!?.,-_/\\@#<>|[]{}"
    "\n\r\t\u00a0\u3000\u0301\u093f\u200d🙂sSlLtTrevVmMdD"
)


@given(st.text(alphabet=CHARACTERS, max_size=40))
def test_any_text_with_the_small_model(
    smollm_tokenizer: Tokenizer, smollm_plain: PlainByteLevel, text: str
) -> None:
    ids = smollm_tokenizer.encode(text)
    assert ids.tolist() == smollm_plain.encode(text)
    assert smollm_tokenizer.decode(ids) == text


@pytest.mark.parametrize("pre", PUBLISHED)
def test_every_pre_tokenizer_cuts_as_published(trained: GGUFFile, pre: str) -> None:
    tokenizer = with_pre(trained, pre)
    plain = PlainByteLevel(trained, PUBLISHED[pre], pre in WHOLE_WORDS)
    rng = random.Random(pre)
    texts = AWKWARD + ["".join(rng.choices(CHARACTERS, k=30)) for _ in range(150)]
    for text in texts:
        assert tokenizer.encode(text).tolist() == plain.encode(text), repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_pre_tokenizer_has_been_compared() -> None:
    others = {name: PRETOKENIZERS[like] for like, names in SAME.items() for name in names.split()}
    assert set(PRETOKENIZERS) == {*PUBLISHED, *others}
    for name, pretokenizer in others.items():
        assert PRETOKENIZERS[name] == pretokenizer, name


def test_the_texts_tell_the_pre_tokenizers_apart(trained: GGUFFile) -> None:
    seen = {pre: [with_pre(trained, pre).encode(text).tolist() for text in AWKWARD] for pre in DIFFERENT}
    for pre in DIFFERENT:
        assert [other for other in DIFFERENT if seen[other] == seen[pre]] == [pre]


def test_a_word_that_is_a_token_is_taken_whole_where_the_name_says_so(tmp_path: Path) -> None:
    tokens = [*byte_symbols(), "bc", "abc"]
    file = write(tmp_path, tokens=tokens, merges=["b c"], bos_token_id=0)
    letters = {c: tokens.index(c) for c in "abc"}
    for pre in DIFFERENT:
        whole = pre in WHOLE_WORDS
        expected = [257] if whole else [letters["a"], 256]
        assert with_pre(file, pre).encode("abc").tolist() == expected, pre


def test_an_unknown_pre_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    for pre in ("kimi-k2", "smollm2", "Llama-bpe"):
        with pytest.raises(ModelError) as caught:
            Tokenizer.from_gguf(write(tmp_path, pre=pre))
        message = str(caught.value)
        assert f"tokenizer.gguf: metadata key tokenizer.ggml.pre is {pre!r}" in message
        assert "smollm" in message and "\n" not in message


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt-2"])
def test_an_unknown_tokenizer_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    said = rf"metadata key tokenizer\.ggml\.model is '{kind}', expected one of: gpt2, llama, gemma4"
    with pytest.raises(ModelError, match=said):
        Tokenizer.from_gguf(write(tmp_path, kind))


@pytest.mark.parametrize(
    ("kind", "key"),
    [(kind, key) for kind in ("gpt2", "llama") for key in ("model", "tokens")]
    + [("gpt2", "merges"), ("llama", "scores")],
)
def test_a_missing_key_is_named(tmp_path: Path, kind: str, key: str) -> None:
    with pytest.raises(ModelError, match=rf"tokenizer\.gguf: metadata key tokenizer\.ggml\.{key} is missing"):
        Tokenizer.from_gguf(write(tmp_path, kind, drop=key))


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        ("gpt2", {"tokens": ["a", "b", "a"]}, "tokens: token 2 is 'a', as one before it"),
        ("gpt2", {"tokens": [1, 2]}, "tokens: expected a list of texts"),
        ("gpt2", {"token_type": [1, 1]}, "token_type: expected 257 numbers, one a token, got 2"),
        ("llama", {"scores": [0.0]}, "scores: expected 257 numbers, one a token, got 1"),
        ("llama", {"token_type": ["x"]}, "token_type: expected a list of numbers"),
        ("gpt2", {"merges": ["a b", "ab"]}, "merges: merge 1 is 'ab', expected two tokens"),
        ("gpt2", {"merges": ["a c"]}, "merges: merge 0 is 'a c', expected two tokens"),
        ("gpt2", {"merges": ["a xyz"]}, "merges: merge 0 is 'a xyz', expected two tokens"),
        ("gpt2", {"bos_token_id": 257}, "bos_token_id: expected a token id below 257, got 257"),
        ("llama", {"eos_token_id": 999}, "eos_token_id: expected a token id below 257, got 999"),
        ("llama", {"unknown_token_id": 999}, "unknown_token_id: expected a token id below 257, got 999"),
        ("gpt2", {"add_bos_token": 1}, "add_bos_token: expected true or false, got 1"),
        ("llama", {"add_space_prefix": "no"}, "add_space_prefix: expected true or false, got 'no'"),
        ("gpt2", {"add_bos_token": True}, "bos_token_id is missing, expected a token id"),
        ("gpt2", {"pre": "llama-bpe"}, "bos_token_id is missing, expected a token id"),
    ],
)
def test_metadata_at_odds_is_refused(tmp_path: Path, kind: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_gguf(write(tmp_path, kind, **keys))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'tokenizer.gguf'}: metadata key tokenizer.ggml.")
    assert said in message and "\n" not in message


@pytest.mark.parametrize(
    ("kind", "keys", "expected"),
    [
        ("gpt2", {}, (None, None, False)),
        ("gpt2", {"bos_token_id": 3, "eos_token_id": 4}, (3, 4, False)),
        ("gpt2", {"bos_token_id": 0, "add_bos_token": True}, (0, None, True)),
        ("gpt2", {"pre": "llama-bpe", "bos_token_id": 3}, (3, None, True)),
        ("gpt2", {"pre": "llama-bpe", "bos_token_id": 3, "add_bos_token": False}, (3, None, False)),
        ("gpt2", {"pre": "glm4"}, (None, None, False)),
        ("llama", {}, (1, 2, True)),
        ("llama", {"bos_token_id": 5, "eos_token_id": 6, "add_bos_token": False}, (5, 6, False)),
    ],
)
def test_bos_and_eos(
    tmp_path: Path, kind: str, keys: dict[str, Any], expected: tuple[int | None, int | None, bool]
) -> None:
    tokenizer = Tokenizer.from_gguf(write(tmp_path, kind, **keys))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == expected
    assert tokenizer.encode("").tolist() == [], "BOS is for the caller to add"


def test_control_tokens_in_a_text_are_text(smollm_file: GGUFFile, smollm_tokenizer: Tokenizer) -> None:
    assert smollm_file.metadata["tokenizer.ggml.tokens"][1] == "<|im_start|>"
    ids = smollm_tokenizer.encode("<|im_start|>user").tolist()
    assert 1 not in ids and len(ids) > 2
    assert smollm_tokenizer.decode([1, *ids]) == "<|im_start|><|im_start|>user"
    assert smollm_tokenizer.token_text(1) == "<|im_start|>"


def test_user_defined_tokens_are_found_as_they_stand(tmp_path: Path) -> None:
    tokens = [*byte_symbols(), "<thé>", "<control>", "ab"]
    tokenizer = Tokenizer.from_gguf(write(tmp_path, tokens=tokens, token_type=[1] * 256 + [4, 3, 1]))
    plain = [tokens.index(symbol) for symbol in "a<control>b"]
    assert tokenizer.encode("a<control>b").tolist() == plain
    assert tokenizer.encode("a<thé>b").tolist() == [tokens.index("a"), 256, tokens.index("b")]
    assert tokenizer.decode(tokenizer.encode("a<thé>b")) == "a<thé>b"


def test_a_merge_is_cut_at_its_first_space_after_the_first_character(tmp_path: Path) -> None:
    tokens = [*byte_symbols(), " ", "ab", " ab"]
    tokenizer = Tokenizer.from_gguf(write(tmp_path, tokens=tokens, merges=["a b", "  ab"]))
    assert tokenizer.encode("ab").tolist() == [257]


def test_a_byte_without_a_token_parts_what_stands_beside_it(tmp_path: Path) -> None:
    symbols = byte_symbols()
    tokens = [*symbols[:4], *symbols[5:], "!!"]
    tokenizer = Tokenizer.from_gguf(write(tmp_path, tokens=tokens, merges=["! !"]))
    one, two = tokens.index("!"), tokens.index("!!")
    assert tokenizer.encode("!!").tolist() == [two]
    assert tokenizer.encode("!\x04!").tolist() == [one, one]
    assert tokenizer.encode("\x04").tolist() == []


def test_half_a_surrogate_pair_is_refused(smollm_tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelError, match=r"character 2 is '\\udcff'"):
        smollm_tokenizer.encode("ab\udcffc")


def test_tokens_are_shown_even_where_they_are_no_text(smollm_tokenizer: Tokenizer) -> None:
    ids = smollm_tokenizer.encode("🙂").tolist()
    assert len(ids) > 1, "a character in several tokens was wanted"
    shown = [smollm_tokenizer.token_text(i) for i in ids]
    assert "".join(shown) == "\\xf0\\x9f\\x99\\x82"
    assert smollm_tokenizer.decode(ids) == "🙂"
    assert smollm_tokenizer.decode(ids[:1]) == "\ufffd"
    assert smollm_tokenizer.token_text(smollm_tokenizer.encode(" the")[0]) == " the"


@pytest.mark.parametrize("token_id", [-1, 49_152])
def test_ids_outside_the_vocabulary_are_refused(smollm_tokenizer: Tokenizer, token_id: int) -> None:
    for ask in (smollm_tokenizer.token_text, lambda i: smollm_tokenizer.decode([i])):
        with pytest.raises(ValueError, match=f"token id below 49152, got {token_id}"):
            ask(token_id)


def test_a_word_of_a_hundred_thousand_letters_takes_no_time(smollm_tokenizer: Tokenizer) -> None:
    started = time.perf_counter()
    ids = smollm_tokenizer.encode("abracadabra" * 10_000)
    assert time.perf_counter() - started < 5
    assert smollm_tokenizer.decode(ids) == "abracadabra" * 10_000


# SentencePiece


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    *"▁helo<>s0x41",
    "he",
    "ll",
    "lo",
    "hell",
    "▁he",
    "hello",
    "▁hello",
    "<s",
    "s>",
    "0x",
    "<0x",
    "1>",
    "41>",
]
WORDS += ["▁▁", "el"]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, "<tool>", *WORDS]
TYPES = [2, 3, 3, *[6] * 256, 4, *[1] * len(WORDS)]
# A piece that comes first in the list merges first, except that "el" is the worst.
SCORES = [0.0] * 260 + [-float(i) for i in range(len(WORDS))]


def sentence_piece(path: Path, **keys: Any) -> Tokenizer:
    values = {"tokens": PIECES, "token_type": TYPES, "scores": SCORES} | keys
    return Tokenizer.from_gguf(write(path, "llama", **values))


def ids_of(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def plain_sentence_piece(text: str) -> list[int]:
    """Again and again, the pair whose token has the best score; the first of equal ones."""
    free = [i for i, kind in enumerate(TYPES) if kind == 1]
    score = {PIECES[i]: SCORES[i] for i in free}
    symbols = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        pairs = [left + right for left, right in pairwise(symbols)]
        known = [(-score[pair], place) for place, pair in enumerate(pairs) if pair in score]
        if not known:
            break
        place = min(known)[1]
        symbols[place : place + 2] = [pairs[place]]
    ids = []
    for symbol in symbols:
        ids += ids_of(symbol) if symbol in score else ids_of(*(BYTES[byte] for byte in symbol.encode()))
    return ids


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("hello", ["▁hello"]),
        ("hello hello", ["▁hello", "▁hello"]),
        ("hell", ["▁", "hell"]),
        ("  ", ["▁▁", "▁"]),
        ("é", ["▁", "<0xC3>", "<0xA9>"]),
        ("o\n", ["▁", "o", "<0x0A>"]),
        ("🙂", ["▁", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]),
        ("<s>", ["▁", "<s", ">"]),
        ("<0x41>", ["▁", "<0x", "41>"]),
        ("<tool>", ["<tool>"]),
        ("o<tool>o", ["▁", "o", "<tool>", "▁", "o"]),
        ("\r\n", ["▁", "<0x0D>", "<0x0A>"]),
    ],
)
def test_a_small_vocabulary_by_hand(tmp_path: Path, text: str, pieces: list[str]) -> None:
    tokenizer = sentence_piece(tmp_path)
    assert tokenizer.kind == "llama" and tokenizer.pre is None
    assert tokenizer.encode(text).tolist() == ids_of(*pieces)


@pytest.fixture(scope="module")
def small_pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return sentence_piece(tmp_path_factory.mktemp("pieces"))


@given(st.text(alphabet="helo <>sx041é\n", max_size=30))
def test_any_text_with_a_small_vocabulary(small_pieces: Tokenizer, text: str) -> None:
    ids = small_pieces.encode(text)
    assert ids.tolist() == plain_sentence_piece(text)
    assert small_pieces.decode(ids) == text


def test_no_space_is_put_in_front_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = sentence_piece(tmp_path, add_space_prefix=False)
    assert tokenizer.encode("hello hello").tolist() == ids_of("hello", "▁hello")
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


def test_the_score_decides_and_not_the_order_of_tokens(tmp_path: Path) -> None:
    assert sentence_piece(tmp_path).encode("hel").tolist() == ids_of("▁he", "l")
    scores = [*SCORES[:-1], 1.0]
    assert sentence_piece(tmp_path, scores=scores).encode("hel").tolist() == ids_of("▁", "h", "el")


def test_the_text_of_pieces(tmp_path: Path) -> None:
    tokenizer = sentence_piece(tmp_path)
    shown = [tokenizer.token_text(i) for i in ids_of("<s>", "<0x41>", "<0xC3>", "<tool>", "▁hello")]
    assert shown == ["<s>", "A", "\\xc3", "<tool>", " hello"]
    assert tokenizer.decode(ids_of("▁hello", "<0xC3>", "<0xA9>", "▁")) == "helloé "
