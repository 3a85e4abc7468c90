"""SOAP against a direct computation, against Adam where nothing is turned, and where Adam is slow."""

import copy

import pytest
import torch

from sana15.training import soap
from sana15.training.soap import SOAP


def run(p, gradients, **options):
    optimizer = SOAP([p], lr=0.01, betas=(0.8, 0.95), **options)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach(), optimizer


def gradients(count, *shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def direct(w, grads, lr=0.01, beta1=0.8, beta2=0.95, beta=0.9, eps=1e-8, every=5):
    """The definition, in fp64. The basis of a step comes from the gradients before it; the first step has none."""
    w, moment = w.double(), torch.zeros_like(w, dtype=torch.float64)
    for t, g in enumerate((g.double() for g in grads), 1):
        moment = beta1 * moment + (1 - beta1) * g
        if t == 1:
            w = w - lr * (moment / (1 - beta1)) / (g.abs() + eps)
            grams = [g @ g.T, g.T @ g]
            left, right = (torch.linalg.eigh(gram).eigenvectors for gram in grams)
            v = (1 - beta2) * (left.T @ g @ right) ** 2
            continue
        v = beta2 * v + (1 - beta2) * (left.T @ g @ right) ** 2
        update = left.T @ (moment / (1 - beta1**t)) @ right / ((v / (1 - beta2**t)).sqrt() + eps)
        w = w - lr * left @ update @ right.T
        grams = [beta * grams[0] + (1 - beta) * g @ g.T, beta * grams[1] + (1 - beta) * g.T @ g]
        if t <= 3 or t % every == 0:
            i = torch.diagonal(left.T @ grams[0] @ left).argsort(descending=True)
            j = torch.diagonal(right.T @ grams[1] @ right).argsort(descending=True)
            left, right = torch.linalg.qr(grams[0] @ left[:, i])[0], torch.linalg.qr(grams[1] @ right[:, j])[0]
            v = v[i][:, j]
    return w


def test_equals_the_definition():
    """Square matrices of full rank: what lies in a null space may be turned at will."""
    grads = gradients(12, 24, 24)
    w = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    found, _ = run(torch.nn.Parameter(w.clone()), grads)
    torch.testing.assert_close(found.double(), direct(w, grads), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(40,), (640, 1, 3, 3), (6, 32), (16, 1025), (), (0, 5)])
def test_is_adamw_where_nothing_is_turned(shape):
    grads, w = gradients(6, *shape), torch.ones(shape)
    found, optimizer = run(p := torch.nn.Parameter(w.clone()), grads, weight_decay=0.1)
    assert "gram_left" not in optimizer.state[p]
    q = torch.nn.Parameter(w.clone())
    adam = torch.optim.AdamW([q], lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    for gradient in grads:
        q.grad = gradient.clone()
        adam.step()
    torch.testing.assert_close(found, q.detach())


def test_large_sides_are_turned_up_to_the_limit():
    """1,024 is turned; the mini model's widest matrix measures 768."""
    assert "gram_left" in run(p := torch.nn.Parameter(torch.ones(16, 1024)), gradients(1, 16, 1024))[1].state[p]


def test_weights_decay_where_the_gradient_is_zero():
    """Turned matrices too; and nothing is divided by zero."""
    for shape in ((16, 16), (5,)):
        found, _ = run(torch.nn.Parameter(torch.ones(shape)), [torch.zeros(shape)] * 4, weight_decay=0.5)
        torch.testing.assert_close(found, torch.full(shape, (1 - 0.01 * 0.5) ** 4))


def test_a_closure_computes_the_loss():
    optimizer = SOAP([p := torch.nn.Parameter(torch.ones(16, 16))], lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 256
    torch.testing.assert_close(p.detach(), torch.full((16, 16), 0.99))


def test_convolutions_of_one_pixel_are_matrices():
    grads = gradients(5, 20, 16, 1, 1)
    found, _ = run(torch.nn.Parameter(torch.ones(20, 16, 1, 1)), grads)
    flat, _ = run(torch.nn.Parameter(torch.ones(20, 16)), [g[:, :, 0, 0] for g in grads])
    assert torch.equal(found[:, :, 0, 0], flat)


def test_beats_adam_where_the_axes_are_turned():
    """A matrix found by regression on noisy batches; scales of 1 to 100 lie across its axes, on both sides."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(32, 32, generator=generator))[0] for _ in range(2))
    scale = torch.logspace(0, -2, 32)
    metric, inputs = left * scale @ left.T, right * scale @ right.T
    wanted = torch.randn(32, 32, generator=generator)

    def after(kind, lr):
        p = torch.nn.Parameter(torch.zeros(32, 32))
        optimizer = kind([p], lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        noise = torch.Generator().manual_seed(1)
        for _ in range(100):
            x = torch.randn(64, 32, generator=noise) @ inputs
            loss = (x @ (p - wanted).T @ metric).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (inputs @ (p.detach() - wanted).T @ metric).square().sum().item()

    soap, adam = (min(after(kind, lr) for lr in (0.01, 0.03, 0.1)) for kind in (SOAP, torch.optim.AdamW))
    assert soap < 0.5 * adam


def test_goes_on_from_its_state():
    grads = gradients(9, 16, 16)
    whole, _ = run(torch.nn.Parameter(torch.ones(16, 16)), grads)
    half, optimizer = run(torch.nn.Parameter(torch.ones(16, 16)), grads[:4])
    other = SOAP([p := torch.nn.Parameter(half.clone())], lr=0.01, betas=(0.8, 0.95))
    other.load_state_dict(optimizer.state_dict())
    assert all(torch.is_tensor(value) for value in other.state[p].values())
    for gradient in grads[4:]:
        p.grad = gradient.clone()
        other.step()
    assert torch.equal(whole, p.detach())


def test_copies_and_states_of_others():
    """A copy goes on alike; a state with a basis is used whatever the limit, and one without (of AdamW) stays AdamW's."""
    grads = gradients(6, 16, 16)
    _, optimizer = run(torch.nn.Parameter(torch.ones(16, 16)), grads[:3])
    p, twin = optimizer.param_groups[0]["params"][0], copy.deepcopy(optimizer)
    (q,) = twin.param_groups[0]["params"]
    small = SOAP([r := torch.nn.Parameter(p.detach().clone())], largest=16)
    small.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    small.param_groups[0]["largest"] = 15
    for gradient in grads[3:]:
        for parameter, one in ((p, optimizer), (q, twin), (r, small)):
            parameter.grad = gradient.clone()
            one.step()
    assert torch.equal(p, q)
    assert torch.equal(p, r)

    w = torch.nn.Parameter(torch.ones(16, 16))
    adam = torch.optim.AdamW([w], lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    for gradient in grads[:3]:
        w.grad = gradient.clone()
        adam.step()
    taken = SOAP([v := torch.nn.Parameter(w.detach().clone())], lr=0.01)
    state = copy.deepcopy(adam.state_dict()["state"])
    taken.load_state_dict({"state": state, "param_groups": taken.state_dict()["param_groups"]})
    for gradient in grads[3:]:
        for parameter, one in ((w, adam), (v, taken)):
            parameter.grad = gradient.clone()
            one.step()
    torch.testing.assert_close(v, w)


def test_lets_nan_through_as_adam_does():
    grads = gradients(2, 16, 16)
    grads[0][3, 3] = torch.nan
    found, _ = run(torch.nn.Parameter(torch.ones(16, 16)), grads)
    assert found.isnan().any()


def test_refuses_other_dtypes():
    with pytest.raises(TypeError, match="bfloat16"):
        SOAP([torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
    optimizer = SOAP([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="bfloat16"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"weight_decay": -1.0},
        {"betas": (1.0, 0.9)},
        {"basis_beta": 1.0},
        {"every": 0},
        {"eps": 0.0},
        {"smallest": 9, "largest": 4},
    ],
)
def test_refused(options):
    with pytest.raises(ValueError, match="SOAP: "):
        SOAP([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("fails", ["error", "nan"])
@pytest.mark.parametrize("both", [False, True])
def test_a_gram_whose_eigenvectors_fail(monkeypatch, fails, both):
    """fp32 may fail on a gradient of low rank, by an error or by NaN (MKL on AMD): then fp64, and at last no turn at all."""
    real = torch.linalg.eigh

    def eigh(values):
        if not both and values.dtype == torch.float64:
            return real(values)
        if fails == "error":
            raise torch.linalg.LinAlgError("did not converge")
        return Found(values)

    class Found:
        def __init__(self, values):
            self.eigenvectors = torch.full_like(values, torch.nan)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    column = torch.arange(1.0, 9.0)[:, None]
    found = soap._eigenvectors(column @ column.T)
    torch.testing.assert_close(found.T @ found, torch.eye(8))
    assert found.dtype == torch.float32
    if not both:
        turned = found.T @ (column @ column.T) @ found
        torch.testing.assert_close(turned - torch.diag(turned.diagonal()), torch.zeros(8, 8), atol=1e-3, rtol=0)
