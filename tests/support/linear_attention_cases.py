"""What several test files share of linear attention."""

import pytest
import torch
from helpers import (
    rand,
)

import sana_ext
from sana_ext import reference

NORMS = {"no norms": (), "both norms": ("weight_q", "weight_k"), "norm q": ("weight_q",), "norm k": ("weight_k",)}

has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key("sana_ext::linear_attention_forward", "CPU")

compiled_only = pytest.mark.skipif(not has_kernel, reason="a property of the compiled kernels, which are not built")


def maker(B, N, H, D, norms=NORMS["both norms"], q=1.0, k=1.0):
    """Inputs of a case; q and k are the magnitudes of the queries and keys."""

    def make(seed):
        rows = {n: rand(seed + i, B, N, H, D, scale=s) for i, (n, s) in enumerate((("q", q), ("k", k), ("v", 1.0)))}
        return rows | {w: 1 + rand(seed + i, H * D, scale=0.3) for i, w in enumerate(norms, 7)}

    return make


def packed(make):
    def packed_make(seed):
        v = make(seed)
        return {"qkv": torch.stack([v.pop("q"), v.pop("k"), v.pop("v")], 2).flatten(2)} | v

    return packed_make


def functions(heads=None, **scalars):
    """(op, reference) with scalars bound; of the packed form where heads are given."""

    def of(module):
        if heads is None:
            return lambda q, k, v, **weights: module.linear_attention(q, k, v, **weights, **scalars)
        return lambda qkv, **weights: module.linear_attention_qkv(qkv, heads, **weights, **scalars)

    return of(sana_ext), of(reference)
