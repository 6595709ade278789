"""A file as KernelBench has them: a reference, a kernel in its place, and inputs."""

import torch
import torch.nn as nn
import torch.nn.functional as F

results = []


class Model(nn.Module):
    def __init__(self, factor):
        super().__init__()

    def forward(self, Q, K, V):
        out = F.scaled_dot_product_attention(Q, K, V)
        results.append(out)
        return out


class ModelNew(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, Q, K, V):
        s = torch.matmul(Q, K.transpose(-1, -2)) * (Q.shape[-1] ** -0.5 * self.factor)
        return torch.matmul(torch.softmax(s, -1), V)


def get_inputs():
    return [torch.rand(2, 4, 64, 64) for _ in range(3)]


def get_init_inputs():
    return [1.0]
