"""AdamW8bit on a GPU: against the same optimizer on the CPU, and as a CUDA graph."""

import copy

import pytest
import torch
from helpers import dtype_id, needs_gpu, normal_gradients, normal_parameters

from sana_ext import _extension
from sana_ext.optim import AdamW8bit

pytestmark = needs_gpu
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
#: More parameters than one launch has room for, whole blocks and tails, 8-bit and fp32 states.
SHAPES = [(64, 100), (4096,), (5, 1001), (7,), (0,), *[(33,)] * 600]


def test_the_compiled_kernel_answers():
    assert _extension.has_kernel("adamw8bit_step", "cuda")


@dtypes
@pytest.mark.parametrize(
    "options", [{}, {"bitsandbytes_cuda_order": True}, {"stochastic_rounding": True}, {"capturable": True}], ids=str
)
def test_steps_are_those_of_the_cpu(dtype, options):
    """From the CPU's state each time: parameters to fp32 rounding, at least 99.9 % of the bytes, the others next to them."""
    ours, peer = normal_parameters(SHAPES, dtype, "cuda"), normal_parameters(SHAPES, dtype, "cpu")
    optimizers = [AdamW8bit(params, lr=1e-2, betas=(0.9, 0.99), **options) for params in (ours, peer)]
    for t in range(3):
        for params, optimizer in zip((ours, peer), optimizers):
            normal_gradients(params, t)
            optimizer.step()
        wrong = values = 0
        for p, q in zip(ours, peer):
            spacing = 2**-8 if dtype == torch.bfloat16 else 1e-6
            far = (p.cpu().double() - q.double()).abs() > spacing * q.double().abs() + 1e-6
            assert far.float().mean() < 1e-3 or far.sum() <= 1
            state, expected = optimizers[0].state[p], optimizers[1].state[q]
            if expected["state1"].dtype != torch.uint8:
                continue
            for name in ("state1", "state2"):
                off = (state[name].cpu().long() - expected[name].long()).abs()
                assert off.max() <= 1
                wrong, values = wrong + (off > 0).sum().item(), values + off.numel()
            p.data.copy_(q.data)
            for name in ("state1", "state2", "absmax1", "absmax2"):
                state[name].copy_(expected[name])
        assert wrong <= 1e-3 * values


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_gradient_touches_nothing(bad):
    params = normal_parameters(SHAPES, torch.bfloat16, "cuda")
    optimizer = AdamW8bit(params)
    normal_gradients(params, 0)
    params[-1].grad[-1] = bad
    before = copy.deepcopy(params)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(params, before))
    normal_gradients(params, 0)
    optimizer.step()
    assert not torch.equal(params[0], before[0])


def test_a_captured_step_is_a_step():
    params, plain = (normal_parameters(SHAPES, torch.bfloat16, "cuda") for _ in range(2))
    captured, expected = (AdamW8bit(list_, lr=1e-2, capturable=True) for list_ in (params, plain))
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
