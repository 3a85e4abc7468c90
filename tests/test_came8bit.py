"""CAME8bit: against came-pytorch, the reference against the kernels, states, sharding, and what users do with it."""

import copy

import pytest
import torch
from helpers import EPS32, rand
from torch import nn

from sana_ext import reference
from sana_ext.ops.came8bit import _came8bit_step
from sana_ext.optim import CAME8bit, fuse_backward, read_sana_state
from sana_ext.reference.came8bit import Geometry
from sana_ext.reference.rounding import random_bits, round_by_chance

#: Matrices with rows shorter and longer than a block, 1x1 and other convolutions, vectors, a batch, a scalar, emptiness.
MATRICES = [(64, 96), (37, 700), (5, 2500), (700, 3), (48, 100, 1, 1)]
SHAPES = [*MATRICES, (500, 1, 3, 3), (5000,), (7,), (6, 30, 40), (), (0, 4), (3, 4, 30, 50)]
CODES = [None, "256-dynamic", "2048-linear"]


def parameters(shapes=SHAPES, dtype=torch.float32):
    return [nn.Parameter(random(i, shape).to(dtype)) for i, shape in enumerate(shapes)]


def random(seed, shape):
    return rand(seed, *shape) if shape else rand(seed, 1)[0]


def set_gradients(params, step, scale=1.0):
    """Rows and columns of different size, as real gradients have."""
    for i, p in enumerate(params):
        g = random(1000 * step + i, p.shape)
        if p.dim() > 1:
            g = g * rand(i + 77, *p.shape[:1]).exp().view(-1, *[1] * (p.dim() - 1))
        p.grad = (g * scale).to(p.dtype)


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


class Reference(CAME8bit):
    """The same optimizer through the op's default kernel, whatever is compiled."""

    def _step_op(self):
        return _came8bit_step


def states(optimizer):
    return [dict(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]


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


def test_stochastic_rounding_keeps_small_steps_and_repeats():
    """Steps of a thousandth of a bf16 rounding step: lost by rounding to nearest, kept on average by chance."""

    def run(cls, stochastic):
        p = nn.Parameter(torch.ones(300, 333, dtype=torch.bfloat16))
        optimizer = cls([p], 1e-6, stochastic_rounding=stochastic)
        for _ in range(20):
            p.grad = torch.full_like(p, 0.5)
            optimizer.step()
        return p.detach()

    assert (run(CAME8bit, False) == 1).all()
    moved = 1 - run(CAME8bit, True).float().mean()
    exact = nn.Parameter(torch.ones(300, 333))
    optimizer = CAME8bit([exact], 1e-6)
    for _ in range(20):
        exact.grad = torch.full_like(exact, 0.5)
        optimizer.step()
    assert moved.item() == pytest.approx(1 - exact.detach().mean().item(), rel=0.1)
    assert torch.equal(run(CAME8bit, True), run(CAME8bit, True))
    assert (run(CAME8bit, True) != run(Reference, True)).float().mean() < 1e-3


def test_strings_of_bad_options():
    p = nn.Parameter(torch.zeros(3))
    for options, message in (
        ({"lr": -1.0}, "lr must be a number >= 0, got -1.0"),
        ({"lr": "x"}, "lr must be a number >= 0, got 'x'"),
        ({"betas": (0.9, 0.999)}, r"betas must be three numbers in \[0, 1\), got \(0.9, 0.999\)"),
        ({"betas": (0.9, 1.0, 0.5)}, "betas must be"),
        ({"eps": 1e-8}, "eps must be two numbers >= 0"),
        ({"clip_threshold": 0}, "clip_threshold must be a number > 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number >= 0"),
        ({"code": "int8"}, "code must be '256-dynamic', '2048-linear' or None, got 'int8'"),
        ({"block_size": 0}, "block_size must be an integer in 1..65536, got 0"),
        ({"min_8bit_size": 2.5}, "min_8bit_size must be an integer"),
    ):
        with pytest.raises(ValueError, match=rf"^sana_ext\.optim\.CAME8bit: {message}"):
            CAME8bit([p], **({"lr": 1e-3} | options))


# State


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("code", CODES)
def test_resume_is_bit_exact(code, dtype, tmp_path):
    """Saved and loaded after three steps: the next two give the same bits. Through torch.save and safetensors."""
    safetensors = pytest.importorskip("safetensors.torch")
    options = {"code": code, "min_8bit_size": 100, "stochastic_rounding": True, "bias_correction": True}
    params = parameters(dtype=dtype)
    optimizer = CAME8bit(params, 1e-2, **options)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    flat = {f"{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    safetensors.save_file(flat, tmp_path / "state.safetensors")
    groups = optimizer.state_dict()["param_groups"]
    clones = [[nn.Parameter(p.detach().clone()) for p in params] for _ in range(2)]
    resumed = [CAME8bit(clone, 1.0) for clone in clones]
    resumed[0].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    state = {}
    for key, value in safetensors.load_file(tmp_path / "state.safetensors").items():
        i, name = key.split(".")
        state.setdefault(int(i), {})[name] = value
    resumed[1].load_state_dict({"state": state, "param_groups": groups})
    for step in (3, 4):
        for optimizer_, ps in zip([optimizer, *resumed], [params, *clones]):
            set_gradients(ps, step)
            optimizer_.step()
    for other, clone in zip(resumed, clones):
        assert all(torch.equal(p, q) for p, q in zip(params, clone))
        assert all(torch.equal(s[k], t[k]) for s, t in zip(states(optimizer), states(other)) for k in s)


def test_authors_state():
    """Groups of 2048 rows with one minimum each, as CAME8BitWrapper keeps them."""
    params = parameters([(5000, 3), (200, 150, 1, 1), (300,), (40, 1, 3, 3)])
    moments = [rand(i, *p.shape).float() for i, p in enumerate(params)]
    saved = {}
    for i, (p, m) in enumerate(zip(params, moments)):
        entry = {"step": 7, "RMS": torch.tensor(0.5), "exp_avg": m}
        if i < 2:
            parts = []
            for chunk in m.split(2048):
                step = (chunk.max() - chunk.min()) / 255
                data = ((chunk - chunk.min()) / step).round().byte()
                parts.append({"data": data, "scale": step, "min": chunk.min()})
            entry["exp_avg"] = parts
            for kind in ("sq", "res"):
                entry[f"exp_avg_{kind}_row"] = torch.full((p.shape[0],), 2.0)
                entry[f"exp_avg_{kind}_col"] = torch.full((p.shape[1],), 3.0)
        else:
            entry["exp_avg_sq"] = torch.full(p.shape, 4.0)
        saved[i] = entry
    optimizer = CAME8bit(params, 1e-3, code="256-dynamic")
    read_sana_state(optimizer, {"state": saved, "param_groups": [{"params": [0, 1, 2, 3], "lr": 5.0}]})
    assert optimizer.param_groups[0]["lr"] == 1e-3
    for i, (p, m) in enumerate(zip(params, moments)):
        state = optimizer.state[p]
        assert state["step"] == 7
        if i < 2:
            assert state["exp_avg"].dtype == torch.uint8
            values = Geometry.of(tuple(p.shape)).dequantize(state["exp_avg"], state["exp_avg_scale"], "dynamic")
            assert (values - m).abs().max() < 0.05 * m.abs().max()
            assert (state["exp_avg_res_col"] == 3).all()
        else:
            assert torch.equal(state["exp_avg"], m)
            assert (state["exp_avg_sq"] == 4).all()
    set_gradients(params, 0)
    optimizer.step()
    with pytest.raises(
        ValueError, match=r"^sana_ext\.optim\.read_sana_state: 1 parameters in the state, 4 in the optim"
    ):
        read_sana_state(optimizer, {"state": {}, "param_groups": [{"params": [0]}]})
    saved[0]["exp_avg"] = saved[0]["exp_avg"][:1]
    with pytest.raises(ValueError, match=r"exp_avg has shape \[2048, 3\], the parameter \[5000, 3\]$"):
        read_sana_state(optimizer, {"state": saved, "param_groups": [{"params": [0, 1, 2, 3]}]})


# In training loops


def test_fused_backward():
    def run(fused):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(30, 200), nn.GELU(), nn.Linear(200, 5))
        optimizer = CAME8bit(net.named_parameters(), 1e-2)
        if fused:
            fuse_backward(optimizer)
        for step in range(3):
            net(rand(step, 8, 30).float()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in net.parameters()]

    assert all(torch.equal(p, q) for p, q in zip(run(False), run(True)))


def test_schedulers_and_tensor_learning_rates():
    ours, other = parameters(), parameters()
    rates = [0.01, 0.005, 0.0025]
    a, b = CAME8bit(ours, rates[0]), CAME8bit(other, torch.tensor(rates[0]), capturable=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(a, 0.5)
    for step, rate in enumerate(rates):
        b.param_groups[0]["lr"].fill_(rate)
        assert a.param_groups[0]["lr"] == pytest.approx(rate)
        for optimizer, params in ((a, ours), (b, other)):
            set_gradients(params, step)
            optimizer.step()
        scheduler.step()
    for p, q in zip(ours, other):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


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
