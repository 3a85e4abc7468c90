"""sana_ext.optim.AdamW8bit: against torch's AdamW and bitsandbytes, its states, its options."""

import copy

import pytest
import torch
from helpers import dtype_id
from torch import nn

from sana_ext import reference
from sana_ext.optim import AdamW8bit, fuse_backward

DTYPES = (torch.float32, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def model(dtype=torch.float32, seed=1):
    """One parameter above and one below 4096 values, a tail of a block, biases."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(65, 70), nn.Tanh(), nn.Linear(70, 20)).to(dtype)


def gradients(net, t):
    generator = torch.Generator().manual_seed(t)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(net, optimizer, steps, first=0):
    for t in range(first, first + steps):
        gradients(net, t)
        optimizer.step()


def states(optimizer):
    return [
        (k, v.clone())
        for g in optimizer.param_groups
        for p in g["params"]
        for k, v in sorted(optimizer.state[p].items())
    ]


def same(a, b):
    return len(a) == len(b) and all(k == l and x.dtype == y.dtype and torch.equal(x, y) for (k, x), (l, y) in zip(a, b))


def equal_parameters(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_close_to_torch():
    """Small parameters to fp32 rounding; large ones to the error of the bytes, a few percent of the way."""
    ours, theirs = model(), model()
    start = copy.deepcopy(ours)
    optimizer = AdamW8bit(ours.parameters(), lr=1e-2, weight_decay=0.1)
    run(ours, optimizer, 30)
    run(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1), 30)
    for p, q, s in zip(ours.parameters(), theirs.parameters(), start.parameters()):
        quantised = p.numel() >= 4096
        assert (optimizer.state[p]["state1"].dtype == torch.uint8) == quantised
        assert (p - q).norm() <= (0.05 if quantised else 1e-5) * (q - s).norm()


def test_groups_have_their_own_numbers():
    """Two groups in one optimizer give what two optimizers give."""
    first = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.5}
    second = {"lr": torch.tensor(3e-3), "weight_decay": 0.0, "bitsandbytes_cuda_order": True}
    together, apart = model(), model()
    groups = [dict(params=together[0].parameters(), **first), dict(params=together[2].parameters(), **second)]
    one = AdamW8bit(groups)
    two = AdamW8bit(apart[0].parameters(), **first), AdamW8bit(apart[2].parameters(), **second)
    for t in range(3):
        gradients(together, t)
        one.step()
        gradients(apart, t)
        for optimizer in two:
            optimizer.step()
    assert equal_parameters(together, apart)


@dtypes
@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": True, "seed": 5}, {"capturable": True}], ids=str)
def test_resume_is_bit_exact(dtype, options, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    net = model(dtype)
    optimizer = AdamW8bit(net.named_parameters(), lr=1e-2, **options)
    run(net, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    flat = {f"{i}.{k}": v for i, entry in optimizer.state_dict()["state"].items() for k, v in entry.items()}
    safetensors.save_file(flat, tmp_path / "state.safetensors")
    again = safetensors.load_file(tmp_path / "state.safetensors")
    entries = {i: {} for i in optimizer.state_dict()["state"]}
    for key, value in again.items():
        i, name = key.split(".")
        entries[int(i)][name] = value
    from_safetensors = {"state": entries, "param_groups": optimizer.state_dict()["param_groups"]}
    for saved in (torch.load(tmp_path / "state.pt", weights_only=True), from_safetensors):
        other = copy.deepcopy(net)
        resumed = AdamW8bit(other.named_parameters(), lr=0.5)
        resumed.load_state_dict(saved)
        assert same(states(resumed), states(optimizer))
        straight = copy.deepcopy(net)
        expected = AdamW8bit(straight.named_parameters(), lr=0.5)
        expected.load_state_dict(optimizer.state_dict())
        run(straight, expected, 2, first=2)
        run(other, resumed, 2, first=2)
        assert equal_parameters(other, straight)
        assert same(states(resumed), states(expected))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_gradient_touches_nothing(bad):
    net = model()
    optimizer = AdamW8bit(net.parameters())
    run(net, optimizer, 2)
    before, parameters = states(optimizer), copy.deepcopy(net)
    gradients(net, 9)
    net[2].bias.grad[-1] = bad
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert same(states(optimizer), before)
    assert equal_parameters(net, parameters)
    run(net, optimizer, 1)
    assert not equal_parameters(net, parameters)


def test_grad_scale_and_clip_factor():
    plain, scaled = model(), model()
    a, b = AdamW8bit(plain.parameters()), AdamW8bit(scaled.parameters())
    for t in range(3):
        gradients(plain, t)
        a.step()
        gradients(scaled, t)
        for p in scaled.parameters():
            p.grad *= 64
        b.step(grad_scale=torch.tensor(256.0), clip_factor=torch.tensor(4.0))
    assert equal_parameters(plain, scaled)


def test_stochastic_rounding_keeps_small_steps():
    """Steps far below bf16's spacing: to the nearest nothing moves, by chance the mean does."""
    moved = {}
    for by_chance in (False, True):
        p = nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))
        optimizer = AdamW8bit([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=by_chance)
        for _ in range(20):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[by_chance] = (1 - p.double().mean()).item()
    assert moved[False] == 0
    assert abs(moved[True] - 20e-4) < 1e-4


SCHEDULERS = {
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
    "warm-up and cosine": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        ],
        [3],
    ),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2e-2, total_steps=8),  # moves betas, too
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_do_what_they_do_to_torchs_adamw(scheduler):
    """In fp32 to rounding; in 8 bits to the error of the bytes."""
    for size, allowed in ((10**9, 1e-5), (4096, 0.05)):
        ours, theirs = model(), model()
        start = copy.deepcopy(ours)
        optimizers = (
            AdamW8bit(ours.parameters(), lr=1e-2, min_8bit_size=size),
            torch.optim.AdamW(theirs.parameters(), lr=1e-2),
        )
        schedules = [scheduler(optimizer) for optimizer in optimizers]
        for t in range(7):
            for net, optimizer, schedule in zip((ours, theirs), optimizers, schedules):
                run(net, optimizer, 1, first=t)
                schedule.step()
        assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
        for p, q, s in zip(ours.parameters(), theirs.parameters(), start.parameters()):
            assert (p - q).norm() <= allowed * (q - s).norm()


def test_a_learning_rate_may_be_a_tensor():
    runs = []
    for lr in (1e-2, torch.tensor(1e-2)):
        net = model()
        optimizer = AdamW8bit(net.parameters(), lr=lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for t in range(3):
            gradients(net, t)
            optimizer.step()
            scheduler.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1.25e-3)
        runs.append(net)
    for p, q in zip(runs[0].parameters(), runs[1].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_gradscaler_gives_the_bits_of_unscaled_gradients():
    """Scales are powers of two. A step with an infinite gradient is skipped, and the scale halved."""
    scaled, plain = model(), model()
    ours, other = AdamW8bit(scaled.parameters()), AdamW8bit(plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    scales = []
    for t in range(5):
        x = torch.randn(4, 65, generator=torch.Generator().manual_seed(t))
        for net, optimizer in ((scaled, ours), (plain, other)):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            (scaler.scale(loss) if net is scaled else loss).backward()
        if t == 2:
            scaled[0].weight.grad[3, 3] = torch.inf
        else:
            other.step()
        if t == 3:
            scaler.unscale_(ours)  # as before clipping: the step must not divide again
        scaler.step(ours)
        scaler.update()
        scales.append(scaler.get_scale())
        assert equal_parameters(scaled, plain)
    assert scales == [2.0**12, 2.0**13, 2.0**12, 2.0**12, 2.0**13]
    assert ours.skipped_steps == 1
    assert same(states(ours), states(other))


def test_fused_backward_equals_steps():
    nets = model(), model()
    optimizers = [AdamW8bit(net.parameters()) for net in nets]
    hooks = fuse_backward(optimizers[0])
    for t in range(2):
        x = torch.randn(4, 65, generator=torch.Generator().manual_seed(t))
        for net, optimizer in zip(nets, optimizers):
            net(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert equal_parameters(*nets)
    hooks.remove()


def test_size_of_the_state():
    """2.03125 bytes per value of whole blocks, as allocated."""
    p = nn.Parameter(torch.zeros(2240, 1024))
    optimizer = AdamW8bit([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = [v for k, v in optimizer.state[p].items() if k != "step"]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == p.numel() * (2 + 2 / 64)


def test_empty_parameters_and_missing_gradients():
    empty, idle, p = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5000))
    optimizer = AdamW8bit([empty, idle, p])
    empty.grad, p.grad = torch.zeros(0, 3), torch.ones(5000)
    optimizer.step()
    assert idle not in optimizer.state
    assert (p < 1).all()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(7))], "lr": 0.1})
    optimizer.param_groups[1]["params"][0].grad = torch.ones(7)
    optimizer.step()
    assert (optimizer.param_groups[1]["params"][0] < 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a number >= 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"eps": float("nan")}, "eps must be a number >= 0, got nan"),
        ({"weight_decay": "much"}, "weight_decay must be a number >= 0, got 'much'"),
        ({"seed": -1}, r"seed must be an integer in 0..2\^32-1, got -1"),
        ({"min_8bit_size": 1.5}, "min_8bit_size must be an integer, got 1.5"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=rf"^sana_ext\.optim\.AdamW8bit: {message}"):
        AdamW8bit([nn.Parameter(torch.ones(3))], **options)


# bitsandbytes


def theirs(net, **options):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(net.parameters(), lr=1e-2, weight_decay=0.1, **options)


@dtypes
def test_a_checkpoint_of_bitsandbytes_loads(dtype, tmp_path):
    """The next step is theirs to the rounding of the parameter."""
    net = model(dtype)
    their_optimizer = theirs(net)
    run(net, their_optimizer, 3)
    torch.save(their_optimizer.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(net)
    ours = AdamW8bit(other.parameters(), lr=0.5, stochastic_rounding=False)
    ours.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    group = ours.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["min_8bit_size"]) == (1e-2, 0.1, 4096)
    assert "alpha" not in group
    for p, q in zip(net.parameters(), other.parameters()):
        for name in ours.state[q]:
            assert torch.equal(
                torch.as_tensor(their_optimizer.state[p][name], dtype=ours.state[q][name].dtype), ours.state[q][name]
            )
    before = copy.deepcopy(net)
    run(net, their_optimizer, 1, first=3)
    run(other, ours, 1, first=3)
    for p, q, b in zip(net.parameters(), other.parameters(), before.parameters()):
        spacing = 2**-8 if dtype == torch.bfloat16 else 1e-7
        wrong = (p - q).abs() > 2e-5 * (p - b).abs().max() + spacing * p.abs().max()
        assert not wrong.any()


@dtypes
def test_our_state_loads_into_bitsandbytes(dtype, tmp_path):
    net = model(dtype)
    ours = AdamW8bit(net.parameters(), lr=1e-2, weight_decay=0.1)
    run(net, ours, 3)
    torch.save(ours.bitsandbytes_state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(net)
    their_optimizer = theirs(other)
    their_optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for p, q in zip(net.parameters(), other.parameters()):
        state = their_optimizer.state[q]
        assert state["step"] == 3
        assert all(torch.equal(state[k], v) for k, v in ours.state[p].items() if k != "step")
    run(net, ours, 1, first=3)
    run(other, their_optimizer, 1, first=3)
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_another_code_is_refused():
    net = model()
    ours = AdamW8bit(net.parameters())
    run(net, ours, 1)
    saved = ours.bitsandbytes_state_dict()
    saved["state"][0]["__bnb_optimizer_quant_state__"]["qmap1"] = torch.linspace(-1, 1, 256)
    before = states(ours)
    with pytest.raises(ValueError, match=r"^sana_ext\.optim\.AdamW8bit: the loaded state has another code"):
        ours.load_state_dict(saved)
    assert same(states(ours), before)


def test_the_bytes_mean_what_the_reference_says():
    net = model()
    optimizer = AdamW8bit(net.parameters(), betas=(0.9, 0.99))
    gradients(net, 0)
    p = net[0].weight
    optimizer.step()
    state = optimizer.state[p]
    m = reference.dequantize(state["state1"], state["absmax1"], 256, "dynamic")
    v = reference.dequantize(state["state2"], state["absmax2"], 256, "dynamic-unsigned")
    scale = state["absmax1"].repeat_interleave(256)[: p.numel()].view_as(p)
    assert ((m - 0.1 * p.grad).abs() <= 0.008 * scale).all()
    scale = state["absmax2"].repeat_interleave(256)[: p.numel()].view_as(p)
    assert ((v - 0.01 * p.grad.square()).abs() <= 0.004 * scale).all()
