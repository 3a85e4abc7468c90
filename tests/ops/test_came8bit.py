"""CAME8bit's step: against came-pytorch, the reference in fp64, and the reference against the kernels."""

import copy

import pytest
import torch
from came8bit_cases import CODES, SHAPES, Reference, parameters, set_gradients, states
from helpers import EPS32, rand
from torch import nn

from sana_ext import reference
from sana_ext.optim import CAME8bit
from sana_ext.reference.came8bit import Geometry
from sana_ext.reference.rounding import random_bits, round_by_chance


def test_came_pytorch():
    """2-D weights, vectors and batches of matrices in fp32, nothing quantised: 1e-6 of max|p| after 100 steps."""
    peer = pytest.importorskip("came_pytorch")
    shapes = [(64, 96), (33, 17), (1, 40), (40, 1), (200,), (3, 40, 24)]
    for weight_decay, clip in ((0.0, 1.0), (0.05, 0.5)):
        ours, theirs = parameters(shapes), parameters(shapes)
        a = CAME8bit(ours, 1e-3, clip_threshold=clip, weight_decay=weight_decay, code=None)
        b = peer.CAME(theirs, lr=1e-3, clip_threshold=clip, weight_decay=weight_decay)
        for step in range(100):
            set_gradients(ours, step)
            set_gradients(theirs, step)
            a.step()
            b.step()
        for p, q in zip(ours, theirs):
            assert (p - q).abs().max() <= 1e-6 * q.abs().max(), list(p.shape)


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("code", CODES)
def test_kernel_matches_reference(code, dtype, correction):
    """Each step from the same state: parameters and statistics to rounding, codes equal but for values between two."""
    ours, peers = parameters(dtype=dtype), parameters(dtype=dtype)
    options = {"weight_decay": 0.1, "code": code, "min_8bit_size": 100, "bias_correction": correction}
    a, b = CAME8bit(ours, 1e-2, **options), Reference(peers, 1e-2, **options)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(peers, step)
        for optimizer in (a, b):
            optimizer.step(grad_scale=4.0, clip_factor=torch.tensor(0.5))
        for p, q, s, t in zip(ours, peers, states(a), states(b)):
            largest = q.abs().max().item() if q.numel() else 0.0
            one = 2.0**-8 * largest if dtype == torch.bfloat16 else 16 * EPS32 * largest
            assert p.numel() == 0 or (p - q).abs().max() <= one, list(p.shape)
            if p.numel() > 1000 and dtype == torch.bfloat16:
                assert (p != q).float().mean() < 1e-3, list(p.shape)
            assert s.keys() == t.keys()
            for key, value in s.items():
                if value.dtype == torch.uint8:
                    apart = (value.int() - t[key].int()).abs()
                    assert apart.max() <= 1, list(p.shape)
                    assert (apart > 0).float().mean() <= max(1e-3, 2 / p.numel()), list(p.shape)
                else:
                    torch.testing.assert_close(value, t[key], rtol=2e-5, atol=1e-7, msg=f"{list(p.shape)} {key}")
        b.load_state_dict(a.state_dict())
        with torch.no_grad():
            for p, q in zip(ours, peers):
                q.copy_(p)


def test_against_fp64():
    """Without quantisation the kernel is no further from the reference in fp64 than twice the reference in fp32."""
    shapes = [(64, 96), (37, 700), (5000,), (6, 30, 40), (500, 1, 3, 3)]
    h = reference.came8bit.Hyper(1e-2, 0.1, 0.9, 0.999, 0.9999, 1e-30, 1e-16, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0)

    def run(dtype, steps):
        result = []
        for p in parameters(shapes):
            geometry, g = Geometry.of(tuple(p.shape)), p.detach().to(dtype)
            b, r, c = geometry.matrices, geometry.rows, geometry.cols
            sizes = [(b, r), (b, c), (b, r), (b, c)] if geometry.factored else [(r, c), (0,), (0,), (0,)]
            second, *rest = (torch.zeros(n, dtype=dtype) for n in sizes)
            work = torch.zeros(sum(geometry.work), dtype=dtype)
            state = reference.came8bit.State(torch.zeros_like(g), torch.empty(0), second, *rest, work)
            numbers = reference.came8bit.Hyper(*[*list(vars(h).values())[:12], float(r), float(p.numel())])
            result.append((g, state, numbers, geometry))
        for step in range(steps):
            for i, (p, state, numbers, geometry) in enumerate(result):
                q = nn.Parameter(torch.empty(shapes[i]))
                set_gradients([nn.Parameter(torch.empty(s)) for s in shapes[:i]] + [q], step)
                for phase in range(4):
                    reference.came8bit.came8bit_phase(phase, p, q.grad.to(dtype), state, numbers, geometry, "dynamic")
        return [p for p, *_ in result]

    ours = parameters(shapes)
    optimizer = CAME8bit(ours, 1e-2, weight_decay=0.1, code=None)
    for step in range(5):
        set_gradients(ours, step)
        optimizer.step()
    for p, peer, truth in zip(ours, run(torch.float32, 5), run(torch.float64, 5)):
        for err in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
            allowed = 2 * err(peer.double() - truth) + 4 * EPS32 * truth.abs().max()
            assert err(p.detach().double() - truth) <= allowed, list(p.shape)


@pytest.mark.parametrize("code", CODES)
def test_thread_count_changes_no_bit(code):
    shapes = [(300, 2500), (4, 200, 400), (400000,), *SHAPES]

    def run(threads):
        torch.set_num_threads(threads)
        params = parameters(shapes)
        optimizer = CAME8bit(params, 1e-2, code=code)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        return [p.detach() for p in params], [v for s in states(optimizer) for v in s.values()]

    before = torch.get_num_threads()
    try:
        runs = [run(threads) for threads in (1, 2, 3, 2)]
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for x, y in zip(runs[0], other) for a, b in zip(x, y))


def test_one_launch_or_many_is_the_same():
    """All parameters in one step, or each in an optimizer of its own."""
    together, apart = parameters(), parameters()
    a, each = CAME8bit(together, 1e-2, min_8bit_size=100), [CAME8bit([p], 1e-2, min_8bit_size=100) for p in apart]
    for step in range(2):
        set_gradients(together, step)
        set_gradients(apart, step)
        a.step()
        for optimizer in each:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(together, apart))


# Rules


def test_first_steps_without_and_with_correction():
    for correction, expected in ((False, 11.1), (True, 1.11)):
        p = nn.Parameter(torch.zeros(200, 300))
        optimizer = CAME8bit([p], 1e-3, bias_correction=correction)
        p.grad = rand(0, 200, 300).float()
        optimizer.step()
        assert p.detach().square().mean().sqrt().item() / 1e-3 == pytest.approx(expected, rel=0.02)


def test_what_is_factored_and_quantised():
    def of(*shape, **options):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.zeros(shape)
        optimizer = CAME8bit([p], 1e-3, **({"code": "256-dynamic"} | options))
        optimizer.step()
        return {k: (tuple(v.shape), v.dtype) for k, v in optimizer.state[p].items() if k != "step"}

    f32, u8 = torch.float32, torch.uint8
    four = lambda row, col: {  # noqa: E731
        f"exp_avg_{kind}_{side}": (shape, f32) for kind in ("sq", "res") for side, shape in (("row", row), ("col", col))
    }
    assert of(80, 600) == {"exp_avg": ((80, 600), u8), "exp_avg_scale": ((80, 2), f32)} | four((80,), (600,))
    assert of(80, 600, code="2048-linear")["exp_avg_scale"] == ((80, 1, 2), f32)
    assert of(80, 600, block_size=128)["exp_avg_scale"] == ((80, 4), f32)
    assert of(80, 600, 1, 1) == {"exp_avg": ((80, 600, 1, 1), u8), "exp_avg_scale": ((80, 2), f32)} | four(
        (80,), (600,)
    )
    assert of(600, 10)["exp_avg_scale"] == ((75, 1), f32)  # 8 rows of 10 values
    assert of(6, 340) == {"exp_avg": ((6, 340), f32)} | four((6,), (340,))
    assert of(6, 340, min_8bit_size=2040)["exp_avg"] == ((6, 340), u8)
    assert of(80, 600, code=None)["exp_avg"] == ((80, 600), f32)
    assert of(1000, 1, 3, 3) == {
        "exp_avg": ((1000, 1, 3, 3), u8),
        "exp_avg_scale": ((125, 1), f32),
        "exp_avg_sq": ((1000, 1, 3, 3), f32),
    }
    assert of(9, 80, 60, 1)["exp_avg_sq_row"] == ((9, 80), f32)
    assert of(9, 80, 60)["exp_avg_scale"] == ((9, 40, 1), f32)
    assert of(9000) == {"exp_avg": ((9000,), f32), "exp_avg_sq": ((9000,), f32)}


def test_blocks_of_rows():
    """The blocks are what cutting each row, or groups of whole rows, by hand gives."""
    cuts = {
        ((5, 700), 256): [350, 350],
        ((5, 801), 256): [267, 267, 267],
        ((5, 800), 256): [267, 267, 266],
        ((3, 512), 256): [256, 256],
        ((7, 100), 256): [100],
        ((5, 41), 8): [9, 9, 9, 9, 5],
        ((50, 10), 256): 8,
        ((3, 10), 256): 3,
        ((64, 33), 256): 2,
    }
    for (shape, block), cut in cuts.items():
        geometry, m = Geometry.of(shape, block), rand(1, *shape).float()
        pieces = (
            [p for row in m for p in row.split(cut)] if isinstance(cut, list) else [r.flatten() for r in m.split(cut)]
        )
        for code in ("dynamic", "linear"):
            codes, scales = geometry.quantize(m, code)
            expected = [reference.code8.quantize(x, 4096, code) for x in pieces]
            assert torch.equal(codes.flatten(), torch.cat([c for c, _ in expected])), shape
            assert torch.equal(scales.flatten(), torch.cat([s.flatten() for _, s in expected]))
            back = torch.cat([reference.code8.dequantize(c, s, 4096, code) for c, s in expected])
            assert torch.equal(geometry.dequantize(codes, scales, code).flatten(), back)


@pytest.mark.parametrize("code", CODES)
def test_zero_and_constant_gradients(code):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = CAME8bit(params, 1e-2, code=code, min_8bit_size=100)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before))
    assert optimizer.skipped_steps == 0
    for p in params:
        p.grad = torch.full_like(p, 0.25)
    for _ in range(3):
        optimizer.step()
    assert all(torch.isfinite(p).all() and (p <= q).all() for p, q in zip(params, before))
    assert all(torch.isfinite(v.float()).all() for s in states(optimizer) for v in s.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_bad_gradient_anywhere_touches_nothing(bad):
    """1e30 is finite; its square is not."""
    params = parameters()
    optimizer = CAME8bit(params, 1e-2, min_8bit_size=100)
    set_gradients(params, 0)
    optimizer.step()
    saved = copy.deepcopy(([p.detach() for p in params], states(optimizer)))
    for i, p in enumerate(params):
        if not p.numel():
            continue
        set_gradients(params, 1)
        p.grad.view(-1)[-1] = bad
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, saved[0])), i
        assert all(torch.equal(s[k], t[k]) for s, t in zip(states(optimizer), saved[1]) for k in t), i
    assert optimizer.skipped_steps == sum(p.numel() > 0 for p in params)


def test_rounding_by_chance():
    index = torch.arange(1 << 16)
    bits = random_bits(index, 12345).double() / 2**32
    assert bits.mean().item() == pytest.approx(0.5, abs=5e-3)
    assert bits.var().item() == pytest.approx(1 / 12, rel=2e-2)
    x = torch.full((1 << 16,), 1 + 2.0**-10)  # an eighth of the way from 1 to 1 + 2^-7
    rounded = round_by_chance(x, 3)
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2.0**-7}
    assert (rounded > 1).float().mean().item() == pytest.approx(0.125, abs=5e-3)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -1.5])
    torch.testing.assert_close(round_by_chance(special, 1), special, equal_nan=True, rtol=0, atol=0)


def test_op():
    """opcheck of the op itself: its schema is honest about what it changes."""
    p, shape = rand(0, 40, 60).float(), (40, 60)
    geometry = Geometry.of(shape, 256)
    codes, scales = geometry.quantize(torch.zeros(shape), "dynamic")
    hyper = [1e-2, 0.1, 0.9, 0.999, 0.9999, 1e-30, 1e-16, 1.0, 1.0, 1.0, 1.0, 1.0, 40.0, 2400.0]
    arguments = (
        [p],
        [rand(1, *shape).float()],
        [codes],
        [scales],
        *([torch.zeros(n)] for n in (40, 60, 40, 60)),
        [torch.zeros(sum(geometry.work))],
        torch.tensor([hyper], dtype=torch.float64),
        None,
        torch.zeros(1),
        [1, 40, 60, 1, 256, 0],
        0,
        3,
    )
    torch.library.opcheck(torch.ops.sana_ext.came8bit_step, arguments)
