"""Flash attention on CUDA, in Triton.

kernel      `FlashKernel` behind the contract, and what runs where it cannot
launch      the host side: from a checked call to launches
device      the device code: decode, prefill, the merge of parts
quantised   the decode code that reads a quantised cache
tiles       tile sizes, by what a device can hold
rows        plans of many rows at once
slots       the parts that the device wrote, counted
"""
