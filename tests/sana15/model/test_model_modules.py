"""sana15.SanaTransformer and diffusers' model under the same changes of their modules: hooks, adapters, parametrisations.

Whatever is done to a module of diffusers' model has the same effect on the module of that name here.
"""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers_models import fused_calls
from model_cases import batch, pair
from module_changes import adapt, leaves, parametrize, record, sloped
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import sana15
from sana15.model.depth import chosen_blocks
from sana15.sampling.guidance import GuidedVelocity

pytestmark = pytest.mark.usefixtures("one_thread")
SPRINT = {"guidance_embeds": True, "num_layers": 1}


def output(model, values):
    if isinstance(model, sana15.SanaTransformer):
        return model(values["latents"], values["text"], values["timestep"], values["mask"], values.get("guidance"))
    return model(
        values["latents"], values["text"], values["timestep"], values.get("guidance"),
        encoder_attention_mask=values["mask"], return_dict=False,
    )[0]  # fmt: skip


def called(model):
    """Names of all modules inside the model that have a forward of their own."""
    return [n for n, m in model.named_modules() if n and not isinstance(m, nn.ModuleList)]


def assert_close(got, expected, name):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * max(expected.abs().max().item(), 1e-3), msg=name)


@pytest.fixture(params=["sana15", "sprint"])
def models(request):
    changes = SPRINT if request.param == "sprint" else {}
    return *pair(**changes), batch(guidance=request.param == "sprint")


def test_every_module_is_called_as_in_diffusers(models):
    """In the same order, with tensors of the same shapes and values."""
    *pair, values = models
    theirs, ours = (record(model, called(pair[1])) for model in pair)
    for model in pair:
        output(model, values)
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert {name.split()[0] for name, _ in ours} == set(called(pair[1]))
    for (name, expected), (_, got) in zip(theirs, ours):
        assert [t.shape for t in got] == [t.shape for t in expected], name
        for a, b in zip(got, expected):
            assert_close(a, b, name)


def test_a_hook_on_each_module_changes_what_it_changes_in_diffusers(models):
    theirs, ours, values = models
    with torch.no_grad():
        stock, base = output(theirs, values), output(ours, values)
        for name in called(ours):
            expected, got = [], []
            for model, to in ((theirs, expected), (ours, got)):
                handle = sloped(model, name)
                to.append(output(model, values))
                handle.remove()
            assert_close(got[0], expected[0], name)
            assert (got[0] - expected[0]).abs().max() < 0.1 * (expected[0] - stock).abs().max(), name
        assert torch.equal(output(ours, values), base)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_in_place_of_each_layer_works_and_trains(models, checkpointing):
    theirs, ours, values = models
    ours.gradient_checkpointing = checkpointing
    gradients = {}
    for name in leaves(ours):
        results = []
        for model in (copy.deepcopy(theirs), copy.deepcopy(ours)):
            gain = adapt(model.requires_grad_(False), name)
            out = output(model, values)
            out.square().mean().backward()
            results.append((out.detach(), gain.grad))
        assert results[1][1] is not None, name
        assert_close(results[1][0], results[0][0], name)
        gradients[name] = [gradient for _, gradient in results]
    # A norm behind a layer cancels its gain: what is left of that gradient is rounding noise, measured against the rest.
    noise = 1e-2 * max(expected.abs().max().item() for expected, _ in gradients.values())
    for name, (expected, got) in gradients.items():
        atol = 1e-5 * max(expected.abs().max().item(), noise)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=atol, msg=name)


def test_each_parameter_may_be_parametrised(models):
    """It is asked for as often as in diffusers, whose norms ask at every use: a parametrisation may have a state."""
    theirs, ours, values = models
    for name, _ in list(ours.named_parameters()):
        results = []
        for model in (copy.deepcopy(theirs), copy.deepcopy(ours)):
            scaled = parametrize(model, name)
            out = output(model, values)
            out.square().mean().backward()
            asked = 0 if "norm" in name else scaled.asked
            results.append((out.detach(), scaled.factor.grad, torch.tensor(float(asked))))
        for got, expected in zip(results[1], results[0]):
            assert_close(got, expected, name)


def test_lora_on_everything_trains_as_in_diffusers():
    theirs, ours = pair()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point", "proj_out", "linear_1"]
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=targets)
    values = batch()
    gradients = []
    weights = None
    for model in (theirs, ours):
        inject_adapter_in_model(config, model)
        own = {name: p for name, p in model.named_parameters() if "lora" in name}
        weights = weights or {name: p.detach().clone() for name, p in own.items()}
        assert model.load_state_dict(weights, strict=False).unexpected_keys == []
        output(model, values).square().mean().backward()
        gradients.append({name: p.grad for name, p in own.items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, name)
    assert fused_calls(lambda: output(ours, values))["dwconv_glu_forward"] == 2  # its convolution is a plain one


def test_one_compiled_graph_sees_adapters_that_come_later():
    ours = pair(num_layers=1)[1]
    values = list(batch().values())
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(*values)
    names = ["ff.conv_inverted", "ff.conv_depth", "ff.conv_point", "attn1.norm_q", "attn2.norm_k"]
    gains = [adapt(ours, f"transformer_blocks.0.{name}") for name in names]
    expected = torch.autograd.grad(ours(*values).square().mean(), gains)
    got = torch.autograd.grad(compiled(*values).square().mean(), gains)
    for name, a, b in zip(names, got, expected):
        assert_close(a, b, name)
        assert b.abs() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_kept_in_another_dtype(dtype):
    """As diffusers' layerwise casting keeps norms: the product takes the wider dtype there and here."""
    theirs, ours = pair()
    for model in (theirs.to(torch.bfloat16), ours.to(torch.bfloat16)):
        model.transformer_blocks[0].attn1.norm_q.to(dtype)
    values = {k: v.bfloat16() for k, v in batch().items()} | {"timestep": batch()["timestep"]}
    with torch.no_grad():
        expected, got = output(theirs, values), output(ours, values)
    assert got.dtype == expected.dtype
    assert (got - expected).float().norm() < 2e-2 * expected.float().norm()


def test_a_text_is_projected_only_where_no_block_wants_to_see_it():
    model = pair()[1]
    text = batch()["text"]
    assert model.projects
    handle = model.transformer_blocks[1].attn2.register_forward_pre_hook(lambda *_: None)
    assert not model.projects
    with pytest.raises(ValueError, match="replaced or has hooks"):
        model.project(text)
    handle.remove()
    t = batch()["timestep"]
    assert torch.equal(model(batch()["latents"], model.project(text), t), model(batch()["latents"], text, t))


ON_THE_TEXTS_WAY = ["caption_projection", "caption_projection.linear_2", "caption_norm"]
ON_THE_TEXTS_WAY += [f"transformer_blocks.0.attn2.{name}" for name in ("to_k", "to_v", "norm_k")]


@pytest.mark.parametrize("name", ON_THE_TEXTS_WAY)
def test_a_hook_on_the_texts_way_is_called_at_every_step(name):
    """It may do something else at every step, as hooks that blend two prompts do."""
    model = pair()[1]
    values, calls = batch(), []
    model.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    velocity = GuidedVelocity(model, values["text"], values["mask"], 1.0)
    with torch.no_grad():
        for _ in range(3):
            velocity(values["latents"], 0.5)
    assert len(calls) == 3


@pytest.mark.parametrize("change", ["accelerate", "parametrised", "compiled"])
def test_a_view_of_a_changed_model_runs_its_own_blocks_or_says_why_not(change):
    model, values = pair()[1], batch()
    expected = output(chosen_blocks(model, [0]), values)
    if change == "accelerate":
        add_hook_to_module(model, ModelHook())
        with pytest.raises(ValueError, match="forward was replaced"):
            chosen_blocks(model, [0])
        return
    if change == "parametrised":
        parametrize(model, "scale_shift_table").factor.data.fill_(1.0)
    else:
        model.compile(backend="eager")
    view = chosen_blocks(model, [0])
    assert_close(output(view, values), expected, change)
    assert len(view.transformer_blocks) == 1 < len(model.transformer_blocks)


def test_pipeline_with_a_replaced_block():
    pipe = sana15.Pipeline.from_pretrained("mini")
    base = pipe("a red circle", steps=1)[0][0]
    pipe.transformer.transformer_blocks[3] = Skipped()
    assert pipe("a red circle", steps=1)[0][0].tobytes() != base.tobytes()


class Skipped(nn.Module):
    def forward(self, x, *others):
        return x


def test_the_last_norm_has_its_own_eps():
    theirs, ours = pair(norm_eps=0.3)
    with torch.no_grad():
        assert_close(output(ours, batch()), output(theirs, batch()), "norm_eps")
