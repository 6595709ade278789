"""The tokenizer of a model, built from its GGUF metadata on the `tokenizers` library.

`gpt2` files hold byte-level byte-pair encoding with its merges; `llama` files hold scores, from which the
merges follow. A corpus is text: control tokens that stand in it are cut like any other characters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Regex
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.decoders import ByteFallback, ByteLevel, Fuse, Replace
from tokenizers.decoders import Sequence as Decoders
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend
from tokenizers.normalizers import Replace as ReplaceText
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel as ByteLevelCut
from tokenizers.pre_tokenizers import PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as Cuts

from model.errors import ModelError
from model.gguf_file import GGUFFile
from model.pretokenizers import WHOLE_WORDS, pretokenizer_named

SPACE = "▁"
# Of the token types that a file gives, the ones that never come from plain text.
_CONTROL, _USER_DEFINED = 3, 4
# BOS is added unless the file says otherwise.
_ADDS_BOS = {"llama": True, "gpt2": False}


class Tokenizer:
    """Text to ids and back. `kind` is `tokenizer.ggml.model`, `pre` the pre-tokenizer's name, if any."""

    def __init__(self, file: GGUFFile) -> None:
        self.path = file.path
        self.kind: str = file.require("tokenizer.ggml.model", str)
        self._tokens: list[str] = file.require("tokenizer.ggml.tokens", list)
        if len(set(self._tokens)) != len(self._tokens):
            raise ModelError(f"{file.path}: tokenizer.ggml.tokens: a token is there twice")
        self.pre: str | None = None
        if self.kind == "gpt2":
            self.pre = file.metadata.get("tokenizer.ggml.pre", "default")
            self._library = _byte_level(file, self._tokens, str(self.pre))
        elif self.kind == "llama":
            self._library = _sentence_piece(file, self._tokens)
        else:
            raise ModelError(f"{file.path}: tokenizer.ggml.model is {self.kind!r}, expected gpt2 or llama")
        self.bos_id = _token_id(file, "bos", len(self._tokens))
        self.eos_id = _token_id(file, "eos", len(self._tokens))
        adds = _ADDS_BOS[self.kind] or self.pre == "llama-bpe"
        self.add_bos = bool(file.metadata.get("tokenizer.ggml.add_bos_token", adds))
        if self.add_bos and self.bos_id is None:
            raise ModelError(
                f"{file.path}: metadata key tokenizer.ggml.bos_token_id is missing, BOS is added"
            )

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """Raises ModelError naming the key that is missing or not understood."""
        return cls(file)

    @property
    def n_vocab(self) -> int:
        return len(self._tokens)

    def encode(self, text: str) -> np.ndarray:
        """Ids [n] int32 of a text, without BOS; control tokens in it are text."""
        return np.array(self._library.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        return self._library.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_text(self, token: int) -> str:
        """A token as the vocabulary writes it."""
        return self._tokens[token]


def _byte_level(file: GGUFFile, tokens: list[str], pre: str) -> LibraryTokenizer:
    merges = file.require("tokenizer.ggml.merges", list)
    pairs = []
    for merge in merges:
        # A symbol may itself begin with a space: the cut is the first one after position 0.
        cut = merge.find(" ", 1)
        if cut < 0:
            raise ModelError(f"{file.path}: tokenizer.ggml.merges: {merge!r} is not two symbols")
        pairs.append((merge[:cut], merge[cut + 1 :]))
    expressions = pretokenizer_named(pre, file.path)
    ids = {token: i for i, token in enumerate(tokens)}
    try:
        library = LibraryTokenizer(BPE(ids, pairs, ignore_merges=pre in WHOLE_WORDS))
    except Exception as error:
        raise ModelError(f"{file.path}: tokenizer.ggml.merges: {error}") from None
    cuts: list[PreTokenizer] = [Split(Regex(e), "isolated") for e in expressions]
    library.pre_tokenizer = Cuts([*cuts, ByteLevelCut(add_prefix_space=False, use_regex=False)])
    library.decoder = ByteLevel()
    return library


def _sentence_piece(file: GGUFFile, tokens: list[str]) -> LibraryTokenizer:
    """Merges of a vocabulary with scores: every split of a token into two, best score first."""
    scores = file.require("tokenizer.ggml.scores", np.ndarray)
    if len(scores) != len(tokens):
        raise ModelError(f"{file.path}: tokenizer.ggml.scores: {len(scores)} scores for {len(tokens)} tokens")
    ids = {token: i for i, token in enumerate(tokens)}
    types = file.metadata.get("tokenizer.ggml.token_type", np.ones(len(tokens), dtype=np.int32))
    unknown = _token_id(file, "unknown", len(tokens))
    found = []
    for token, i in ids.items():
        if types[i] in (_CONTROL, _USER_DEFINED) or (token.startswith("<0x") and token.endswith(">")):
            continue
        for cut in range(1, len(token)):
            a, b = ids.get(token[:cut]), ids.get(token[cut:])
            if a is not None and b is not None:
                found.append((-float(scores[i]), a, b))
    found.sort()
    model: Any = BPE(
        ids,
        [(tokens[a], tokens[b]) for _, a, b in found],
        byte_fallback=True,
        fuse_unk=True,
        unk_token=tokens[unknown] if unknown is not None else None,
    )
    library = LibraryTokenizer(model)
    spaces = ReplaceText(" ", SPACE)
    prefixed = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    library.normalizer = Normalizers([Prepend(SPACE), spaces]) if prefixed else spaces
    library.decoder = Decoders([Replace(SPACE, " "), ByteFallback(), Fuse()])
    return library


def _token_id(file: GGUFFile, which: str, n_vocab: int) -> int | None:
    key = f"tokenizer.ggml.{which}_token_id"
    value = file.metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < n_vocab:
        raise ModelError(f"{file.path}: {key} is {value!r}, expected an id below {n_vocab}")
    return value
