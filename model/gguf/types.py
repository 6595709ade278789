"""The types that tensors of GGUF files have, by their ids: how each stores a row, and which are refused.

Nothing here decodes a weight (`verify.model.gguf.decoders`).
"""

from __future__ import annotations

from typing import NamedTuple


class TensorType(NamedTuple):
    """How a type stores a row: row_header bytes, then block_bytes for every block_size weights."""

    name: str
    block_size: int
    block_bytes: int
    row_header: int = 0

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights, a multiple of block_size."""
        return self.row_header + width // self.block_size * self.block_bytes


# ggml's types by id. From 133 on they are ik_llama.cpp's own.
TENSOR_TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4), 1: TensorType("F16", 1, 2), 2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20), 6: TensorType("Q5_0", 32, 22), 7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34), 10: TensorType("Q2_K", 256, 84), 11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144), 13: TensorType("Q5_K", 256, 176), 14: TensorType("Q6_K", 256, 210),
    16: TensorType("IQ2_XXS", 256, 66), 17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98), 19: TensorType("IQ1_S", 256, 50), 20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110), 22: TensorType("IQ2_S", 256, 82), 23: TensorType("IQ4_XS", 256, 136),
    24: TensorType("I8", 1, 1), 25: TensorType("I16", 1, 2), 26: TensorType("I32", 1, 4),
    27: TensorType("I64", 1, 8), 28: TensorType("F64", 1, 8), 29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2), 34: TensorType("TQ1_0", 256, 54), 35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17), 40: TensorType("NVFP4", 64, 36), 133: TensorType("Q6_0", 32, 26),
    137: TensorType("IQ2_K", 256, 76), 138: TensorType("IQ3_K", 256, 110),
    139: TensorType("IQ4_K", 256, 144), 140: TensorType("IQ5_K", 256, 176),
    141: TensorType("IQ6_K", 256, 212), 144: TensorType("IQ4_KS", 256, 136, 4),
    145: TensorType("IQ2_KS", 256, 70, 2), 146: TensorType("IQ4_KSS", 256, 128, 4),
    152: TensorType("IQ5_KS", 256, 168, 4), 153: TensorType("IQ2_KT", 256, 68, 4),
    154: TensorType("IQ3_KT", 256, 100, 4), 155: TensorType("IQ4_KT", 256, 128, 4),
    156: TensorType("IQ3_KS", 256, 102, 2), 157: TensorType("IQ2_KL", 256, 86, 2),
    158: TensorType("IQ1_KT", 256, 56, 4),
}  # fmt: skip
TYPES_BY_NAME = {kind.name: kind for kind in TENSOR_TYPES.values()}

# Types of ik_llama.cpp that keep several rows interleaved, with how many: the id is that of the plain type
# and 200. Their plain files hold the same weights.
INTERLEAVED_IDS = range(202, 400)
INTERLEAVED: dict[int, str] = {
    202: "Q4_0_R8", 206: "Q5_0_R4", 208: "Q8_0_R8", 210: "Q2_K_R4", 211: "Q3_K_R4", 212: "Q4_K_R4",
    213: "Q5_K_R4", 214: "Q6_K_R4", 216: "IQ2_XXS_R4", 217: "IQ2_XS_R4", 218: "IQ3_XXS_R4", 219: "IQ1_S_R4",
    220: "IQ4_NL_R4", 221: "IQ3_S_R4", 222: "IQ2_S_R4", 223: "IQ4_XS_R8", 229: "IQ1_M_R4", 230: "BF16_R16",
    233: "Q6_0_R4", 335: "IQ2_BN_R4", 337: "IQ2_K_R4", 338: "IQ3_K_R4", 339: "IQ4_K_R4", 340: "IQ5_K_R4",
    344: "IQ4_KS_R4", 352: "IQ5_KS_R4", 398: "Q8_KV_R8", 399: "Q8_K_R8",
}  # fmt: skip
# Types that no oracle was at hand for, or that never hold a model's weights.
REFUSED: dict[int, str] = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "I2_S",
    37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 41: "Q1_0", 97: "Q8_0_X4", 98: "Q8_1_X4", 99: "Q8_2_X4",
    134: "IQ1_BN", 135: "IQ2_BN", 136: "Q8_K64", 147: "Q8_K16", 148: "Q8_K32", 149: "Q8_KR8", 150: "Q8_K128",
    151: "Q8_KV",
}  # fmt: skip


def why_refused(type_id: int) -> str:
    """What to tell of a tensor whose type is not in TENSOR_TYPES."""
    if type_id in INTERLEAVED_IDS:
        name = INTERLEAVED.get(type_id, "a type")
        plain = name.rpartition("_R")[0]
        use = f"the plain file, of {plain}" if plain in TYPES_BY_NAME else "a file of a plain type"
        return (
            f"type {type_id} is {name} of ik_llama.cpp, with rows interleaved, which is not read: use {use}"
        )
    if type_id in REFUSED:
        return f"type {type_id} is {REFUSED[type_id]}, which is not decoded: use a file of another type"
    return f"type {type_id} is not a tensor type known here"
