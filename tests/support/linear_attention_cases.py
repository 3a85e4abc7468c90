"""What several test files share of linear attention."""

import torch
from helpers import rand

WEIGHTS = ("weight_q", "weight_k")


def maker(B, N, H, D, norms=WEIGHTS, scale=1.0):
    def make(seed):
        rows = {n: rand(seed + i, B, N, H, D, scale=scale if n == "q" else 1.0).cuda() for i, n in enumerate("qkv")}
        return rows | {w: 1 + rand(seed + i, H * D, scale=0.3).cuda() for i, w in enumerate(norms, 7)}

    return make


def packed(values):
    return torch.stack([values["q"], values["k"], values["v"]], 2).flatten(2)
