"""The ops adamw8bit_check and adamw8bit_step: the kernels against the reference, and the reference against fp64 and torch."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import EMULATED, EPS32, dtype_id

import sana_ext
from sana_ext import reference
from sana_ext.ops.adamw8bit import COLUMNS
from sana_ext.reference.adamw8bit import Hyper
from sana_ext.reference.rounding import random_bits, round_by_chance

OPS = torch.ops.sana_ext
DTYPES = (torch.float32, torch.bfloat16)
#: Whole blocks, tails, less than a block, several tensors of one block, nothing.
SIZES = (256, 1000, 1, 0, 255, 257, 31, 4096)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
orders = pytest.mark.parametrize("bitsandbytes_cuda", [False, True], ids=["decay first", "bitsandbytes' CUDA order"])


class Case:
    """Parameters, gradients and states of some tensors after a few steps of the reference."""

    def __init__(self, sizes=SIZES, dtype=torch.float32, grad_dtype=None, quantised=True, seed=0, steps=2):
        generator = torch.Generator().manual_seed(seed)

        def rand(n):
            spread = 10 ** (torch.rand(n, generator=generator) * 6 - 4)
            return torch.randn(n, generator=generator) * spread

        self.grad_dtype = grad_dtype or dtype
        self.params = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
        self.gradients = [[rand(n).to(self.grad_dtype) for n in sizes] for _ in range(steps + 1)]
        state = torch.uint8 if quantised else torch.float32
        blocks = [-(-n // 256) if quantised else 0 for n in sizes]
        self.states = [[torch.zeros(n, dtype=state) for n in sizes] for _ in range(2)]
        self.scales = [[torch.zeros(n) for n in blocks] for _ in range(2)]
        self.steps = 0
        for _ in range(steps):
            self.step(reference_step)

    def hypers(self, bitsandbytes_cuda=False):
        """Another learning rate for each tensor: a mix-up of tensors is seen."""
        return [
            Hyper.of(self.steps + 1, 1e-3 * (i + 1), (0.9, 0.99), 1e-8, 0.1, 0.5, bitsandbytes_cuda)
            for i in range(len(self.params))
        ]

    def arguments(self, bitsandbytes_cuda=False, seeds=None, found=0.0):
        hyper = torch.tensor([h.row() for h in self.hypers(bitsandbytes_cuda)], dtype=torch.float64)
        hyper = hyper.view(len(self.params), COLUMNS)
        return (
            self.params, self.gradients[self.steps], *self.states, *self.scales, hyper,
            None if seeds is None else torch.tensor(seeds), torch.tensor([found]), bitsandbytes_cuda,
        )  # fmt: skip

    def step(self, function, **more):
        function(*self.arguments(**more))
        self.steps += 1

    def copy(self):
        other = Case.__new__(Case)
        other.__dict__.update(self.__dict__)
        other.params = [p.clone() for p in self.params]
        other.states = [[s.clone() for s in states] for states in self.states]
        other.scales = [[s.clone() for s in scales] for scales in self.scales]
        return other

    def tensors(self):
        return [*self.params, *self.states[0], *self.states[1], *self.scales[0], *self.scales[1]]


def reference_step(params, grads, state1, state2, absmax1, absmax2, hyper, seeds, found_inf, bitsandbytes_cuda):
    numbers = seeds.tolist() if seeds is not None else [-1] * len(params)
    rows = [Hyper(*row) for row in hyper.tolist()]
    for *tensors, h, seed in zip(params, grads, state1, state2, absmax1, absmax2, rows, numbers):
        reference.adamw8bit(*tensors, h, seed, bitsandbytes_cuda)


def same(a, b):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def decoded(case, i):
    if case.states[0][i].dtype != torch.uint8:
        return case.states[0][i], case.states[1][i]
    return (
        reference.dequantize(case.states[0][i], case.scales[0][i], 256, "dynamic"),
        reference.dequantize(case.states[1][i], case.scales[1][i], 256, "dynamic-unsigned"),
    )


def assert_codes_agree(ours, theirs):
    """At least 99.99 % of the bytes are the same (one in 10,000 values lies next to a border), the others differ by one."""
    a = torch.cat([s for states in ours.states for s in states]).long()
    b = torch.cat([s for states in theirs.states for s in states]).long()
    different = a != b
    assert (a - b).abs().max() <= 1
    assert different.sum() <= max(2, 1e-4 * a.numel()), f"{different.sum()} of {a.numel()} bytes differ"


@orders
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=dtype_id)
@dtypes
def test_step_is_the_reference(dtype, grad_dtype, bitsandbytes_cuda):
    """Truth in fp64 from the same bytes; no further from it than twice the reference, and the same bytes after it."""
    case = Case(SIZES, dtype, grad_dtype)
    ours, theirs = case.copy(), case.copy()
    ours.step(OPS.adamw8bit_step, bitsandbytes_cuda=bitsandbytes_cuda)
    theirs.step(reference_step, bitsandbytes_cuda=bitsandbytes_cuda)
    errors = {"ours": [], "theirs": []}
    truths = []
    for i, h in enumerate(case.hypers(bitsandbytes_cuda)):
        m, v = (t.double() for t in decoded(case, i))
        truth, m, v = reference.adamw(
            case.params[i].double(), case.gradients[case.steps][i].double(), m, v, h, bitsandbytes_cuda
        )
        truths.append(truth)
        errors["ours"].append(ours.params[i].double() - truth)
        errors["theirs"].append(theirs.params[i].double() - truth)
        if len(truth):
            for scales, state in zip(ours.scales, (m, v)):
                top = torch.stack([block.abs().max() for block in state.split(256)])
                assert ((scales[i] - top).abs() <= 4 * EPS32 * top).all()
    largest = torch.cat(truths).abs().max().item()
    for measure in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
        error, peer = (measure(torch.cat(errors[who])).item() for who in ("ours", "theirs"))
        assert error <= 2 * peer + 4 * EPS32 * largest
    assert_codes_agree(ours, theirs)


@dtypes
def test_fp32_states(dtype):
    """Small parameters; in one call with large ones."""
    small, large = Case((5, 300, 0), dtype, quantised=False), Case((700,), dtype, seed=1)
    expected = [case.copy() for case in (small, large)]
    for case in expected:
        case.step(reference_step)
    both = [[*a, *b] for a, b in zip(small.arguments()[:6], large.arguments()[:6])]
    hyper = torch.cat([small.arguments()[6], large.arguments()[6]])
    OPS.adamw8bit_step(*both, hyper, None, torch.zeros(1), False)
    for case, wanted in zip((small, large), expected):
        for a, b in zip(case.params, wanted.params):
            torch.testing.assert_close(a, b, rtol=0.01 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    for a, b in zip(small.states[0] + small.states[1], expected[0].states[0] + expected[0].states[1]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-30)
    assert_codes_agree(large, expected[1])


def test_many_steps_stay_with_torch():
    """Truth is torch.optim.AdamW in fp64: fp32 states are twice as far from it as its fp32 at most, bytes a few percent."""
    torch.manual_seed(0)
    start, gradients = torch.randn(2048), torch.randn(60, 2048) * torch.logspace(-3, 0, 2048)
    p, peer = torch.nn.Parameter(start.double()), torch.nn.Parameter(start.clone())
    optimizers = [torch.optim.AdamW([q], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1) for q in (p, peer)]
    runs = {}
    for quantised in (False, True):
        case = Case((2048,), quantised=quantised, steps=0)
        case.params = [start.clone()]
        runs[quantised] = case
    for t, g in enumerate(gradients):
        p.grad, peer.grad = g.double(), g.clone()
        for optimizer in optimizers:
            optimizer.step()
        for case in runs.values():
            h = Hyper.of(t + 1, 1e-2, (0.9, 0.99), 1e-8, 0.1)
            hyper = torch.tensor([h.row()], dtype=torch.float64)
            OPS.adamw8bit_step(case.params, [g], *case.states, *case.scales, hyper, None, torch.zeros(1), False)
    errors = [(q - p).norm().item() for q in (runs[False].params[0], runs[True].params[0], peer)]
    assert errors[0] <= 2 * errors[2]
    assert errors[1] <= 0.05 * (p - start).norm().item()


@dtypes
def test_bytes_do_not_depend_on_threads(dtype):
    case = Case((100_000, 300, 70_001), dtype, steps=1)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            run = case.copy()
            run.step(OPS.adamw8bit_step)
            results.append(run)
    finally:
        torch.set_num_threads(before)
    assert all(same(run, results[0]) for run in results[1:])


def test_each_tensor_is_by_itself():
    """One call for all tensors gives what one call for each gives, in any order."""
    case = Case()
    expected, single = case.copy(), case.copy()
    expected.step(OPS.adamw8bit_step)
    columns = single.arguments()
    for i in reversed(range(len(SIZES))):
        OPS.adamw8bit_step(*([column[i]] for column in columns[:6]), columns[6][i : i + 1], None, torch.zeros(1), False)
    assert same(single, expected)


def test_found_inf_touches_nothing():
    case = Case()
    before = case.copy()
    OPS.adamw8bit_step(*case.arguments(found=1.0))
    assert same(case, before)


@dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_check_finds_what_is_not_finite(dtype, bad):
    """At every place of a vector and of a tail."""
    one = torch.ones(())
    for n in (1, 67, 300, 4099):
        for place in {0, n // 2, n - 1}:
            grads = [torch.zeros(0, dtype=dtype), torch.ones(40, dtype=dtype), torch.full((n,), 2.0, dtype=dtype)]
            found = torch.zeros(1)
            OPS.adamw8bit_check(grads, one, found)
            assert found.item() == 0
            grads[2][place] = bad
            OPS.adamw8bit_check(grads, one, found)
            assert found.item() == 1
            grads[2][place] = 0
            OPS.adamw8bit_check(grads, one, found)
            assert found.item() == 1  # never taken back


def test_check_counts_the_factor():
    for grad, factor, finite in (
        (1e30, 1e10, False),
        (1e30, 1e-10, True),
        (1.0, torch.inf, False),
        (0.0, torch.nan, False),
    ):
        found = torch.zeros(1)
        OPS.adamw8bit_check([torch.full((33,), grad)], torch.tensor(factor), found)
        assert (found.item() == 0) == finite, (grad, factor)


def test_gradients_whose_squares_overflow_leave_finite_states():
    case = Case((600,), steps=0)
    case.gradients[0][0][:300] = 3e38
    case.step(OPS.adamw8bit_step)
    assert all(torch.isfinite(t.float()).all() for t in case.tensors())


def test_zero_gradients_keep_zero_states():
    case = Case((300,), steps=0)
    case.gradients[0][0].zero_()
    before = case.params[0].clone()
    case.step(OPS.adamw8bit_step)
    assert all(
        (m == 0).all() and (s == 0).all() for m in decoded(case, 0) for s in (case.scales[0][0], case.scales[1][0])
    )
    torch.testing.assert_close(case.params[0], before * (1 - 1e-4))


def test_stochastic_rounding_is_that_of_the_reference():
    """The draws depend on the seed and the place alone."""
    case = Case((5000, 300), torch.bfloat16)
    seeds = [12345, -1]
    ours, theirs, nearest = case.copy(), case.copy(), case.copy()
    ours.step(OPS.adamw8bit_step, seeds=seeds)
    theirs.step(reference_step, seeds=seeds)
    nearest.step(OPS.adamw8bit_step)
    # A value next to a border of chance may fall on either side.
    assert (ours.params[0] != theirs.params[0]).sum() <= 3
    assert (ours.params[0] != nearest.params[0]).float().mean() > 0.1
    assert torch.equal(ours.params[1], nearest.params[1])
    again = case.copy()
    again.step(OPS.adamw8bit_step, seeds=seeds)
    assert same(again, ours)
    other = case.copy()
    other.step(OPS.adamw8bit_step, seeds=[12346, -1])
    assert not torch.equal(other.params[0], ours.params[0])


def test_stochastic_rounding_is_unbiased():
    low = torch.tensor(1.0, dtype=torch.bfloat16)
    step = 2.0**-7
    for fraction in (0.0, 0.25, 0.5, 0.9):
        for sign in (1.0, -1.0):
            value = torch.full((200_000,), sign * (low.item() + fraction * step))
            rounded = round_by_chance(value, 7)
            assert torch.equal(rounded, rounded.bfloat16().float())
            mean = (rounded.double() * sign).mean().item()
            assert abs(mean - (1 + fraction * step)) <= 4 * step * 0.5 / 200_000**0.5 + 1e-9
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    assert torch.equal(round_by_chance(special, 3).nan_to_num(5.0), special.nan_to_num(5.0))
    bits = random_bits(torch.arange(100_000), 99)
    assert len(bits.unique()) > 99_990
    assert all(abs((bits >> b & 1).double().mean().item() - 0.5) < 0.01 for b in range(32))


def test_a_step_from_the_states_of_bitsandbytes():
    """From the same bytes the parameter moves by the same amount, and the bytes after it are within theirs.

    Its encoder for CPUs is some bytes off next to zero, where the table is dense; ours takes the nearest value.
    """
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import bitsandbytes

    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 100))
    optimizer = bitsandbytes.optim.AdamW8bit([p], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    case = Case((6400,), steps=0)
    for t in range(5):
        case.params[0].copy_(p.detach().flatten())
        p.grad = torch.randn(64, 100)
        h = Hyper.of(t + 1, 1e-2, (0.9, 0.99), 1e-8, 0.1)
        hyper = torch.tensor([h.row()], dtype=torch.float64)
        before = p.detach().clone()
        optimizer.step()
        OPS.adamw8bit_step(
            case.params, [p.grad.flatten()], *case.states, *case.scales, hyper, None, torch.zeros(1), False
        )
        # Their table has other last bits.
        error = (case.params[0].view_as(p) - p).abs()
        assert error.max() <= 2e-5 * (p - before).abs().max() + 2 * EPS32 * p.abs().max()
        state = optimizer.state[p]
        for i in range(2):
            theirs = state[f"state{i + 1}"].flatten()
            off = (case.states[i][0].long() - theirs.long()).abs()
            assert (off == 0).float().mean() > 0.95
            assert off.max() <= 8
            torch.testing.assert_close(case.scales[i][0], state[f"absmax{i + 1}"], rtol=1e-6, atol=0)
            case.states[i][0].copy_(theirs)
            case.scales[i][0].copy_(state[f"absmax{i + 1}"])


@dtypes
def test_the_order_of_bitsandbytes_cuda(dtype):
    """Written out: step, rounding to the parameter's dtype, decay."""
    case = Case((512,), dtype, torch.float32)
    m, v = (t.double() for t in decoded(case, 0))
    g = case.gradients[case.steps][0].double() * 0.5
    one_minus = [1 - torch.tensor(beta).item() for beta in (0.9, 0.99)]  # 1 - beta in fp32
    m, v = 0.9 * m + one_minus[0] * g, 0.99 * v + one_minus[1] * g * g
    correct1, correct2 = 1 - 0.9**3, (1 - 0.99**3) ** 0.5
    moved = case.params[0].double() - 1e-3 * correct2 / correct1 * m / (v.sqrt() + correct2 * 1e-8)
    expected = (moved.to(dtype).double() * (1 - 1e-3 * 0.1)).to(dtype)
    case.step(OPS.adamw8bit_step, bitsandbytes_cuda=True)
    wrong = (case.params[0] - expected).abs() > 4 * EPS32 * expected.abs()
    assert wrong.sum() <= (2 if dtype == torch.bfloat16 else 0)  # a value next to the middle of two bf16 numbers


def test_negative_values_keep_their_sign_in_bitsandbytes_cuda_order():
    p, g = torch.zeros(256), torch.zeros(256)
    g[0], g[1], g[2] = 1.0, -1e-9, 1e-9
    for order, byte in ((False, 127), (True, 126)):
        states = [[torch.zeros(256, dtype=torch.uint8)] for _ in range(2)]
        scales = [[torch.zeros(1)] for _ in range(2)]
        hyper = torch.tensor([Hyper.of(1, 1e-3, (0.9, 0.999), 1e-8, 0.0, 1.0, order).row()], dtype=torch.float64)
        OPS.adamw8bit_step([p.clone()], [g], *states, *scales, hyper, None, torch.zeros(1), order)
        assert states[0][0][:3].tolist() == [255, byte, 127]


def test_opcheck_and_compile():
    case = Case((300, 40), steps=1)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.adamw8bit_step, case.arguments(), test_utils=utils)
    torch.library.opcheck(OPS.adamw8bit_check, (case.gradients[0], torch.ones(()), torch.zeros(1)), test_utils=utils)
    expected, compiled = case.copy(), case.copy()
    expected.step(OPS.adamw8bit_step)
    torch._dynamo.reset()
    function = torch.compile(lambda *a: OPS.adamw8bit_step(*a), fullgraph=True, backend="aot_eager")
    compiled.step(function)
    assert same(compiled, expected)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t.half(), "params must be float32 or bfloat16"),
        (1, lambda t: t.half(), "grads must be float32 or bfloat16"),
        (1, lambda t: t[:-1], "grads must have 300 elements, got 299"),
        (1, lambda t: torch.stack([t, t], 1)[:, 0], "grads must be contiguous"),
        (2, lambda t: t[:-1], "state1 must have 300 elements"),
        (3, lambda t: t.float(), "state1 and state2 must share one dtype"),
        (4, lambda t: t[:1], "absmax1 must have 2 elements"),
        (5, lambda t: t.double(), "absmax2 must be float32"),
    ],
)
def test_a_direct_call_with_bad_tensors_is_refused(place, change, message):
    if not sana_ext._extension.has_kernel("adamw8bit_step", "cpu"):
        pytest.skip("no compiled kernel here")
    arguments = list(Case((300,)).arguments())
    arguments[place] = [change(t) for t in arguments[place]]
    with pytest.raises((ValueError, RuntimeError), match=message):
        OPS.adamw8bit_step(*arguments)


@pytest.mark.skipif(EMULATED, reason="the emulator has no instruction set levels")
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_level(level):
    if sana_ext._extension.isa() is None:
        pytest.skip("no compiled kernels here")
    program = (
        "import sys, pytest; sys.exit(pytest.main([sys.argv[1], '-q', '-k', 'reference or fp32_states or finite']))"
    )
    environment = os.environ | {"SANA_EXT_CPU_ISA": level}
    run = subprocess.run([sys.executable, "-c", program, __file__], env=environment, capture_output=True, text=True)
    if "is not available here" in run.stdout + run.stderr:
        pytest.skip(f"this processor has no {level}")
    assert run.returncode == 0, run.stdout[-2000:]
