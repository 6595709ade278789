"""Attention of other libraries behind our contract, each loaded only where it is installed.

peer          what they share: rows one at a time, refusals, the launch trace
sdpa          torch.nn.functional.scaled_dot_product_attention, one backend of it
flex          torch's FlexAttention
libraries     FlashInfer, flash-attn, xFormers
"""
