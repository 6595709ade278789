"""Merges as people have them: right ones, and some with one line broken."""

import math

import torch


def right(o_a, lse_a, o_b, lse_b):
    """Weights over a common maximum; two empty parts are one."""
    m = torch.maximum(lse_a, lse_b)
    m = torch.where(torch.isneginf(m), 0.0, m)
    a, b = torch.exp(lse_a - m), torch.exp(lse_b - m)
    total = a + b
    safe = torch.where(total == 0, 1.0, total)
    out = (a[..., None] * o_a.float() + b[..., None] * o_b.float()) / safe[..., None]
    return out.to(o_a.dtype), torch.where(total == 0, -math.inf, m + torch.log(safe))


def base2(o_a, lse_a, o_b, lse_b):
    """The same of an lse in base 2, as FlashInfer has it."""
    out, lse = right(o_a, lse_a * math.log(2), o_b, lse_b * math.log(2))
    return out, lse / math.log(2)


def normalised(o_a, lse_a, o_b, lse_b):
    """Weights exp(lse_a - lse): right, to other bits."""
    lse = torch.logaddexp(lse_a, lse_b)
    safe = torch.where(torch.isneginf(lse), 0.0, lse)
    out = torch.exp(lse_a - safe)[..., None] * o_a + torch.exp(lse_b - safe)[..., None] * o_b
    return out.to(o_a.dtype), lse


def careless(o_a, lse_a, o_b, lse_b):
    """Right but where both are empty."""
    m = torch.maximum(lse_a, lse_b)
    a, b = torch.exp(lse_a - m), torch.exp(lse_b - m)
    return (a[..., None] * o_a + b[..., None] * o_b) / (a + b)[..., None], m + torch.log(a + b)


def writes(output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse=None):
    """As vLLM has it: into what it is given, the lse heads first."""
    out, lse = right(prefix_output, prefix_lse.T, suffix_output, suffix_lse.T)
    output.copy_(out)
    output_lse.copy_(lse.T)


def read_as_base_e(o_a, lse_a, o_b, lse_b):
    """An lse in base 2 that is taken for a natural one."""
    return right(o_a, lse_a, o_b, lse_b)


def mean(o_a, lse_a, o_b, lse_b):
    return (o_a + o_b) / 2, torch.logaddexp(lse_a, lse_b)


def second_lost(o_a, lse_a, o_b, lse_b):
    return o_a, lse_a


def no_common_maximum(o_a, lse_a, o_b, lse_b):
    a, b = torch.exp(lse_a), torch.exp(lse_b)
    return (a[..., None] * o_a + b[..., None] * o_b) / (a + b)[..., None], torch.log(a + b)


def lse_of_the_larger(o_a, lse_a, o_b, lse_b):
    return right(o_a, lse_a, o_b, lse_b)[0], torch.maximum(lse_a, lse_b)


def weights_in_16_bits(o_a, lse_a, o_b, lse_b):
    w = torch.sigmoid(lse_a - lse_b).bfloat16().float()
    return w[..., None] * o_a + (1 - w)[..., None] * o_b, torch.logaddexp(lse_a, lse_b)


def next_heads_weight(o_a, lse_a, o_b, lse_b):
    out, _ = right(o_a, lse_a.roll(1, -1), o_b, lse_b.roll(1, -1))
    return out, torch.logaddexp(lse_a, lse_b)


def one_number(o_a, lse_a, o_b, lse_b):
    return o_a
