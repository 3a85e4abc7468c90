"""Moments that are small beside their block's largest: no byte makes the next step larger than the moments do."""

import copy

import pytest
import torch
from torch import nn

from sana_ext import reference
from sana_ext.optim import AdamW8bit, CAME8bit
from sana_ext.reference.adamw8bit import Hyper

UNSIGNED = "dynamic-unsigned"
OPS = torch.ops.sana_ext
BETAS, EPS = (0.9, 0.999), 1e-8


def reference_step(p, g, state1, state2, absmax1, absmax2, h, order):
    reference.adamw8bit(p, g, state1, state2, absmax1, absmax2, h, -1, order)


def compiled_step(p, g, state1, state2, absmax1, absmax2, h, order):
    hyper = torch.tensor([h.row()], dtype=torch.float64)
    lists = ([t] for t in (p, g, state1, state2, absmax1, absmax2))
    OPS.adamw8bit_step(*lists, hyper, None, torch.zeros(1), order)


steps = pytest.mark.parametrize("step", [reference_step, compiled_step], ids=["reference", "op"])
orders = pytest.mark.parametrize("order", [False, True], ids=["decay first", "bitsandbytes' CUDA order"])


def fresh(n):
    codes = [torch.full((n,), 127, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)]
    return [*codes, *(torch.zeros(-(-n // 256)) for _ in range(2))]


@steps
@orders
@pytest.mark.parametrize("n", [256, 300, 77])
def test_a_positive_second_moment_is_never_zero(step, order, n):
    """Beside 1, magnitudes down to the smallest float; and a block of such magnitudes alone. Zero stays zero."""
    g = torch.logspace(-18, 0, n)
    g[::7] = 0
    for factor in (1.0, 1e-16, 1e14):
        p, states = torch.zeros(n), fresh(n)
        h = Hyper.of(1, 1e-3, BETAS, 0.0, 0.0, factor, order)
        step(p, g, *states, h, order)
        v = reference.dequantize(states[1], states[3], 256, UNSIGNED)
        square = (g * factor).square() * h.rest2
        assert torch.equal(v > 0, square > 0)
        assert (v[square > 0] >= 0.49 * square[square > 0]).all()


@steps
@orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_seen_once_moves_no_further_than_adam(step, order, dtype):
    """One gradient of 1e-5 beside gradients of 1, then none: 30 steps, against torch's AdamW."""
    n, lr = 600, 1e-3
    start = torch.zeros(n, dtype=dtype)
    p, states = start.clone(), fresh(n)
    peer = nn.Parameter(torch.zeros(n))
    optimizer = torch.optim.AdamW([peer], lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0)
    for t in range(30):
        g = torch.where(torch.arange(n) % 3 == 0, 1.0, 1e-5 if t == 0 else 0.0)
        step(p, g, *states, Hyper.of(t + 1, lr, BETAS, EPS, 0.0, 1.0, order), order)
        peer.grad = g
        optimizer.step()
    assert p.abs().max() <= 1.2 * peer.abs().max()


@steps
@orders
def test_bytes_of_bitsandbytes_do_not_throw_a_value_away(step, order):
    """Its second moments of 0 beside first moments that are not: read, kept as they are by `load_state_dict`, harmless."""
    n = 512
    p, (state1, state2, absmax1, absmax2) = torch.zeros(n), fresh(n)
    state1[::2], absmax1[:], absmax2[:] = 140, 0.1, 1e-3
    state2[0::4] = 255
    step(p, torch.zeros(n), state1, state2, absmax1, absmax2, Hyper.of(100, 1e-3, BETAS, EPS, 0.0), order)
    least = 1e-3 * reference.dynamic_table(False)[1]
    most = 1e-3 * 0.1 / least.sqrt()
    assert 0 < p.abs().max() <= most
    assert torch.equal(p != 0, state1 != 127)
    assert torch.equal(state2 > 0, state1 != 127)


def trained(make, tables, rows):
    """Two rows in every step, one row in one step each."""
    optimizer = make(tables)
    for t in range(rows):
        optimizer.zero_grad()
        sum(table(torch.tensor([0, 1, 2 + t])).square().sum() for table in tables).backward()
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"bitsandbytes_cuda_order": True}, {"stochastic_rounding": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_an_embedding_that_are_seen_once(options, dtype):
    """Also resumed in the middle, from our own state dict and from that of bitsandbytes."""
    torch.manual_seed(0)
    start = nn.Embedding(80, 48, dtype=dtype)
    peer, ours = copy.deepcopy(start), copy.deepcopy(start)
    trained(lambda t: torch.optim.AdamW(t[0].parameters(), lr=1e-3), [peer], 20)
    most = 1.5 * (peer.weight - start.weight).abs().max() + (2**-7 if dtype == torch.bfloat16 else 0)
    make = lambda t: AdamW8bit(t[0].parameters(), lr=1e-3, min_8bit_size=1, **options)  # noqa: E731
    trained(make, [ours], 20)
    assert (ours.weight - start.weight).abs().max() <= most
    for form in ("state_dict", "bitsandbytes_state_dict"):
        first = copy.deepcopy(start)
        before = make([first])

        def resumed(t, before=before, form=form):
            after = make(t)
            after.load_state_dict(getattr(before, form)())
            return after

        trained(lambda t, before=before: before, [first], 7)
        trained(resumed, [first], 7)
        assert (first.weight - start.weight).abs().max() <= most


@pytest.mark.parametrize("code", ["2048-linear", "256-dynamic"])
@pytest.mark.parametrize(("rows", "cols"), [(40, 3000), (48, 20)])
def test_came_leaves_what_never_had_a_gradient(code, rows, cols):
    """A zero moment in a block of others comes back as 0, not as half a step."""
    torch.manual_seed(1)
    start, seen = torch.randn(rows, cols), torch.arange(cols) % 5 == 0
    p = nn.Parameter(start.clone())
    optimizer = CAME8bit([p], lr=1e-3, code=code, min_8bit_size=1)
    for _ in range(10):
        p.grad = torch.randn(rows, cols) * seen
        optimizer.step()
    assert torch.equal(p[:, ~seen], start[:, ~seen])
    assert ((p - start)[:, seen].abs().amax(0) > 0).all()


def test_linear_has_zero_where_a_block_does():
    """Blocks of both signs, of one sign with zeros, on all scales; the error stays below half a step."""
    torch.manual_seed(2)
    for exponent in range(-36, 30, 3):
        x = torch.randn(64, 100) * 10.0**exponent * torch.rand(64, 1)
        x[:20].abs_()
        x[20:40].abs_().neg_()
        x[:, ::9] = 0
        codes, scales = reference.quantize(x.flatten(), 100, "linear")
        back = reference.dequantize(codes, scales, 100, "linear").view(x.shape)
        assert (back[:, ::9] == 0).all()
        assert ((back - x).abs() <= 0.501 * scales[:, 1:] + (scales[:, 1:] == 0) * 2.0**-91).all()
