"""The corpus of known faults: `FAULTS` says what each does, and where it was seen."""

from __future__ import annotations

from verify.kernels.faults.dispatch import NeverRan, OtherHeadSize
from verify.kernels.faults.heads import (
    GroupDoesNotDivide,
    HeadsInterleaved,
    LastColumns,
    SecondGroupsQuery,
    SinkOfFirstGroup,
)
from verify.kernels.faults.keys import (
    CutKeyLost,
    CutKeyTwice,
    FirstRowsLength,
    KeyBeyond,
    LastKeyDropped,
    LoneKeyDropped,
    OffsetWraps,
    OffsetWraps32,
    PaddingSeen,
    PartialTileDropped,
    PrefillKeyDropped,
    StridesIgnored,
    TilesSwapped,
    WindowDropped,
    WindowOffByOne,
)
from verify.kernels.faults.merging import (
    Base2Lse,
    Base2Merge,
    EmptyPartFinite,
    EmptyPartNaN,
    EmptyRowNaN,
    EmptyRowPlusInf,
    FixUpColumns,
    LastPartLost,
    MeanOfParts,
    NoCommonMaximum,
    PartOfOtherBatch,
    Race,
)
from verify.kernels.faults.record import Fault
from verify.kernels.faults.rounding import (
    ExpandedTwice,
    F16Logits,
    F16Overflow,
    ScaleOfResult,
    ScaleOfValueSize,
    SlightScale,
    UndeclaredF16,
    WrongCacheType,
)
from verify.kernels.faults.softmax import (
    AlibiDropped,
    LateMaximum,
    NoRescaleOfA,
    NoRescaleOfL,
    SinkInEveryPart,
    SinksDropped,
    SoftcapDropped,
)
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.kernel import Kernel


def _fault(
    name: str,
    kind: type[TileKernel],
    what: str,
    *references: str,
    **options: object,
) -> Fault:
    def build() -> Kernel:
        return kind(name, **options)  # type: ignore[arg-type]

    written = [f"{key}={'+'.join(map(str, x)) if isinstance(x, tuple) else x}" for key, x in options.items()]
    plan = ",".join(written) or "kv=1"
    needs = "cuda" if kind is OffsetWraps32 else ""
    return Fault(name, what, references or ("emulated",), plan, build, needs)  # type: ignore[arg-type]


FAULTS: tuple[Fault, ...] = (
    _fault("base-2 merge", Base2Merge, "merge weights from a base-2 lse read as base e", "SGLang #40903",
           "SGLang #35045", "FlashInfer #2113", "vLLM #47079", kv=3),
    _fault("base-2 lse", Base2Lse, "the returned lse is in base 2", "FlashInfer #2113"),
    _fault("mean of parts", MeanOfParts, "parts are averaged without weights", kv=3),
    _fault("last part lost", LastPartLost, "parts beyond a power of two are not merged", kv=3),
    _fault("no common maximum", NoCommonMaximum, "merge weights overflow or underflow", "vLLM #49294", kv=3),
    _fault("fix-up columns", FixUpColumns, "the stream-k fix-up writes the wrong columns",
           "llama.cpp #17089", kv=3),
    _fault("part of other batch", PartOfOtherBatch, "the combine kernel's stride over the batch is wrong",
           "FlagGems #5235", "FlagGems #5236", "vllm flash-attention #176", kv=3),
    _fault("empty part NaN", EmptyPartNaN, "a part that sees no key gives NaN", "FlashInfer #4051",
           "vLLM #28181", "PyTorch #103749", "PyTorch #110213", kv=3),
    _fault("empty part finite", EmptyPartFinite, "a part that sees no key has a finite lse",
           "vLLM #28181", "vLLM #49294", kv=3),
    _fault("empty row +inf", EmptyRowPlusInf, "an empty row has lse +inf", "vLLM #49294"),
    _fault("empty row NaN", EmptyRowNaN, "an empty row gives NaN", "PyTorch #103749", "PyTorch #110213"),
    _fault("race", Race, "blocks race: now and then a part is merged before it is written", "ik #1104", kv=3),
    _fault("last key dropped", LastKeyDropped, "the newest key is not seen", "llama.cpp #18487"),
    _fault("partial tile dropped", PartialTileDropped, "the last, partial tile is not read",
           "llama.cpp #18487", block=32),
    _fault("lone key dropped", LoneKeyDropped, "the last tile is lost where it holds one key",
           "PyTorch #191937", block=32),
    _fault("padding seen", PaddingSeen, "zero padding of the last tile counts as keys",
           "llama.cpp #18487"),
    _fault("first row's length", FirstRowsLength, "every row sees as many keys as the first of its call"),
    _fault("key beyond", KeyBeyond, "one key beyond kv_len is seen", "llama.cpp #18487"),
    _fault("cut key twice", CutKeyTwice, "the key at a cut counts in both parts", kv=3),
    _fault("cut key lost", CutKeyLost, "the key at a cut counts in no part", kv=3),
    _fault("tile read twice", TilesSwapped, "V of one tile is read in place of the next one's"),
    _fault("offset wraps", OffsetWraps, "an offset overflows its integer (16 bits here)", "llama.cpp #14840",
           "llama.cpp #23610", "llama.cpp #24945", "ik #1458", "flash-attention #772", "PyTorch #187227"),
    _fault("offset wraps at 2^31", OffsetWraps32, "an offset overflows 32 bits", "llama.cpp #14840",
           "flash-attention #772", block=16384),
    _fault("strides ignored", StridesIgnored, "K and V are read as if they were contiguous",
           "FlagGems #5235", "vllm flash-attention #176"),
    _fault("window dropped", WindowDropped, "the sliding window is not applied", "ik #1183"),
    _fault("window off by one", WindowOffByOne, "the sliding window holds one key more"),
    _fault("prefill key dropped", PrefillKeyDropped, "on the prefill path a row does not see its own key"),
    _fault("heads interleaved", HeadsInterleaved, "query head h reads KV head h % Hkv", "llama.cpp #19092"),
    _fault("group does not divide", GroupDoesNotDivide, "query head h reads KV head h // group",
           "llama.cpp #19092", "llama.cpp #19115", heads=(4, 2)),
    _fault("second group's query", SecondGroupsQuery, "the second head group reads the first group's q",
           heads=(4, 2)),
    _fault("second group's sinks", SinkOfFirstGroup, "the second head group takes the first group's sinks",
           heads=(4, 2)),
    _fault("last columns", LastColumns, "the last columns of one head are not written", "llama.cpp #17089"),
    _fault("accumulator not rescaled", NoRescaleOfA, "a is not rescaled when the maximum moves"),
    _fault("denominator not rescaled", NoRescaleOfL, "l is not rescaled when the maximum moves"),
    _fault("late maximum", LateMaximum, "the maximum is not updated in the last tile"),
    _fault("softcap dropped", SoftcapDropped, "softcap is not applied on the fast path", "ik #1183"),
    _fault("ALiBi dropped", AlibiDropped, "ALiBi is not applied on the fast path", "ik #1183"),
    _fault("sinks dropped", SinksDropped, "sinks are never applied", "ik #2087"),
    _fault("sink in every part", SinkInEveryPart, "the sink is counted once a part", kv=3),
    _fault("f16 overflow", F16Overflow, "a float16 accumulator overflows", "llama.cpp #17746",
           "llama.cpp #18614", "ik #1196"),
    _fault("undeclared f16", UndeclaredF16, "decode accumulates in float16, which nobody said", "ik #2144"),
    _fault("f16 logits", F16Logits, "Q K^T is kept in float16", "llama.cpp #17746"),
    _fault("wrong by 2 %", ScaleOfResult, "every result is 2 % too large"),
    _fault("wrong by 2e-4", SlightScale, "every result is 0.02 % too large"),
    _fault("softmax scale", ScaleOfValueSize, "the softmax scale is 0.2 % too large"),
    _fault("wrong cache type", WrongCacheType, "half of V is read as another type", "ik #1452"),
    _fault("expanded twice", ExpandedTwice, "the scales of a quantised cache are applied twice", "ik #1206"),
    _fault("never ran", NeverRan, "the new path never ran: one part and one group did", "ik #1973",
           "flash-attention #2901", kv=3, heads=(4, 2)),
    _fault("other head size", OtherHeadSize, "only head size 64 is right", "ik #1452"),
)  # fmt: skip
