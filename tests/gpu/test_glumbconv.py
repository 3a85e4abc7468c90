"""dwconv_glu's CUDA kernels at SANA's sizes, against the reference in fp64; graphs, streams, repeatability."""

import pytest
import torch
from helpers import EPS32, assert_compiles, dtype_id, max_abs, needs_gpu, opcheck, outputs_and_gradients, rand, rms

import sana_ext
from sana_ext import _extension, reference

pytestmark = needs_gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, height, width, F): one pixel, odd sizes, ragged runs, several tiles and strips, then 1600M and 600M at 512, 1024 and
# 2048 pixels
SHAPES = [
    (1, 1, 1, 1), (2, 7, 5, 33), (1, 3, 37, 40), (3, 70, 9, 16), (0, 3, 4, 8), (1, 129, 64, 24),
    (2, 16, 16, 5600), (2, 32, 32, 5600), (1, 23, 44, 2880), (1, 64, 64, 2880),
]  # fmt: skip


def inputs(shape, dtype, seed=0):
    B, height, width, F = shape
    return {
        "u": rand(seed, B, height * width, 2 * F, scale=1.5).to("cuda", dtype),
        "weight": rand(seed + 1, 2 * F, 1, 3, 3, scale=0.4).to("cuda", dtype),
        "bias": rand(seed + 2, 2 * F, scale=0.5).to("cuda", dtype),
    }


def on_grid(op, height, width):
    return lambda u, weight, bias: op(u, weight, bias, height, width)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_forward_and_gradients(shape, dtype):
    given = inputs(shape, dtype)
    ours, peer = (
        outputs_and_gradients(on_grid(f, *shape[1:3]), given, 0) for f in (sana_ext.dwconv_glu, reference.dwconv_glu)
    )
    exact = {name: t.double() for name, t in given.items()}
    truth = outputs_and_gradients(on_grid(reference.dwconv_glu, *shape[1:3]), exact, 0)
    for name, t in truth.items():
        assert ours[name].shape == t.shape
        assert ours[name].dtype == dtype
        if not t.numel():
            continue
        for err in (max_abs, rms):
            allowed = 2 * err(peer[name].double() - t) + 4 * EPS32 * max_abs(t)
            assert err(ours[name].double() - t) <= allowed, name


def test_the_compiled_kernels_answer():
    for direction in ("forward", "backward"):
        assert _extension.has_kernel(f"dwconv_glu_{direction}", "cuda")
    assert sana_ext.kernel_info("dwconv_glu", F=5600)[1].path == "tuned"
    assert sana_ext.kernel_info("dwconv_glu", F=33)[1].path == "generic"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_far_tails_of_silu(dtype):
    """Far below zero SiLU vanishes, far above it is the identity: also where sigmoid is an approximation."""
    values = torch.tensor([0.0, -8.0, -12.0, -20.0, -100.0, -1e4, 8.0, 20.0, 1e4], dtype=torch.float64)
    u = values.repeat_interleave(2 * 8).reshape(9, 1, 16).to("cuda", dtype)
    weight = torch.zeros(16, 1, 3, 3, dtype=dtype, device="cuda")
    weight[:8, 0, 1, 1] = 1  # a = silu(u)
    bias = torch.tensor([0.0] * 8 + [16.0] * 8, dtype=dtype, device="cuda")  # silu(g) = 16
    expected = 16 * torch.nn.functional.silu(u[..., :8].double())
    step = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    close = expected.abs() * step + 16 * step
    assert ((sana_ext.dwconv_glu(u, weight, bias, 1, 1).double() - expected).abs() <= close).all()


def test_strided_input():
    given = inputs((2, 5, 9, 40), torch.bfloat16)
    u = given["u"]
    expected = outputs_and_gradients(on_grid(sana_ext.dwconv_glu, 5, 9), given, 0)
    for strided in (
        torch.cat([u, u * 9], 2)[..., :80],  # still copied 16 bytes at a time
        torch.cat([u, u * 9, u[..., :1]], 2)[..., :80],  # not any more
        u.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        got = sana_ext.dwconv_glu(**given | {"u": strided}, height=5, width=9)
        torch.testing.assert_close(got, expected["out0"], rtol=2e-2, atol=2e-2)


def test_cuda_graph_stream_and_repeatability():
    """Forward and backward in a graph give, on new data, the bits that they give outside of it."""
    given = inputs((2, 32, 32, 5600), torch.bfloat16)
    dout = rand(7, 2, 1024, 5600).to("cuda", torch.bfloat16)

    def run():
        out = torch.ops.sana_ext.dwconv_glu_forward(*given.values(), 32, 32)
        return out, *torch.ops.sana_ext.dwconv_glu_backward(dout, *given.values(), 32, 32, True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (20, 30):
        given["u"].copy_(rand(seed, 2, 1024, 11200))
        graph.replay()
        for _ in range(3):
            for a, b in zip(captured, run()):
                assert torch.equal(a, b)


def test_opcheck_and_compile():
    given = list(inputs((2, 3, 4, 8), torch.float32).values())
    opcheck(torch.ops.sana_ext.dwconv_glu_forward, (*given, 3, 4))
    assert_compiles(on_grid(sana_ext.dwconv_glu, 3, 4), given)


def test_float64_is_refused():
    with pytest.raises(TypeError, match="u has dtype float64; cuda supports float32, bfloat16, float16"):
        sana_ext.dwconv_glu(**inputs((1, 1, 2, 8), torch.float64), height=1, width=2)
