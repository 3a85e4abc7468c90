"""sana_ext.optim.CAME8bit as users meet it: options, states and their files, schedulers, the fused backward."""

import pytest
import torch
from came8bit_cases import CODES, Reference, parameters, set_gradients, states
from helpers import rand
from torch import nn

from sana_ext.optim import CAME8bit, fuse_backward, read_sana_state
from sana_ext.reference.came8bit import Geometry


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
