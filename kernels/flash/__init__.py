"""Flash attention on CUDA, in Triton; one reader of quantised caches also in CUDA C++.

kernel      `FlashKernel` behind the contract, and what runs where it cannot
launch      the host side: from a checked call to launches
device      the device code: decode, prefill, the merge of parts
quantised   the decode code that reads a quantised cache
wide        the same, a whole row of a tile at a time
compiled    the same in CUDA C++ (`reader.cu`, `ptx.cuh`), compiled at run time
tiles       tile sizes, by what a device can hold
rows        plans of many rows at once
slots       the parts that the device wrote, counted
"""
