"""What every public op promises alike: errors that name the argument, and no derivative that is silently dropped."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import sana_ext
from sana_ext import _selftest, reference
from sana_ext.ops import __all__ as PUBLIC

every_op = pytest.mark.parametrize("op", PUBLIC)

#: Axes that an argument may have shorter than in the example without any other argument having to follow.
FREE = {
    ("norm_modulate", "x"): (1,),
    ("linear", "x"): (0, 1),
    ("linear_attention_qkv", "qkv"): (0, 1),
    ("dwconv_glu", "u"): (0,),
    ("glumbconv", "x"): (0,),
    ("glumbconv", "w_out"): (0,),
    ("cross_attention", "q"): (1,),
}


def example(op, dtype=torch.float32):
    """(tensors, other arguments) of one valid call."""
    tensors, others = _selftest._case(op)
    return {name: t.to(dtype) for name, t in tensors.items()}, others


def call(op, tensors, others):
    result = getattr(sana_ext, op)(**tensors, **others)
    return result[-1] if isinstance(result, tuple) else result


def first(op):
    return next(iter(example(op)[0]))


# Derivatives other than torch.autograd's first


def forward_mode(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "forward mode": forward_mode,
    "vmap of jvp": lambda f, x: torch.func.vmap(lambda x: torch.func.jvp(f, (x,), (x,)))(torch.stack([x, x])),
    "jvp of vmap": lambda f, x: torch.func.jvp(torch.func.vmap(f), (torch.stack([x, x]),), (torch.stack([x, x]),)),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum())(torch.stack([x, x])),
}


@every_op
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_other_derivatives_are_refused(upcast, op, transform):
    """Through every argument: an op that took part would return a tangent of zeros."""
    tensors, others = example(op, torch.bfloat16)
    for name, t in tensors.items():
        with pytest.raises(NotImplementedError, match=r"^sana_ext\.\w+: \w+ is differentiated by torch\.func"):
            TRANSFORMS[transform](lambda x, name=name: call(op, tensors | {name: x}, others), t)


@every_op
def test_constants_inside_a_transform_are_served(upcast, op):
    """A frozen part of a function that torch.func differentiates."""
    tensors, others = example(op, torch.bfloat16)
    expected = call(op, tensors, others)
    x = torch.tensor(3.0)
    value, tangent = torch.func.jvp(lambda x: x * call(op, tensors, others).float(), (x,), (torch.tensor(1.0),))
    assert torch.equal(value, 3 * expected.float())
    assert torch.equal(tangent, expected.float())
    gradient = torch.func.grad(lambda x: (x * call(op, tensors, others).float()).sum())(x)
    torch.testing.assert_close(gradient, expected.float().sum())


@every_op
def test_vmap(upcast, op):
    tensors, others = example(op, torch.bfloat16)
    name = first(op)
    several = torch.stack([tensors[name], tensors[name] * 0.5])
    got = torch.func.vmap(lambda x: call(op, tensors | {name: x}, others))(several)
    assert all(torch.equal(a, call(op, tensors | {name: b}, others)) for a, b in zip(got, several))


@every_op
def test_second_derivative_names_the_op(upcast, op):
    tensors, others = example(op, torch.bfloat16)
    x = list(tensors.values())[-1].requires_grad_()
    (gradient,) = torch.autograd.grad(call(op, tensors, others).float().square().sum(), x, create_graph=True)
    named = "linear" if op == "glumbconv" else op  # the first op that its backward meets
    with pytest.raises(NotImplementedError, match=rf"^sana_ext\.{named}: .* use sana_ext\.reference\.{named} "):
        gradient.float().sum().backward()


# Layouts


def layouts(t):
    """The same values, or some of them repeated, with other strides."""
    yield "column-major", t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    yield "every second element", torch.stack([t, t * 9], -1)[..., 0]
    yield "one row for all", t[:1].expand_as(t)
    yield "offset", torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    if t.dim() > 1:
        yield "part of wider rows", torch.cat([t, t * 9], -1)[..., : t.shape[-1]]
        yield "every second row", torch.stack([t, t * 9], 1).flatten(0, 1)[::2]
        yield "one column for all", t[..., :1].expand_as(t)
    if t.dim() > 2:
        yield "part of longer images", torch.cat([t, t * 9], 1)[:, : t.shape[1]]
        yield "one token for all", t[:, :1].expand_as(t)


@every_op
def test_layouts(op):
    """Any strides of any argument and of the incoming gradient give what dense copies give, gradients included."""
    tensors, others = example(op, torch.float64)

    def run(values, cotangent):
        leaves = {name: t.detach().requires_grad_() for name, t in values.items()}
        out = call(op, leaves, others)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), cotangent)]

    shape = call(op, tensors, others).shape
    dense = torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).view(shape)
    cases = [(name, layout, tensors | {name: t}, dense) for name in tensors for layout, t in layouts(tensors[name])]
    cases += [("the gradient", layout, tensors, t) for layout, t in layouts(dense)]
    for name, layout, values, cotangent in cases:
        expected = run({name: t.contiguous() for name, t in values.items()}, cotangent.contiguous())
        for a, b in zip(run(values, cotangent), expected):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=f"{name}: {layout}")


# Bad input


def halves(t, axis):
    return t.narrow(axis, 0, t.shape[axis] // 2)


CHANGES = {
    "None": lambda t: 3 if t.dim() == 1 else None,  # a vector may be absent
    "number": lambda t: 3.0,
    "list": lambda t: [t],
    "integer": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.cfloat(),
    "fp8": lambda t: t.to(torch.float8_e4m3fn),
    "fp64": lambda t: t.double(),
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.as_nested_tensor([t, t], layout=torch.jagged),
    "other device": lambda t: t.to("meta"),
    "fewer dimensions": lambda t: t[0],
    "more dimensions": lambda t: t[None, None, None],
    "no elements": lambda t: t[..., :0],
    "2^48 elements": lambda t: t.flatten()[0].expand(*[2 ** (48 // t.dim())] * t.dim()),
}


def assert_refused(op, tensors, others, why):
    names = "|".join([*tensors, *others])
    try:
        call(op, tensors, others)
    except (ValueError, TypeError) as error:
        assert re.match(rf"sana_ext\.(?:{op}|linear): (?:{names}) ", str(error)), f"{why}: {error}"  # noqa: PT017
    else:
        pytest.fail(f"{op} took {why}")


@every_op
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*(nested tensors|sparse).*")
def test_bad_argument_is_named(op, change):
    tensors, others = example(op)
    for name, t in tensors.items():
        if change == "None" and name == "gate" and op == "residual_norm_modulate":
            continue  # may be absent, too
        if change in ("fewer dimensions", "more dimensions") and op == "linear" and name == "x":
            continue  # any number of them is right
        assert_refused(op, tensors | {name: CHANGES[change](t)}, others, f"{name}: {change}")


@every_op
def test_wrong_size_is_named(op):
    """Each axis of each argument in turn, cut to half."""
    tensors, others = example(op)
    for name, t in tensors.items():
        for axis in range(t.dim()):
            if t.shape[axis] == 1:
                continue
            changed = tensors | {name: halves(t, axis)}
            if axis not in FREE.get((op, name), ()):
                assert_refused(op, changed, others, f"{name} with half of axis {axis}")
                continue
            expected = getattr(reference, op)(**changed, **others)
            torch.testing.assert_close(call(op, changed, others), expected, rtol=1e-4, atol=1e-4)


SCALARS = {"eps": (-1.0, float("nan"), None, "small", torch.tensor(1e-6)), "norm_eps": (-1.0, float("nan"), "small")}


@pytest.mark.parametrize(
    ("op", "scalar"),
    [
        ("linear_attention", "eps"),
        ("linear_attention", "norm_eps"),
        ("linear_attention_qkv", "eps"),
        ("linear_attention_qkv", "norm_eps"),
        ("norm_modulate", "eps"),
        ("residual_norm_modulate", "eps"),
    ],
)
def test_bad_scalar_is_named(op, scalar):
    tensors, others = example(op)
    for value in SCALARS[scalar]:
        assert_refused(op, tensors, others | {scalar: value}, f"{scalar}={value}")


@pytest.mark.parametrize("op", ["norm_modulate", "residual_norm_modulate"])
def test_bad_out_dtype_is_named(op):
    tensors, others = example(op)
    for dtype in (torch.int32, torch.float64, torch.complex64, torch.float8_e4m3fn):
        assert_refused(op, tensors, others | {"out_dtype": dtype}, f"out_dtype={dtype}")
    double = {name: t.double() for name, t in tensors.items()}
    assert_refused(op, double, others | {"out_dtype": torch.float32}, "fp32 results of fp64")


def test_memory_that_cannot_be_had_is_an_error_with_its_size():
    x, row = torch.ones(1).expand(1, 2**22, 2**20), torch.ones(1).expand(1, 2**20)
    with pytest.raises(RuntimeError, match=r"memory"):
        sana_ext.norm_modulate(x, row, row)


@settings(max_examples=80, deadline=None)
@given(
    op=st.sampled_from(["norm_modulate", "gated_residual", "residual_norm_modulate"]),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 70)),
    other=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 70)),
    changed=st.sampled_from(["", "y", "shift", "scale", "gate"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_shape_of_the_norms_matches_or_is_refused(op, shape, other, changed, dtype):
    names = {"norm_modulate": ("x", "shift", "scale"), "gated_residual": ("x", "y", "gate")}
    names = names.get(op, ("x", "y", "shift", "scale", "gate"))
    shapes = {name: shape if name in "xy" else (shape[0], shape[2]) for name in names}
    if changed in shapes:
        shapes[changed] = other if changed == "y" else (other[0], other[2])
    tensors = {name: torch.randn(size, dtype=dtype) for name, size in shapes.items()}
    right = {name: shape if name in "xy" else (shape[0], shape[2]) for name in names}
    if 0 in shape[1:] or shapes != right:
        assert_refused(op, tensors, {}, f"shapes {shapes}")
        return
    ours, theirs = (getattr(module, op)(**tensors) for module in (sana_ext, reference))
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
