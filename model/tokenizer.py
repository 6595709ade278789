"""Text to token ids and back, built from a GGUF file's own metadata on the `tokenizers` library.

`gpt2` is byte-pair merging of bytes, with the merges in the file, `gemma4` of characters; `llama` is
SentencePiece's merging of characters, with a score a token from which the merges follow. A corpus is text:
what stands in it and looks like a control token is text too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile
from verify.model.pretokenizers import PreTokenizer, pretokenizer_named
from verify.model.sentence_piece import SPACE, SentencePiece
from verify.model.text_cuts import PIECE, encode_in_pieces, slices

KINDS = ("gpt2", "llama", "gemma4")
# Kinds of tokens in `tokenizer.ggml.token_type`; 1 is an ordinary token, 5 an unused one.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BEFORE_SPACE = re.compile(f"(.)(?={SPACE})", re.DOTALL)
# Tokens that llama.cpp takes for control tokens by their text alone.
CONTROL_LOOKING = frozenset((
    "</s>", "<EOT>", "<MID>", "<PAD>", "<PRE>", "<REPO>", "<SUF>", "<end_of_turn>", "<end_of_utterance>",
    "<eos>", "<fim-middle>", "<fim-pad>", "<fim-prefix>", "<fim-repo>", "<fim-suffix>", "<fim_middle>",
    "<fim_pad>", "<fim_prefix>", "<fim_suffix>", "<reponame>", "<turn|>", "<|calls|>", "<|call|>",
    "<|code_middle|>", "<|code_prefix|>", "<|code_suffix|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>",
    "<|eom_id|>", "<|eot_id|>", "<|file_sep|>", "<|fim_middle|>", "<|fim_pad|>", "<|fim_prefix|>",
    "<|fim_repo|>", "<|fim_suffix|>", "<|flush|>", "<|ifm|im_end|>", "<|im_end|>", "<|middle|>",
    "<|prefix|>", "<|repo_name|>", "<|return|>", "<|suffix|>", "<|tool_response>", "<｜end▁of▁sentence｜>",
    "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜fim▁hole｜>", "[EOS]", "[EOT]", "[PAD]", "[e~[", "_<EOT>",
    "▁<MID>",
    "▁<PRE>", "▁<SUF>",
))  # fmt: skip
# Control tokens of gpt-oss that it takes for tokens wherever they stand.
ALWAYS_SHOWN = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """The tokenizer of one model. kind: `gpt2`, `llama` or `gemma4`; pre: a `gpt2` pre-tokenizer's name.

    bos_id, eos_id: None where the model has no such token. add_bos: whether an engine puts BOS first.
    """

    kind: str
    pre: str | None
    bos_id: int | None
    eos_id: int | None
    add_bos: bool

    def __init__(self, file: GGUFFile) -> None:
        self.kind = file.require("tokenizer.ggml.model", str)
        if self.kind not in KINDS:
            raise ModelError(
                f"{file.path}: metadata key tokenizer.ggml.model is {self.kind!r:.80},"
                f" expected one of: {', '.join(KINDS)}"
            )
        self.path = file.path
        self._tokens = _tokens(file)
        self._types = _types(file, self._tokens)
        if self.kind == "gpt2":
            # As the engines do, for files from before there were names.
            self.pre = file.optional("tokenizer.ggml.pre", str, "default")
            pretokenizer = pretokenizer_named(self.pre, file.path)
            self._library = _byte_pairs(file, self._tokens, pretokenizer)
            self._prefixed, add_bos, bos, eos = False, pretokenizer.add_bos, None, None
        elif self.kind == "gemma4":
            self.pre, self._prefixed = None, False
            self._library = _character_pairs(file, self._tokens)
            add_bos, bos, eos = True, None, None
        else:
            self.pre = None
            self._prefixed = file.optional("tokenizer.ggml.add_space_prefix", bool, True)
            self._library = _sentence_piece(file, self._tokens, self._types, self._prefixed)
            add_bos, bos, eos = True, 1, 2
        for i in np.flatnonzero(self._types == _BYTE) if self.kind != "gpt2" else ():
            if not _BYTE_TOKEN.fullmatch(self._tokens[i]):
                raise ModelError(
                    f"{file.path}: metadata key tokenizer.ggml.tokens: byte token {i} is"
                    f" {self._tokens[i]!r:.80}, expected <0x00> to <0xFF>"
                )
        # Only these are cut out of a text as they stand; a control token never comes from text.
        own = [self._tokens[i] for i in np.flatnonzero(self._types == _USER_DEFINED)]
        self._pairs = None
        if self.kind == "llama":
            self._pairs = _pair_by_pair(file, self._tokens, self._types, own, self._prefixed)
        self._library.add_tokens([AddedToken(token, normalized=False) for token in own])
        # Letters that a space follows inside a token: merges reach across them.
        self._joined: frozenset[str] | None = None
        if self.kind != "gpt2":
            pairs = (before for token in self._tokens for before in _BEFORE_SPACE.findall(token))
            self._joined = frozenset(pairs)
        self.bos_id = _token_id(file, "bos", len(self._tokens), bos)
        self.eos_id = _token_id(file, "eos", len(self._tokens), eos)
        self.add_bos = file.optional("tokenizer.ggml.add_bos_token", bool, add_bos)
        if self.add_bos and self.bos_id is None:
            raise ModelError(
                f"{file.path}: metadata key tokenizer.ggml.bos_token_id is missing, expected a token id,"
                " because BOS is added"
            )

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """The tokenizer that the file describes.

        Raises ModelError, naming file and key, for a key that is missing, of another kind or at odds with
        another, and for a tokenizer or pre-tokenizer that is not known here.
        """
        return cls(file)

    @property
    def n_vocab(self) -> int:
        """Number of token ids."""
        return len(self._tokens)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 [n]; no BOS is added.

        A byte that has no token, in a `gpt2` vocabulary, gives none, as in the engines. Raises ModelError for
        half a surrogate pair, which is what Python makes of bytes that are no text.
        """
        return self.encode_texts(slices(text))[0]

    def encode_texts(
        self, texts: Iterable[str], *, enough: int | None = None, piece: int = PIECE
    ) -> tuple[np.ndarray, bool]:
        """`encode` of the texts joined, and whether that is of all of them: `enough` ids are, where they come
        to so many. Memory grows with the ids and with `piece` letters, not with the text. Raises ModelError.
        """
        return encode_in_pieces(
            texts, self._encode, enough=enough, piece=piece, prefixed=self._prefixed, joined=self._joined
        )

    def _encode(self, text: str) -> np.ndarray:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ModelError(
                f"text: expected Unicode, character {error.start} is {text[error.start]!r}"
            ) from None
        if self._pairs is not None:
            return np.array(self._pairs.encode(text), dtype=np.int32)
        return np.array(self._library.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, control tokens as they are written; bytes that are no text become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        text = b"".join(map(self._bytes, ids)).decode("utf-8", "replace")
        # The space that `encode` has put in front is not of the text.
        return text[1:] if self._prefixed and text.startswith(" ") else text

    def token_text(self, token_id: int) -> str:
        r"""The text of one token, to be shown: bytes that are no whole character are written as `\xe2`.

        Raises ValueError for an id outside the vocabulary.
        """
        return self._bytes(token_id).decode("utf-8", "backslashreplace")

    def _bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < len(self._tokens):
            raise ValueError(f"{self.path}: expected a token id below {len(self._tokens)}, got {token_id}")
        token, kind = self._tokens[token_id], self._types[token_id]
        if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN):
            return token.encode()
        if self.kind != "gpt2":
            return bytes([int(token[3:5], 16)]) if kind == _BYTE else token.replace(SPACE, " ").encode()
        try:
            return bytes(_BYTE_OF_SYMBOL[symbol] for symbol in token)
        except KeyError:
            return token.encode()


def _tokens(file: GGUFFile) -> list[str]:
    key = "tokenizer.ggml.tokens"
    tokens = file.require(key, list)
    seen: set[str] = set()
    for i, token in enumerate(tokens):
        if not isinstance(token, str):
            raise ModelError(f"{file.path}: metadata key {key}: expected a list of texts")
        # Of two that are written alike the engines take the later; Gemma 4 has some.
        if token in seen and token and file.get("tokenizer.ggml.model") != "gemma4":
            raise ModelError(f"{file.path}: metadata key {key}: token {i} is {token!r:.80}, as one before it")
        seen.add(token)
    # An empty token comes from no text, and there may be several.
    return [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]


def _types(file: GGUFFile, tokens: list[str]) -> np.ndarray:
    """Kinds of the tokens: as the file says, or all ordinary; as llama.cpp then changes some by their text.

    A token that looks like one for control is one, whatever the file says: in a text it is spelled out.
    """
    key = "tokenizer.ggml.token_type"
    types = np.full(len(tokens), _NORMAL)
    if key in file.metadata:
        types = _per_token(file, key, len(tokens)).copy()
    ids = {token: i for i, token in enumerate(tokens)}
    for looks in CONTROL_LOOKING & ids.keys():
        types[ids[looks]] = _CONTROL
    for shown in ALWAYS_SHOWN & ids.keys():
        types[ids[shown]] = _USER_DEFINED
    # gpt-oss and Solar Open: what ends a message is text among messages.
    returns = {"<|return|>", "<|call|>"} <= ids.keys()
    flushes = "<|flush|>" in ids and bool({"<|call|>", "<|calls|>"} & ids.keys())
    if "<|end|>" in ids and (returns or flushes):
        types[ids["<|end|>"]] = _USER_DEFINED
    # Gemma 4.
    if {"</s>", "<|tool_response>"} <= ids.keys():
        types[ids["</s>"]] = _NORMAL
    return types


def _per_token(file: GGUFFile, key: str, n_vocab: int) -> np.ndarray:
    """The numbers of a key that holds one for each token."""
    numbers = file.require(key, np.ndarray)
    if numbers.size != n_vocab:
        raise ModelError(
            f"{file.path}: metadata key {key}: expected {n_vocab} numbers, one a token, got {numbers.size}"
        )
    return numbers


def _token_id(file: GGUFFile, which: str, n_vocab: int, default: int | None) -> int | None:
    key = f"tokenizer.ggml.{which}_token_id"
    token_id = file.optional(key, int, default)
    if token_id is not None and not 0 <= token_id < n_vocab:
        raise ModelError(
            f"{file.path}: metadata key {key}: expected a token id below {n_vocab}, got {token_id}"
        )
    return token_id


def _merges(file: GGUFFile, ids: dict[str, int]) -> list[tuple[str, str]]:
    """The file's merges in their order. Raises ModelError for one that is not of tokens."""
    key = "tokenizer.ggml.merges"
    # Of a merge that is there twice the first counts.
    merges: dict[tuple[str, str], None] = {}
    for i, merge in enumerate(file.require(key, list)):
        # A symbol can begin with a space of its own: the cut is the first space after that.
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or any(token not in ids for token in (left, right, left + right)):
            raise ModelError(
                f"{file.path}: metadata key {key}: merge {i} is {merge!r:.80}, expected two tokens, a space"
                " between them, that make a third"
            )
        merges.setdefault((left, right))
    return list(merges)


def _character_pairs(file: GGUFFile, tokens: list[str]) -> tokenizers.Tokenizer:
    """`gemma4`: characters, a space written as SentencePiece does, merged in the order of the file's merges;
    line ends stay among themselves. What is no token becomes bytes."""
    ids = {token: i for i, token in enumerate(tokens)}
    unknown = _token_id(file, "unknown", len(tokens), None)
    library = tokenizers.Tokenizer(
        models.BPE(
            ids,
            _merges(file, ids),
            unk_token=None if unknown is None else tokens[unknown],
            byte_fallback=True,
            # For runs of line ends, which no merges make; a whole line that is a token, its merges make too.
            ignore_merges=True,
        )
    )
    library.normalizer = normalizers.Replace(" ", SPACE)
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    return library


def _byte_pairs(file: GGUFFile, tokens: list[str], pretokenizer: PreTokenizer) -> tokenizers.Tokenizer:
    """`gpt2`: bytes, written as symbols, merged in the order of the file's merges."""
    ids = {token: i for i, token in enumerate(tokens)}
    merges = _merges(file, ids)
    library = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=pretokenizer.ignore_merges))
    cuts: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pretokenizer.patterns
    ]
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    missing = [symbol for symbol in _BYTE_OF_SYMBOL if symbol not in ids]
    if missing:
        # The library would drop these itself, but merge what stood on either side.
        cuts.append(pre_tokenizers.Split(Regex(f"[{re.escape(''.join(missing))}]"), "removed"))
    library.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    return library


def _sentence_piece(
    file: GGUFFile, tokens: list[str], types: np.ndarray, prefixed: bool
) -> tokenizers.Tokenizer:
    """`llama`: characters, merged to whichever token has the best score; bytes for what is no token."""
    scores = _per_token(file, "tokenizer.ggml.scores", len(tokens))
    unknown = _token_id(file, "unknown", len(tokens), 0) or 0
    ids = {token: i for i, token in enumerate(tokens)}
    # The pairs that make a token, and are tokens: what merges best comes first.
    order: list[tuple[float, int, int]] = []
    for i, token in enumerate(tokens):
        if types[i] in (_UNKNOWN, _CONTROL, _BYTE):
            continue
        score = -float(scores[i])
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                order.append((score, left, right))
    order.sort()
    library = tokenizers.Tokenizer(
        models.BPE(
            ids,
            [(tokens[left], tokens[right]) for _, left, right in order],
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    library.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces] if prefixed else [spaces])
    return library


def _pair_by_pair(
    file: GGUFFile, tokens: list[str], types: np.ndarray, own: list[str], prefixed: bool
) -> SentencePiece | None:
    """Merging place by place, for vocabularies in which two tokens that merge have one score; else None."""
    scores = _per_token(file, "tokenizer.ggml.scores", len(tokens))
    ids = {token: i for i, token in enumerate(tokens)}
    made = {
        token: float(scores[i])
        for token, i in ids.items()
        if types[i] not in (_UNKNOWN, _CONTROL, _BYTE)
        and any(token[:cut] in ids and token[cut:] in ids for cut in range(1, len(token)))
    }
    ordinary = [score for token, score in made.items() if types[ids[token]] == _NORMAL]
    if len(set(ordinary)) == len(ordinary):
        return None
    return SentencePiece(
        {token: i for token, i in ids.items() if types[i] not in (_UNKNOWN, _CONTROL, _BYTE)},
        made,
        unknown=_token_id(file, "unknown", len(tokens), 0) or 0,
        byte_ids={int(tokens[i][3:5], 16): int(i) for i in np.flatnonzero(types == _BYTE)},
        own={token: ids[token] for token in own},
        prefixed=prefixed,
    )


def _symbols() -> dict[str, int]:
    """The symbols that `gpt2` vocabularies write bytes as: a byte that prints, in Latin-1, is its own
    character; the others are the characters from 256 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_SYMBOL = _symbols()
