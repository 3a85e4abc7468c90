"""Patched models under gradient checkpointing, torch.compile and torch.func."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers_models import FUSED_BLOCK, assert_fused, fused_calls, inputs, run, transformer
from peft import LoraConfig
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import sana_ext

pytestmark = pytest.mark.usefixtures("fused_parts", "one_thread")


def gradients(model):
    model.zero_grad()
    run(model).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = transformer().train()
    sana_ext.patch(model)
    plain = gradients(model)
    if reentrant:
        checkpoint = torch.utils.checkpoint.checkpoint
        model._set_gradient_checkpointing(True, lambda f, *args: checkpoint(f.__call__, *args, use_reentrant=True))
    else:
        model.enable_gradient_checkpointing()
    calls = fused_calls(lambda: gradients(model))
    assert calls["linear_attention_forward"] == 4
    for name, g in gradients(model).items():
        if reentrant:  # which adds up the gradients of a block's input in another order
            torch.testing.assert_close(g, plain[name], rtol=1e-5, atol=1e-5, msg=name)
        else:
            assert torch.equal(g, plain[name]), name


def test_full_determinism():
    torch.use_deterministic_algorithms(True)
    model = transformer()
    sana_ext.patch(model)
    first, second = gradients(model), gradients(model)
    assert all(torch.equal(g, second[name]) for name, g in first.items())


class Recording:
    """A backend for torch.compile that runs the graph as it is and keeps the names of this package's ops in it."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, example_inputs):
        targets = [str(node.target) for node in graph.graph.nodes if "sana_ext." in str(node.target)]
        self.graphs.append([target.split(".")[1] for target in targets])
        return graph


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_is_one_graph_and_equal(autocast):
    torch._dynamo.reset()
    model = transformer(num_layers=1)
    sana_ext.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", enabled=autocast):
        assert torch.equal(run(compiled), run(model))
    if not autocast:
        ours, theirs = gradients(model), gradients(compiled)
        for name, g in theirs.items():
            torch.testing.assert_close(g, ours[name.removeprefix("_orig_mod.")], rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    backend = Recording()
    run(torch.compile(model, fullgraph=True, backend=backend))
    assert [graph.count("linear_attention_forward") for graph in backend.graphs] == [1]


def test_compiled_model_sees_patch_and_unpatch():
    torch._dynamo.reset()
    model = transformer(qk_norm=None)
    backend = Recording()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    stock = run(compiled)
    assert sana_ext.patch(compiled).replaced == ["_orig_mod.transformer_blocks.0", "_orig_mod.transformer_blocks.1"]
    torch.testing.assert_close(run(compiled), stock, rtol=1e-4, atol=2e-5)
    model.transformer_blocks[0].attn1.processor = AttnProcessor2_0()
    foreign = run(compiled)
    assert (foreign - stock).abs().max() > 1e-3
    sana_ext.unpatch(compiled)
    torch.testing.assert_close(run(compiled), foreign, rtol=1e-4, atol=2e-5)
    assert [graph.count("linear_attention_forward") for graph in backend.graphs] == [0, 2, 1, 0]


def test_compiled_model_sees_lora():
    torch._dynamo.reset()
    model = transformer(num_layers=1)
    sana_ext.patch(model)
    compiled = torch.compile(model, backend=Recording())
    base = run(compiled)
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "conv_point"]))
    adapted = run(model)
    assert (adapted - base).abs().max() > 1e-3
    torch.testing.assert_close(run(compiled), adapted, rtol=1e-4, atol=2e-5)


def test_compile_repeated_blocks():
    torch._dynamo.reset()
    model = transformer()
    sana_ext.patch(model)
    expected = run(model)
    backend = Recording()
    type(model)._repeated_blocks = ["SanaTransformerBlock"]
    try:
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    finally:
        del type(model)._repeated_blocks
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)
    assert backend.graphs
    assert all(set(FUSED_BLOCK) <= set(graph) for graph in backend.graphs)


def test_torch_func_transforms_run_stock():
    """Sprint's training takes forward-mode derivatives through the model."""
    model = transformer(num_layers=1)
    x = inputs(model)["hidden_states"]
    one = torch.ones_like(x)

    def f(latents):
        with sdpa_kernel(SDPBackend.MATH):  # torch's other CPU kernel has no forward-mode derivative
            return run(model, hidden_states=latents)

    def derivatives():
        return [
            torch.func.jvp(f, (x,), (one,))[1],
            torch.func.grad(lambda latents: f(latents).sum())(x),
            torch.func.vmap(f, randomness="same")(torch.stack([x, 2 * x])),
        ]

    expected = derivatives()
    sana_ext.patch(model)
    got = []
    assert not fused_calls(lambda: got.extend(derivatives()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, one))).tangent
    torch.testing.assert_close(tangent, expected[0], rtol=1e-4, atol=1e-5)
    assert_fused(model)


def test_torch_func_transforms_under_compile():
    torch._dynamo.reset()
    model = transformer(num_layers=1)
    x = inputs(model)["hidden_states"]
    expected = torch.func.grad(lambda latents: run(model, hidden_states=latents).sum())(x)
    sana_ext.patch(model)
    backend = Recording()
    compiled = torch.compile(
        lambda x: torch.func.grad(lambda latents: run(model, hidden_states=latents).sum())(x), backend=backend
    )
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(backend.graphs)


class Plain(torch.nn.Module):
    """Tensors in, a tensor out, as torch.jit.trace wants it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        return self.model(*args).sample


def test_trace_and_export_record_stock():
    model = transformer(num_layers=1).requires_grad_(False)
    given = inputs(model, masked=False)
    args = tuple(given[name] for name in ("hidden_states", "encoder_hidden_states", "timestep"))
    expected = model(**given).sample
    sana_ext.patch(model)
    traced = torch.jit.trace(Plain(model), args, check_trace=False)
    assert torch.equal(traced(*args), expected)
    assert not [node for node in traced.inlined_graph.nodes() if node.kind().startswith("sana_ext::")]
    exported = torch.export.export(Plain(model), args)
    torch.testing.assert_close(exported.module()(*args), expected)
    assert not [node for node in exported.graph.nodes if "sana_ext" in str(node.target)]


def test_functional_call_and_ensembles():
    model = transformer(num_layers=1)
    sana_ext.patch(model)
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
    got = torch.func.functional_call(model, doubled, (), inputs(model)).sample
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert torch.equal(got, run(model))
