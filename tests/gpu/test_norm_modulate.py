"""norm_modulate's CUDA kernel, and the ops that PyTorch still answers there, against the reference in fp64."""

import pytest
import torch
from helpers import assert_compiles, dtype_id, max_abs, needs_gpu, opcheck, rand, rms

import sana_ext
from sana_ext import _extension, reference

pytestmark = needs_gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, N, C): single elements, odd sizes, the published width, the longest row in shared memory and the first beyond it
SHAPES = [(1, 1, 1), (2, 7, 33), (3, 5, 257), (2, 64, 1152), (1, 1024, 2240), (1, 3, 8192), (1, 3, 8193), (0, 4, 16)]


def inputs(shape, dtype):
    B, N, C = shape
    values = {"x": rand(1, B, N, C), "shift": rand(2, B, C, scale=0.5), "scale": rand(3, B, C, scale=0.5)}
    return {name: t.to("cuda", dtype) for name, t in values.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_forward(shape, dtype):
    given = inputs(shape, dtype)
    truth = reference.norm_modulate(**{name: t.cpu().double() for name, t in given.items()})
    ours, peer = (f(**given).cpu().double() for f in (sana_ext.norm_modulate, reference.norm_modulate))
    assert ours.shape == truth.shape
    if not truth.numel():
        return
    for err in (max_abs, rms):
        assert err(ours - truth) <= 2 * err(peer - truth) + 4 * torch.finfo(torch.float32).eps * max_abs(truth)


def test_the_compiled_kernel_answers():
    assert _extension.has_kernel("norm_modulate_forward", "cuda")
    assert sana_ext.kernel_info("norm_modulate")[1].forward == "compiled"


def test_strided_input():
    given = inputs((2, 6, 96), torch.float32)
    x = given["x"]
    expected = sana_ext.norm_modulate(**given)
    for strided in (
        torch.cat([x, x * 9], 2)[..., :96],
        torch.cat([x, x * 9], 1)[:, :6],
        x.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert torch.equal(sana_ext.norm_modulate(**given | {"x": strided}), expected)
    row = given["shift"][:1]
    a, b = (sana_ext.norm_modulate(**given | {"shift": s}) for s in (row.expand(2, 96), row.repeat(2, 1)))
    assert torch.equal(a, b)


def test_gradients():
    """The forward's statistics, as the kernel leaves them, serve the backward."""
    given = inputs((2, 70, 96), torch.float32)
    results = []
    for function, dtype in ((sana_ext.norm_modulate, torch.float32), (reference.norm_modulate, torch.float64)):
        leaves = {name: t.to(dtype).requires_grad_() for name, t in given.items()}
        out = function(**leaves)
        results.append(torch.autograd.grad(out, list(leaves.values()), rand(9, *out.shape).to(out)))
    for a, b in zip(*results):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_current_stream_and_repeatability():
    given = inputs((2, 512, 2240), torch.bfloat16)
    expected = sana_ext.norm_modulate(**given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = given["x"] * 1  # ready only after the sleep, on this stream
        got = sana_ext.norm_modulate(**given | {"x": late})
    torch.cuda.synchronize()
    assert torch.equal(got, expected)


def test_opcheck_and_compile():
    given = list(inputs((2, 5, 48), torch.float32).values())
    opcheck(torch.ops.sana_ext.norm_modulate_forward, (*given, 1e-6, torch.float32))
    assert_compiles(sana_ext.norm_modulate, given)


def test_float64_is_refused():
    with pytest.raises(TypeError, match="x has dtype float64; cuda supports float32, bfloat16, float16"):
        sana_ext.norm_modulate(**inputs((1, 2, 8), torch.float64))
