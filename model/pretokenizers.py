"""Pre-tokenizers: how text is cut before byte-pair merging, by the name in `tokenizer.ggml.pre`.

Each is a list of regular expressions; every one cuts what the ones before it left. A name that is not known
is refused: a text that is cut in nearly the right places gives nearly the right perplexity.
"""

from __future__ import annotations

from model.errors import ModelError

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _llama3(digits: str, letters: str = r"\p{L}+", other: str = r"[^\s\p{L}\p{N}]+") -> str:
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}| ?{other}[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRETOKENIZERS: dict[str, tuple[str, ...]] = {
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "llama-bpe": (_llama3(r"\p{N}{1,3}"),),
    "glm4": (_llama3(r"\p{N}{1,3}"),),
    "chatglm-bpe": (_llama3(r"\p{N}{1,3}"),),
    "qwen2": (_llama3(r"\p{N}"),),
    "qwen35": (_llama3(r"\p{N}", r"[\p{L}\p{M}]+", r"[^\s\p{L}\p{M}\p{N}]+"),),
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK),
}
# Pre-tokenizers under which a word that is in the vocabulary whole is taken whole.
WHOLE_WORDS = frozenset({"llama-bpe"})


def pretokenizer_named(name: str, path: object) -> tuple[str, ...]:
    """The regular expressions of a name. Raises ModelError naming the file."""
    if name not in PRETOKENIZERS:
        known = ", ".join(PRETOKENIZERS)
        raise ModelError(f"{path}: tokenizer.ggml.pre is {name!r}, expected one of: {known}")
    return PRETOKENIZERS[name]
