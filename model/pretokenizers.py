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


# A letter that is no small one of a-z, and one that is no capital of A-Z: the engine's stand-in for Unicode's
# cases, which it has no tables of.
_NOT_SMALL, _NOT_CAPITAL = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"


def _by_case(*, after: str, digits: str) -> str:
    """Words end before a capital; `after` may follow one."""
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{_NOT_SMALL}*{_NOT_CAPITAL}+{after}|{before}{_NOT_SMALL}+{_NOT_CAPITAL}*{after}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# Letters that have cases, as DeepSeek LLM's own expression lists them: code points, and first-last.
_CASED = """
    41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A
    38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF
    1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D
    1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4
    1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F
    2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F
    A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3
    104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""


def _characters(ranges: str) -> str:
    """A list of hexadecimal code points and ranges of them, as a class of an expression writes it."""
    return "".join("-".join(f"\\x{{{point}}}" for point in part.split("-")) for part in ranges.split())


_CJK = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+"

_LLAMA_BPE = PreTokenizer((_llama3(),), ignore_merges=True, add_bos=True)
_CHATGLM = PreTokenizer((_llama3(),))
_QWEN2 = PreTokenizer((_llama3(digits=r"\p{N}"),))
_GPT_2 = PreTokenizer((_GPT2,))
_SMOLLM = PreTokenizer((r"\p{N}", _GPT2))
_DEEPSEEK_V3 = PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK))
_GPT_4O = PreTokenizer((_by_case(after=f"{_CONTRACTIONS}?", digits=r"\p{N}{1,3}"),))


def _named(pretokenizer: PreTokenizer, names: str) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), pretokenizer)


PRETOKENIZERS: dict[str, PreTokenizer] = {
    **_named(_SMOLLM, "smollm refact starcoder command-r exaone minerva-7b"),
    **_named(_GPT_2, "gpt-2 phi-2 gigachat a.x-4.0 mpt olmo jais trillion"),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    **_named(_LLAMA_BPE, "llama-bpe llama3 llama-v3 falcon3 pixtral lfm2"),
    **_named(_QWEN2, "qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez kormo solar-open"),
    "qwen35": PreTokenizer(
        (_llama3(digits=r"\p{N}", letters=r"[\p{L}\p{M}]", not_other=r"\s\p{L}\p{M}\p{N}"),)
    ),
    **_named(_CHATGLM, "glm4 chatglm-bpe dbrx smaug-bpe"),
    **_named(_DEEPSEEK_V3, "deepseek-v3 hunyuan-dense joyai-llm"),
    # The two differ from the engines on white space that is rare: U+00A0, 1680, 2000-200A, 2028, 2029, 3000.
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_characters(_CASED)}]+",
            r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
            r"\s+$",
            _CJK,
            r"\p{N}+",
        )
    ),
    "tekken": PreTokenizer((_by_case(after="", digits=r"\p{N}"),), ignore_merges=True, add_bos=True),
    **_named(_GPT_4O, "gpt-4o llama4 minimax-m2"),
}


def pretokenizer_named(name: str, path: object) -> PreTokenizer:
    """The pre-tokenizer of a name; path: the file that names it. Raises ModelError for an unknown name."""
    found = PRETOKENIZERS.get(name)
    if found is None:
        known = ", ".join(PRETOKENIZERS)
        raise ModelError(f"{path}: metadata key tokenizer.ggml.pre is {name!r:.80}, expected one of: {known}")
    return found
