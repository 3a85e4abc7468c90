"""Arguments whose elements share memory, begin anywhere, or do not lie side by side: what a copy of them gives.

Forward and gradients; the gradient of a shared element is the sum over the places where it is seen.
"""

import pytest
import torch
from helpers import DTYPES, dtype_id

import sana_ext
from sana_ext import _selftest
from sana_ext.ops import __all__ as PUBLIC


def strides(shape, kind):
    """(strides, storage offset) of one way to lie in memory."""
    *outer, inner = shape
    dense = [1]
    for length in reversed(shape[1:]):
        dense.insert(0, dense[0] * length)
    if kind == "rows one element apart":  # as `unfold` makes them
        step, offset = 1, 0
    elif kind == "rows half a row apart":
        step, offset = max(1, inner // 2), 3
    elif kind == "rows a gap apart":
        step, offset = inner + 5, 7
    elif kind == "expanded batch":
        return [0, *dense[1:]], 0
    elif kind == "expanded rows":
        return [dense[0], 0, *dense[2:]] if len(shape) > 2 else [0, 1], 0
    elif kind == "expanded last":
        return [*(max(1, d // inner) for d in dense[:-1]), 0], 1
    elif kind == "every second":
        return [2 * d for d in dense], 1
    else:  # the last dimension outermost
        return [torch.Size(outer[i + 1 :]).numel() for i in range(len(outer))] + [torch.Size(outer).numel()], 0
    result = [step]
    for length in reversed(outer[1:]):
        result.insert(0, result[0] * length)
    return [*result, 1] if len(shape) > 1 else [1], offset


KINDS = [
    "rows one element apart",
    "rows half a row apart",
    "rows a gap apart",
    "expanded batch",
    "expanded rows",
    "expanded last",
    "every second",
    "transposed",
]


def run(op, tensors, others, name, kind, copied):
    shape = list(tensors[name].shape)
    steps, offset = strides(shape, kind)
    size = offset + 1 + sum((length - 1) * step for length, step in zip(shape, steps))
    generator = torch.Generator().manual_seed(5)
    base = (torch.randn(size, generator=generator) * 0.5).to(tensors[name].dtype).requires_grad_()
    view = base.as_strided(shape, steps, offset)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items() if n != name}
    given = {**leaves, name: view.contiguous() if copied else view}
    assert copied or kind == "rows a gap apart" or given[name].stride() == tuple(steps)
    result = getattr(sana_ext, op)(**given, **others)
    outputs = result if isinstance(result, tuple) else (result,)
    cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [base, *leaves.values()], cotangents)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [DTYPES[0], torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("op", PUBLIC)
def test_any_strides(request, op, dtype, kind):
    tensors, others = _selftest._case(op)
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    arithmetic = (
        ["own", "upcast"] if dtype == torch.bfloat16 and op in ("linear", "cross_attention", "glumbconv") else [""]
    )
    for which in arithmetic:
        if which == "upcast":
            request.getfixturevalue("upcast")
        for name, t in tensors.items():
            if t.dim() == 1 and (kind not in ("every second", "expanded last") or dtype == torch.bfloat16):
                continue
            view, copy = (run(op, tensors, others, name, kind, copied) for copied in (False, True))
            for i, (a, b) in enumerate(zip(view, copy)):
                # A library's matrix product takes another path for other strides.
                close = 1e-10 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else 0.02
                scale = b.abs().max().item() + 1e-6
                assert (a - b).abs().max() <= close * scale, f"{name}, result {i}"


@pytest.mark.parametrize("needs_gradients", [False, True])
def test_windows_of_one_sequence(needs_gradients):
    """Queries, keys and values of cross_attention as windows over one tensor of tokens."""
    tokens = torch.randn(2, 3, 20, 16, requires_grad=needs_gradients)
    windows = tokens.unfold(2, 5, 1).transpose(-1, -2)  # [2, 3, 16 windows, 5, 16]
    q, k, v = windows[:, :, 0], windows[:, :, 3], windows[:, :, 9]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    expected = sana_ext.cross_attention(*(t.contiguous() for t in (q, k, v)))
    torch.testing.assert_close(sana_ext.cross_attention(q, k, v), expected)
