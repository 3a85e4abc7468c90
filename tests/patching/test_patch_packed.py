"""patch on a GPU packs the weights of q, k and v; here a CPU stands in for the GPU."""

import copy

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers_models import SMALL, assert_agrees, inputs, run, transformer
from torch import nn
from weight_changes import LORA, edit_all, load

import sana_ext
from sana_ext.patching import block as fused
from sana_ext.patching import projections as packing

pytestmark = pytest.mark.usefixtures("fused_parts", "one_thread")
NAMES = ("to_q", "to_k", "to_v")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(packing, "DEVICES", ("cpu",))


@pytest.fixture
def products(monkeypatch):
    """Rows of the weights in every product of a fused block."""
    rows = []
    plain = fused.linear

    def linear(x, weight, bias=None):
        rows.append(len(weight))
        return plain(x, weight, bias)

    monkeypatch.setattr(fused, "linear", linear)
    return rows


@pytest.fixture(params=[False, True], ids=["no biases", "biases"])
def model(request):
    model = transformer(SMALL, attention_bias=request.param)
    sana_ext.patch(model)
    return model


def projections(model):
    return [[getattr(block.attn1, name) for name in NAMES] for block in model.transformer_blocks]


def packed_blocks(model):
    return sum(packing.packed(layers) is not None for layers in projections(model))


def count(model, products):
    """How many blocks multiplied with all three weights at once."""
    products.clear()
    with torch.no_grad():
        run(model)
    return products.count(3 * SMALL["attention_head_dim"] * SMALL["num_attention_heads"])


def test_one_product_with_the_same_results(model, products):
    before = {
        name: p.clone() for name, p in transformer(SMALL, attention_bias=model.config.attention_bias).named_parameters()
    }
    assert packed_blocks(model) == count(model, products) == 2
    assert_agrees(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    pointers = [p.data_ptr() for p in model.parameters()]
    sana_ext.patch(model)
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize("change", [edit_all, load])
def test_weights_are_read_at_every_call(model, products, change):
    change(model)
    assert count(model, products) == 2
    assert_agrees(model)


def test_gradients_autocast_and_compile_use_three_products(model, products):
    gradient = torch.autograd.grad(run(model).sum(), model.transformer_blocks[0].attn1.to_v.weight)[0]
    assert gradient.abs().max() > 0
    assert 288 not in products
    with torch.autocast("cpu", torch.bfloat16):
        assert count(model, products) == 0
    assert count(torch.compile(model, fullgraph=True, backend="eager"), products) == 0


def replace(model):
    for layers in projections(model):
        layers[1].weight = nn.Parameter(layers[1].weight * 1.5)


def move(model):
    model.to(torch.float64).to(torch.float32)


def lora(model):
    model.add_adapter(LORA)


def hook(model):
    for layers in projections(model):
        layers[2].register_forward_hook(lambda module, args, out: out * 2)


def one_bias(model):
    for layers in projections(model):
        layers[0].bias = nn.Parameter(torch.ones(96)) if layers[0].bias is None else None


@pytest.mark.parametrize("change", [replace, move, lora, hook, one_bias], ids=lambda f: f.__name__)
def test_what_is_not_packed_any_more_runs_as_it_is(model, products, change):
    change(model)
    assert count(model, products) == 0
    assert_agrees(model)


def test_saved_and_copied(model, tmp_path):
    expected = run(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(run(SanaTransformer2DModel.from_pretrained(tmp_path)), expected, rtol=1e-4, atol=2e-5)
    twin = copy.deepcopy(model)
    edit_all(twin)
    assert torch.equal(run(model), expected)
    assert not torch.equal(run(twin), expected)


def test_memory_of_others_is_left_alone():
    """Slices of a flat buffer: an edit of the buffer is an edit of the weights."""
    model = transformer()
    flat = torch.cat([layer.weight.data.flatten() for layers in projections(model) for layer in layers])
    parts = iter(flat.clone().split(96 * 96))
    for layer in (layer for layers in reversed(projections(model)) for layer in reversed(layers)):
        layer.weight.data = next(parts).view(96, 96)
    before = [p.data_ptr() for p in model.parameters()]
    sana_ext.patch(model)
    assert [p.data_ptr() for p in model.parameters()] == before
    assert packed_blocks(model) == 0


def test_nothing_moves_on_a_cpu(monkeypatch):
    monkeypatch.undo()
    model = transformer()
    before = [p.data_ptr() for p in model.parameters()]
    assert sana_ext.patch(model).blocks == 2
    assert [p.data_ptr() for p in model.parameters()] == before
    assert packed_blocks(model) == 0
    assert run(model, **inputs(model)) is not None
