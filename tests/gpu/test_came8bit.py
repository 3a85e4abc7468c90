"""CAME8bit on a GPU: against the same optimizer on the CPU, and as a CUDA graph."""

import copy

import pytest
import torch
from helpers import dtype_id, needs_gpu, normal_gradients, normal_parameters

from sana_ext import _extension
from sana_ext.optim import CAME8bit

pytestmark = needs_gpu
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
CODES = [None, "256-dynamic", "2048-linear"]
#: More parameters than one launch of the table has room for; rows of several tiles, strips and blocks, odd ones, rows
#: that share a block, vectors, a batch of matrices, nothing.
SHAPES = [
    (300, 2240),
    (130, 5600),
    (37, 701),
    (700, 3),
    (500, 1, 3, 3),
    (3, 4, 30, 50),
    (0, 4),
    (1, 1),
    (),
    *[(33,)] * 150,
]


def test_the_compiled_kernel_answers():
    assert _extension.has_kernel("came8bit_step", "cuda")


@dtypes
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    "options", [{}, {"bias_correction": True}, {"stochastic_rounding": True}, {"capturable": True}], ids=str
)
def test_steps_are_those_of_the_cpu(code, dtype, options):
    """From the CPU's state each time: parameters and statistics to rounding, at least 99.9 % of the bytes."""
    ours, peer = normal_parameters(SHAPES, dtype, "cuda"), normal_parameters(SHAPES, dtype, "cpu")
    optimizers = [CAME8bit(params, 1e-2, code=code, min_8bit_size=100, **options) for params in (ours, peer)]
    for t in range(3):
        for params, optimizer in zip((ours, peer), optimizers):
            normal_gradients(params, t)
            optimizer.step()
        wrong = values = 0
        for p, q in zip(ours, peer):
            spacing = 2**-8 if dtype == torch.bfloat16 else 4e-6
            far = (p.cpu().double() - q.double()).abs() > spacing * q.double().abs() + 4e-6
            assert far.float().mean() < 1e-3 or far.sum() <= 1
            for key, value in optimizers[1].state[q].items():
                got = optimizers[0].state[p][key]
                if value.dtype == torch.uint8:
                    off = (got.cpu().int() - value.int()).abs()
                    assert off.max() <= 1
                    wrong, values = wrong + (off > 0).sum().item(), values + off.numel()
                else:
                    torch.testing.assert_close(got.cpu(), value, rtol=2e-5, atol=1e-7, msg=f"{list(p.shape)} {key}")
                got.copy_(value)
            p.data.copy_(q.data)
        assert wrong <= 1e-3 * values


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_bad_gradient_touches_nothing(bad):
    params = normal_parameters(SHAPES, torch.bfloat16, "cuda")
    optimizer = CAME8bit(params, 1e-2)
    normal_gradients(params, 0)
    optimizer.step()
    before = copy.deepcopy([params, [dict(optimizer.state[p]) for p in params]])
    params[-1].grad[-1] = bad
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(params, before[0]))
    assert all(torch.equal(optimizer.state[p][k], v) for p, s in zip(params, before[1]) for k, v in s.items())


def test_two_runs_have_the_same_bits():
    runs = []
    for _ in range(2):
        params = normal_parameters(SHAPES, torch.bfloat16, "cuda")
        optimizer = CAME8bit(params, 1e-2)
        for t in range(3):
            normal_gradients(params, t)
            optimizer.step()
        runs.append([*params, *(v for p in params for v in optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_a_captured_step_is_a_step():
    params, plain = (normal_parameters(SHAPES, torch.bfloat16, "cuda") for _ in range(2))
    captured, expected = (CAME8bit(list_, 1e-2, capturable=True, stochastic_rounding=True) for list_ in (params, plain))
    normal_gradients(params, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    graph.replay()
    graph.replay()
    normal_gradients(plain, 0)
    for _ in range(3):
        expected.step()
    assert all(torch.equal(p, q) for p, q in zip(params, plain))
    assert captured.state[params[0]]["step"].item() == 3
