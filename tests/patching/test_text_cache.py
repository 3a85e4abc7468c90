"""patch(cache_text=True): the text's keys and values are kept exactly as long as they are right."""

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from diffusers_models import inputs, run, transformer
from torch.nn.utils.parametrize import register_parametrization
from weight_changes import CHANGES, LORA, Twice, edit, plain_tensors

import sana_ext
from sana_ext.patching.text_cache import ATTRIBUTE

KEPT = "(text or step cached)"  # in Report.skipped
BLOCKS = 2  # of diffusers_models.SMALL

pytestmark = pytest.mark.usefixtures("fused_parts", "one_thread")


@pytest.fixture
def model():
    model = transformer()
    edit(model)  # versions above 0
    assert sana_ext.patch(model, cache_text=True).cached == ["text of SanaTransformer2DModel"]
    return model


@pytest.fixture
def given(model):
    return inputs(model)


def cache(model):
    return vars(model)[ATTRIBUTE]


def counts(model):
    return cache(model).hits, cache(model).misses


@torch.no_grad()
def step(model, given):
    return run(model, **given)


@torch.no_grad()
def truth(model, given):
    """The same weights without a cache."""
    twin = copy.deepcopy(model)
    sana_ext.patch(twin)
    assert ATTRIBUTE not in vars(twin)
    return run(twin, **given)


def assert_right(model, given):
    assert torch.equal(step(model, given), truth(model, given))


def test_steps_share_keys_and_values(model, given):
    for i in range(4):
        given["hidden_states"] = torch.randn_like(given["hidden_states"])
        given["encoder_attention_mask"][1, -i:] = 0
        assert_right(model, given)
        assert counts(model) == (BLOCKS * i, BLOCKS)


def test_text_as_positional_argument(model, given):
    for _ in range(2):
        with torch.no_grad():
            model(given["hidden_states"], given["encoder_hidden_states"], given["timestep"])
    assert counts(model) == (BLOCKS, BLOCKS)


def test_text_edited_in_place(model, given):
    assert_right(model, given)
    before = step(model, given)
    given["encoder_hidden_states"][0, 0] += 1
    assert_right(model, given)
    assert not torch.equal(step(model, given), before)


def test_text_gets_other_data(model, given):
    step(model, given)
    given["encoder_hidden_states"].data = torch.randn_like(given["encoder_hidden_states"])
    assert_right(model, given)


def test_one_text_for_other_batches(model, given):
    """diffusers takes [2, 6, C] for one image as [1, 12, C]."""
    del given["encoder_attention_mask"]
    step(model, given)
    one = given | {"hidden_states": given["hidden_states"][:1], "timestep": given["timestep"][:1]}
    twin = copy.deepcopy(model)
    sana_ext.patch(twin)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(**one).sample, twin(**one).sample)


def test_functional_transforms(model, given):
    step(model, given)
    with torch.no_grad():
        weights = {n: p.detach()[None] for n, p in model.named_parameters()}
        call = torch.func.vmap(lambda w: torch.func.functional_call(model, w, (), given).sample)
        torch.testing.assert_close(call(weights)[0], truth(model, given))


def test_two_prompts_alternate(model, given):
    other = given | {"encoder_hidden_states": torch.randn_like(given["encoder_hidden_states"])}
    for _ in range(3):
        assert_right(model, given)
        assert_right(model, other)
    assert counts(model) == (4 * BLOCKS, 2 * BLOCKS)
    third = given | {"encoder_hidden_states": given["encoder_hidden_states"].clone()}
    assert_right(model, third)
    assert counts(model) == (4 * BLOCKS, 3 * BLOCKS)
    assert len(cache(model)._texts) == 2


def test_memory_goes_with_the_text(model, given):
    step(model, given)
    (text,) = cache(model)._texts
    kept = [weakref.ref(t) for _, pair in text.pairs.values() for t in pair]
    assert len(kept) == 2 * BLOCKS
    del text, given["encoder_hidden_states"]
    gc.collect()
    assert not cache(model)._texts
    assert all(reference() is None for reference in kept)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_weights_change(model, given, change):
    before = step(model, given)
    change(model)
    after = step(model, given)
    assert not torch.equal(after, before)
    assert torch.equal(after, truth(model, given))
    assert_right(model, given)


@torch.no_grad()
def test_weights_that_are_no_parameters_of_their_layer(model, given):
    attn = model.transformer_blocks[0].attn2
    register_parametrization(attn.norm_k, "weight", Twice())
    step(model, given)
    attn.norm_k.parametrizations.weight.original.mul_(-1)
    assert_right(model, given)
    plain_tensors(model)
    step(model, given)
    model.transformer_blocks[1].attn2.to_v.__dict__["weight"].mul_(-1)
    assert_right(model, given)


def test_dtype_changes(model, given):
    step(model, given)
    model.to(torch.bfloat16)
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    assert_right(model, given)
    with torch.autocast("cpu", torch.float16):
        assert_right(model, given)


def test_autocast_switches(model, given):
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert_right(model, given)


def test_scale_of_an_adapter(model, given):
    model.add_adapter(LORA)
    results = []
    for scale in (1.0, 0.5, 1.0):
        model.set_adapters("default", scale)
        results.append(step(model, given))
        assert torch.equal(results[-1], truth(model, given))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
    assert counts(model) == (0, 0)


def test_other_shapes(model, given):
    for height, width in ((5, 7), (4, 4), (5, 7)):
        given["hidden_states"] = torch.randn(2, 4, height, width)
        assert_right(model, given)
    assert counts(model)[0] == 2 * BLOCKS


def test_off_under_grad(model, given):
    def gradients(m):
        m.zero_grad()
        run(m, **given).square().mean().backward()
        return {n: p.grad.clone() for n, p in m.named_parameters()}

    step(model, given)
    cached = counts(model)
    got = gradients(model)
    assert counts(model) == cached
    twin = copy.deepcopy(model)
    sana_ext.patch(twin)
    for name, grad in gradients(twin).items():
        assert torch.equal(got[name], grad), name


def test_inference_mode(model, given):
    with torch.inference_mode():  # what it makes must not serve later steps
        for _ in range(2):
            run(model, **given)
    with torch.inference_mode():
        text = given["encoder_hidden_states"].clone()
        for _ in range(2):
            text += 1  # an inference tensor has no version that could tell
            assert torch.equal(run(model, **given | {"encoder_hidden_states": text}),
                               run(model, **given | {"encoder_hidden_states": text.clone()}))  # fmt: skip
    assert counts(model) == (0, 0)


def test_an_error_closes_the_step(model, given):
    step(model, given)
    with pytest.raises(AttributeError):
        step(model, given | {"timestep": "wrong"})
    assert cache(model)._current.text is None
    assert_right(model, given)


def test_compiles(model, given):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(step(compiled, given), truth(model, given))
        given["encoder_hidden_states"] = given["encoder_hidden_states"] + 1


def test_copies_start_empty(model, given):
    step(model, given)
    twin = copy.deepcopy(model)
    assert cache(twin) is not cache(model)
    assert counts(twin) == (0, 0)
    assert all(vars(block)[ATTRIBUTE] is cache(twin) for block in twin.transformer_blocks)
    edit(twin)
    assert_right(twin, given)
    assert_right(model, given)


def test_pickle_save_and_index_know_nothing_of_it(model, given, tmp_path):
    step(model, given)
    stock = pickle.loads(pickle.dumps(model))
    assert type(stock) is SanaTransformer2DModel
    assert b"sana_ext" not in pickle.dumps(model)
    model.save_pretrained(tmp_path)
    loaded = SanaTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert (type(model).__module__, type(model).__name__) == (
        SanaTransformer2DModel.__module__,
        SanaTransformer2DModel.__name__,
    )
    assert isinstance(model, SanaTransformer2DModel)


def test_unpatch_and_the_last_call_decide(model, given):
    step(model, given)
    kept = cache(model)
    sana_ext.patch(model, cache_text=True)
    assert cache(model) is not kept
    sana_ext.patch(model)
    assert ATTRIBUTE not in vars(model)
    assert type(model) is SanaTransformer2DModel
    sana_ext.patch(model, cache_text=True)
    assert sana_ext.unpatch(model) == BLOCKS
    assert type(model) is SanaTransformer2DModel
    assert {type(block) for block in model.transformer_blocks} == {SanaTransformerBlock}
    assert not any(ATTRIBUTE in vars(module) for module in model.modules())


def test_report(model):
    assert "cached between denoising steps: text of SanaTransformer2DModel" in str(
        sana_ext.patch(model, cache_text=True)
    )
    block = transformer().transformer_blocks[0]
    assert "no SanaTransformer2DModel" in sana_ext.patch(block, cache_text=True).skipped[KEPT]

    class Other(SanaTransformer2DModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    other = transformer()
    other.__class__ = Other
    assert sana_ext.patch(other, cache_text=True).skipped[KEPT] == "Other overrides forward"
    other = transformer()
    other.transformer_blocks = torch.nn.ModuleList()
    assert sana_ext.patch(other, cache_text=True).skipped[KEPT] == "none of its blocks is replaced"
    assert type(other) is SanaTransformer2DModel
    other = transformer()
    other.add_adapter(LORA)
    assert sana_ext.patch(other, cache_text=True).skipped[KEPT] == "no block has plain layers for its text"
    assert inspect.signature(model.forward) == inspect.signature(other.forward)
    other = transformer()
    other.forward = other.forward
    assert "replaced on the instance" in sana_ext.patch(other, cache_text=True).skipped[KEPT]
