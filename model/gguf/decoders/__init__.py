"""Stored blocks to weights: a short function for each tensor type, in plain torch on the bytes' device.

`decode` in verify.model.gguf.dequantize is what uses them. docs/tensor-types.md lists the types, what each
is held against, and its speed.
"""

from verify.model.gguf.decoders import few_values, i_quants, ik_quants, k_quants, legacy, trellis
from verify.model.gguf.decoders.blocks import Decoder, RowDecoder

DECODERS: dict[str, Decoder] = (
    legacy.DECODERS | k_quants.DECODERS | i_quants.DECODERS | few_values.DECODERS | ik_quants.DECODERS
)
# Of types whose rows begin with a scale.
ROW_DECODERS: dict[str, RowDecoder] = ik_quants.ROW_DECODERS | trellis.ROW_DECODERS
