"""Where a text is cut before byte-pair merging, by the name in `tokenizer.ggml.pre`.

Each pre-tokenizer is a sequence of regular expressions: every match becomes a piece, so does what lies
between matches, and the next expression cuts the pieces further. An unknown name is refused: pieces that are
nearly right give ids that are nearly right, and a perplexity that looks right.
"""

from __future__ import annotations

from dataclasses import dataclass

from verify.model.errors import ModelError

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _llama3(*, digits: str = r"\p{N}{1,3}", letters: str = r"\p{L}", not_other: str = r"\s\p{L}\p{N}") -> str:
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}| ?[^{not_other}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# Unicode's \p{S} holds the tilde; ik_llama.cpp leaves it out, and cuts otherwise around one.
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """patterns: regular expressions, the first cuts first. ignore_merges: a piece that is a token is that
    token, whatever the merges would make of it. add_bos: whether BOS is added where the file does not say."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA_BPE = PreTokenizer((_llama3(),), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer((_llama3(digits=r"\p{N}"),))
_CHATGLM = PreTokenizer((_llama3(),))

PRETOKENIZERS: dict[str, PreTokenizer] = {
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "gpt-2": PreTokenizer((_GPT2,)),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "qwen35": PreTokenizer(
        (_llama3(digits=r"\p{N}", letters=r"[\p{L}\p{M}]", not_other=r"\s\p{L}\p{M}\p{N}"),)
    ),
    "glm4": _CHATGLM,
    "chatglm-bpe": _CHATGLM,
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK)),
}


def pretokenizer_named(name: str, path: object) -> PreTokenizer:
    """The pre-tokenizer of a name; path: the file that names it. Raises ModelError for an unknown name."""
    found = PRETOKENIZERS.get(name)
    if found is None:
        known = ", ".join(PRETOKENIZERS)
        raise ModelError(f"{path}: metadata key tokenizer.ggml.pre is {name!r:.80}, expected one of: {known}")
    return found
