"""linear_attention's CUDA kernels at real sizes, against the reference in fp64; under CUDA graphs; run to run."""

import pytest
import torch
from helpers import assert_compiles, assert_matches, dtype_id, needs_gpu, opcheck, rand

import sana_ext
from sana_ext import reference

pytestmark = needs_gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, N, H, D): single elements, ragged, generic heads, the published ones, more tokens than one part
SHAPES = [
    (1, 1, 1, 1),
    (2, 67, 3, 5),
    (1, 131, 2, 72),
    (3, 33, 5, 32),
    (2, 1024, 70, 32),
    (1, 1024, 36, 32),
    (1, 4099, 20, 32),
]
WEIGHTS = ("weight_q", "weight_k")
with_and_without_norms = pytest.mark.parametrize("norms", [(), WEIGHTS], ids=["no norms", "both norms"])


def maker(B, N, H, D, norms=WEIGHTS, scale=1.0):
    def make(seed):
        rows = {n: rand(seed + i, B, N, H, D, scale=scale if n == "q" else 1.0).cuda() for i, n in enumerate("qkv")}
        return rows | {w: 1 + rand(seed + i, H * D, scale=0.3).cuda() for i, w in enumerate(norms, 7)}

    return make


def packed(values):
    return torch.stack([values["q"], values["k"], values["v"]], 2).flatten(2)


def low(make, dtype):
    return {n: v.to(dtype) for n, v in make(0).items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@with_and_without_norms
def test_forward_and_gradients(shape, dtype, norms):
    assert_matches(sana_ext.linear_attention, reference.linear_attention, maker(*shape, norms), dtype, seeds=1)


@pytest.mark.parametrize("eps", [1e-15, 1e-8])
@pytest.mark.parametrize("scale", [1e-6, 6e4])
@with_and_without_norms
def test_fp16_at_its_ends(scale, eps, norms):
    small = min(scale, 1.0)
    make = maker(2, 67, 3, 32, norms, scale)
    assert_matches(
        lambda **v: sana_ext.linear_attention(**v, eps=eps) * small,
        lambda **v: reference.linear_attention(**v, eps=eps) * small,
        lambda seed: {n: v.clamp(-6e4, 6e4) for n, v in make(seed).items()},
        torch.float16,
    )


def test_autocast_operands():
    """bf16 rows with fp32 weights."""
    dtypes = dict.fromkeys("qkv", torch.bfloat16) | dict.fromkeys(WEIGHTS, torch.float32)
    assert_matches(sana_ext.linear_attention, reference.linear_attention, maker(2, 300, 4, 32), dtypes)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_packed_equals_separate_bitwise(dtype):
    values = low(maker(2, 1024, 36, 32), dtype)
    weights = {w: values[w] for w in WEIGHTS}
    qkv = packed(values).requires_grad_()
    leaves = {n: v.clone().requires_grad_() for n, v in values.items()}
    a, b = sana_ext.linear_attention(**leaves), sana_ext.linear_attention_qkv(qkv, 36, **weights)
    assert torch.equal(a.flatten(2), b)
    cotangent = rand(1, *a.shape).to(a)
    rows = torch.autograd.grad(a, [leaves[n] for n in "qkv"], cotangent)
    assert torch.equal(torch.stack(rows, 2).flatten(2), torch.autograd.grad(b, qkv, cotangent.flatten(2))[0])


@pytest.mark.parametrize("eps", [1e-15, 1e-8])
def test_repeatable(eps):
    values = {n: v.requires_grad_() for n, v in low(maker(2, 1024, 70, 32), torch.bfloat16).items()}
    runs = []
    for _ in range(5):
        out = sana_ext.linear_attention(**values, eps=eps)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), list(values.values()))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))


def test_cuda_graph():
    """Forward and backward in one graph; other inputs at the replay."""
    make = maker(2, 1024, 36, 32)
    values = {n: v.requires_grad_() for n, v in low(make, torch.bfloat16).items()}

    def step():
        out = sana_ext.linear_attention(**values, eps=1e-8)
        return [out, *torch.autograd.grad(out.float().square().sum(), list(values.values()))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for n, v in make(5).items():
            values[n].copy_(v)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


def test_current_stream():
    values = low(maker(2, 1024, 70, 32), torch.bfloat16)
    expected = sana_ext.linear_attention(**values)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = {n: v * 1 for n, v in values.items()}  # ready only after the sleep, on this stream
        got = sana_ext.linear_attention(**late)
    torch.cuda.synchronize()
    assert torch.equal(got, expected)


def test_the_compiled_kernels_answer():
    for op in ("linear_attention", "linear_attention_qkv"):
        info = sana_ext.kernel_info(op, D=32)[1]
        assert (info.forward, info.backward, info.path) == ("compiled", "compiled", "tuned")


def test_opcheck_and_compile():
    values = low(maker(2, 35, 2, 32), torch.bfloat16)
    opcheck(torch.ops.sana_ext.linear_attention_forward, (*values.values(), 1e-5, 1e-8), torch.bfloat16)
    assert_compiles(lambda *v: sana_ext.linear_attention(**dict(zip(values, v))), list(values.values()))


def test_empty_batch():
    values = {n: v.requires_grad_() for n, v in low(maker(0, 4, 2, 32), torch.bfloat16).items()}
    out = sana_ext.linear_attention(**values)
    grads = torch.autograd.grad(out.sum(), list(values.values()))
    assert out.shape == (0, 4, 2, 32)
    assert not grads[3].any()
    assert not grads[4].any()
