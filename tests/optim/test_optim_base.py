"""What the 8-bit optimizers share, on a small optimizer that keeps a sum of gradients in "8 bits"."""

import copy

import pytest
import torch
from torch import nn

from sana_ext.optim import AdamW8bit, CAME8bit, fuse_backward, read_sana_state
from sana_ext.optim._base import Optimizer8bit


class Plain(Optimizer8bit):
    """p -= lr * factor * grad; counts gradients in a uint8 tensor and sums them in an fp32 one."""

    def __init__(self, params, lr=0.5, capturable=False):
        super().__init__(params, {"lr": lr, "capturable": capturable})

    def _quantises(self, shape, group):
        return True

    def _spec(self, shape, group, quantised):
        return {
            "codes": (shape, torch.uint8 if quantised else torch.float32, True),
            "total": (shape, torch.float32, True),
        }

    def _update(self, work, factor, found_inf):
        for w in work:
            found_inf += (~torch.isfinite(w.grad).all()).float()
        if found_inf.item():
            return
        for w in work:
            w.param.sub_(w.group["lr"] * factor * w.grad)
            w.state["codes"].add_(1)
            w.state["total"].add_(w.grad)


def model(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).to(dtype)


def loss(net, dtype=torch.float32):
    return net(torch.ones(2, 5, dtype=dtype)).float().square().sum()


def stepped(dtype=torch.float32, steps=2):
    net = model(dtype)
    optimizer = Plain(net.named_parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, dtype).backward()
        optimizer.step()
    return net, optimizer


def values(optimizer):
    return [(k, v.clone()) for p in optimizer.param_groups[0]["params"] for k, v in sorted(optimizer.state[p].items())]


def same(a, b):
    return len(a) == len(b) and all(k == l and x.dtype == y.dtype and torch.equal(x, y) for (k, x), (l, y) in zip(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_is_bit_exact_and_independent(dtype, tmp_path):
    net, optimizer = stepped(dtype)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    for saved in (optimizer.state_dict(), torch.load(tmp_path / "state.pt", weights_only=True)):
        other = Plain(copy.deepcopy(net).named_parameters(), lr=0.1)
        other.load_state_dict(saved)
        assert same(values(other), values(optimizer))
        assert other.param_groups[0]["lr"] == 0.5
        before = values(optimizer)
        for p in other.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        other.step()
        assert same(values(optimizer), before)
        assert not same(values(other), before)
        assert {v.dtype for _, v in values(other)} == {torch.uint8, torch.float32}


def test_state_that_does_not_fit_is_refused_and_changes_nothing():
    _, optimizer = stepped()
    before = values(optimizer)
    for change, what in (
        (lambda s: s.pop("total"), "no total"),
        (lambda s: s.update(total=s["total"][:1]), r"total must be float32 \[3, 5\], got float32 \[1, 5\]"),
        (lambda s: s.update(codes=s["codes"].int()), r"codes must be \w+ \[3, 5\], got int32"),
    ):
        saved = optimizer.state_dict()
        saved["state"] = {k: dict(v) for k, v in saved["state"].items()}
        change(saved["state"][0])
        with pytest.raises(ValueError, match=rf"^sana_ext\.optim\.Plain: the loaded state of 0\.weight .*: {what}"):
            optimizer.load_state_dict(saved)
        assert same(values(optimizer), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_skips_and_counts(bad):
    net, optimizer = stepped()
    loss(net).backward()
    net[1].bias.grad[1] = bad
    before, weights = values(optimizer), copy.deepcopy(net.state_dict())
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert same(values(optimizer), before)
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    assert optimizer.state[net[0].weight]["step"] == 2
    optimizer.zero_grad()
    loss(net).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.state[net[0].weight]["step"] == 3


def test_grad_scale_found_inf_and_clip_factor():
    (a, _), (b, _) = stepped(steps=0), stepped(steps=0)
    ours, plain = Plain(a.parameters()), Plain(b.parameters())
    loss(a).backward()
    loss(b).backward()
    for p in b.parameters():
        p.grad *= 0.125
    ours.step(found_inf=torch.tensor(1.0))
    assert ours.skipped_steps == 1
    ours.step(grad_scale=torch.tensor(4.0), found_inf=torch.tensor(0.0), clip_factor=torch.tensor(0.5))
    plain.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_gradscaler_gives_what_unscaled_gradients_give():
    (a, _), (b, plain) = stepped(steps=0), stepped(steps=0)
    ours = Plain(a.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for infinite in (False, True, False):
        for net, optimizer in ((a, ours), (b, plain)):
            optimizer.zero_grad()
            value = loss(net)
            (scaler.scale(value) if net is a else value).backward()
        if infinite:
            a[0].weight.grad[0, 0] = float("inf")
        scale = scaler.get_scale()
        scaler.step(ours)
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if infinite else scale * 2)
        if not infinite:
            plain.step()
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert ours.skipped_steps == 1


def test_fused_backward_equals_steps_and_frees_gradients():
    (a, ours), (b, plain) = stepped(steps=1), stepped(steps=1)
    ours.load_state_dict(ours.state_dict())  # replaces the groups: the hooks must find the new ones
    ours.zero_grad()
    hooks = fuse_backward(ours)
    ours.load_state_dict(ours.state_dict())
    for lr in (0.5, 0.25):
        ours.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = lr
        loss(a).backward()
        assert all(p.grad is None for p in a.parameters())
        plain.zero_grad()
        loss(b).backward()
        plain.step()
        ours.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert same(values(ours), values(plain))
    hooks.remove()
    loss(a).backward()
    assert all(p.grad is not None for p in a.parameters())
    with pytest.raises(TypeError, match=r"^sana_ext\.optim\.fuse_backward: expected .* got SGD"):
        fuse_backward(torch.optim.SGD(a.parameters(), lr=1.0))


def test_closure_parameters_added_later_and_schedulers():
    net, optimizer = stepped(steps=1)
    extra = nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.25})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0 if n == 0 else 0.5)

    def closure():
        optimizer.zero_grad()
        value = loss(net) + extra.sum()
        value.backward()
        return value

    expected = loss(net) + 4
    assert torch.equal(optimizer.step(closure), expected)
    assert torch.equal(extra.detach(), torch.full((4,), 0.75))
    scheduler.step()
    optimizer.step(closure)
    assert torch.equal(extra.detach(), torch.full((4,), 0.625))
    assert optimizer.state[extra]["step"] == 2
    assert optimizer.state[net[0].weight]["step"] == 3


def test_bad_parameters_and_gradients_are_one_clear_line():
    for dtype in (torch.float64, torch.float16, torch.complex64, torch.int32):
        p = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
        with pytest.raises(TypeError, match=rf"^sana_ext\.optim\.Plain: w has dtype {str(dtype)[6:]}; supported are"):
            Plain([("w", p)])
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = Plain(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"^sana_ext\.optim\.Plain: the gradient of weight is sparse"):
        optimizer.step()
    good = Plain([nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match=r"parameter 0 \[2\] has dtype float16"):
        good.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float16))]})
    assert len(good.param_groups) == 1
    net = model()
    late = Plain(net.parameters())
    net.half()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    with pytest.raises(TypeError, match=r"float16; supported are float32 and bfloat16$"):
        late.step()


def test_transposed_parameter():
    p = nn.Parameter(torch.ones(3, 4).t())
    p.grad = torch.arange(12.0).view(3, 4).t()
    optimizer = Plain([p])
    optimizer.step()
    assert torch.equal(p.detach(), 1 - 0.5 * p.grad)
    assert not p.is_contiguous()


def test_deepcopy_and_no_gradients():
    _, optimizer = stepped()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.skipped_steps == 0
    clone = copy.deepcopy(optimizer)
    assert clone.skipped_steps == 0
    assert same([(k, v) for s in clone.state.values() for k, v in sorted(s.items())], values(optimizer))


# Beside other code: fused twice, older checkpoints, hooks, schedulers


def stepped_once(make):
    p = torch.nn.Parameter(torch.ones(64, 128))
    optimizer = make([p])
    p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    return p, optimizer


MAKES = {"adamw": lambda ps: AdamW8bit(ps, lr=1e-3), "came": lambda ps: CAME8bit(ps, lr=1e-3)}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_fused_again_each_parameter_is_stepped_once(make):
    """A call takes parameters that have no hook; what it set, it takes away, and no other call's."""
    old, new = (torch.nn.Parameter(torch.ones(64, 128)) for _ in range(2))
    optimizer = make([old])
    first = fuse_backward(optimizer)
    optimizer.add_param_group({"params": [new]})
    second = fuse_backward(optimizer)
    third = fuse_backward(optimizer)
    (old.sum() + new.sum()).backward()
    assert [int(optimizer.state[p]["step"]) for p in (old, new)] == [1, 1]
    third.remove()  # had nothing to do
    second.remove()
    (old.sum() + new.sum()).backward()
    assert int(optimizer.state[old]["step"]) == 2
    assert new.grad is not None
    first.remove()
    fuse_backward(optimizer)
    (old.sum() + new.sum()).backward()
    assert [int(optimizer.state[p]["step"]) for p in (old, new)] == [3, 2]


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_checkpoint_from_before_an_option(make):
    """Whatever option is missing stays as it is in the optimizer that loads, and the next step is as before."""
    _, optimizer = stepped_once(make)
    for option in optimizer.defaults:
        q, other = stepped_once(make)
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["param_groups"][0][option]
        other.load_state_dict(saved)
        assert other.param_groups[0][option] == optimizer.param_groups[0][option]
        with torch.no_grad():
            q.fill_(0.0)
        q.grad = torch.ones_like(q)
        other.step()
        assert q.isfinite().all()


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_hooks_of_loading_see_tensors(make):
    """A hook before sees the dictionary as it was given, one after the states as they will be; a returned one is loaded."""
    p, optimizer = stepped_once(make)
    saved = optimizer.state_dict()
    q, other = stepped_once(make)
    seen = []

    def before(own, state_dict):
        seen.append(all(isinstance(v, torch.Tensor) for v in state_dict["state"][0].values()))
        changed = copy.deepcopy(state_dict)
        changed["param_groups"][0]["lr"] = 0.25
        return changed

    def after(own):
        seen.append(all(isinstance(v, torch.Tensor) for v in own.state[q].values()))
        seen.append(own.state[q].keys() == optimizer.state[p].keys())

    other.register_load_state_dict_pre_hook(before)
    other.register_load_state_dict_post_hook(after)
    other.load_state_dict(saved)
    assert seen == [True, True, True]
    assert other.param_groups[0]["lr"] == 0.25
    other.load_state_dict(saved)  # the hooks are still there
    assert len(seen) == 6


def test_a_state_without_a_statistic_is_refused():
    """came-pytorch factors 3x3 convolutions, which CAME8bit does not."""
    _, optimizer = stepped_once(MAKES["came"])
    entry = {"step": 1, "exp_avg": torch.zeros(64, 128), "exp_avg_sq_row": torch.zeros(64)}
    with pytest.raises(ValueError, match=r"shape \[64, 128\] has no exp_avg_sq_col"):
        read_sana_state(optimizer, {"state": {0: entry}, "param_groups": [{"params": [0]}]})


def test_bitsandbytes_state_keeps_what_schedulers_need():
    _, optimizer = stepped_once(MAKES["adamw"])
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=9)
    group = optimizer.bitsandbytes_state_dict()["param_groups"][0]
    assert {"initial_lr", "max_lr", "min_lr", "lr", "betas"} <= group.keys()
    assert not {"seed", "stochastic_rounding", "capturable"} & group.keys()
