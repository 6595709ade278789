"""Attention of other libraries behind our contract, each loaded only where it is installed.

peer          what they share: rows one at a time, refusals, the launch trace
sdpa          torch.nn.functional.scaled_dot_product_attention, one backend of it
flex          torch's FlexAttention
hubs          kernels of Hugging Face's hub, and attention functions of transformers
libraries     FlashInfer, flash-attn, xFormers
"""
