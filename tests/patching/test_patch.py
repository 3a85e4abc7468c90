"""patch and unpatch: what they replace, report and leave alone, and that weights are read where they are."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaControlNetModel, SanaPipeline, SanaTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from diffusers_models import SMALL, TINY, assert_agrees, assert_fused, fused_calls, inputs, run, transformer
from torch import nn

import sana_ext
from sana_ext import patch as patch_function
from sana_ext.patching import guards, replacement

pytestmark = pytest.mark.usefixtures("fused_parts", "one_thread")


def classes(model):
    """The blocks' classes by identity: a patched one equals the stock class."""
    return [id(type(block)) for block in model.transformer_blocks]


STOCK = id(SanaTransformerBlock)


def test_report_names_every_block():
    model = transformer()
    report = sana_ext.patch(model)
    assert report.replaced == ["transformer_blocks.0", "transformer_blocks.1"]
    assert report.skipped == {}
    assert str(report) == "sana_ext.patch: 2 of 2 blocks replaced"
    assert_fused(model)


def test_unpatch_restores_the_classes():
    model = transformer()
    assert sana_ext.unpatch(model) == 0
    expected = run(model)
    sana_ext.patch(model)
    assert STOCK not in classes(model)
    assert sana_ext.unpatch(model) == 2
    assert classes(model) == [STOCK] * 2
    assert not fused_calls(lambda: run(model))
    assert torch.equal(run(model), expected)


def test_patching_twice_is_patching_once():
    model = transformer()
    first = sana_ext.patch(model)
    before = classes(model)
    again = sana_ext.patch(model)
    assert (again.replaced, again.skipped) == (first.replaced, first.skipped)
    assert classes(model) == before
    assert sana_ext.unpatch(model) == 2
    assert classes(model) == [STOCK] * 2


@pytest.mark.parametrize("cache_text", [False, True])
def test_code_that_compares_classes_takes_a_patched_object_for_what_it_was(cache_text):
    """type(x) in [...], as diffusers' from_pipe asks; what is kept by class in a dictionary stays apart (fully_shard)."""
    model = transformer()
    sana_ext.patch(model, cache_text=cache_text)
    block = model.transformer_blocks[0]
    assert type(block) in [SanaTransformerBlock]
    assert type(block) not in [SanaTransformer2DModel]
    assert {SanaTransformerBlock: 1}.get(type(block)) is None
    assert type(model) in [SanaTransformer2DModel]
    other = type("Other", (type(block),), {})
    assert other not in [SanaTransformerBlock, type(block)]


def test_diffusers_registry_knows_patched_blocks():
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    TransformerBlockRegistry.register(SanaTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
    model = transformer()
    sana_ext.patch(model)
    try:
        found = TransformerBlockRegistry.get(type(model.transformer_blocks[0]))
        assert found.return_hidden_states_index == 0
        assert TransformerBlockRegistry.get(SanaTransformerBlock) is not found
    finally:
        del TransformerBlockRegistry._registry[SanaTransformerBlock]


def test_class_keeps_its_name_and_ancestry():
    """diffusers and accelerate match blocks by class name; user code by isinstance."""
    model = transformer()
    sana_ext.patch(model)
    block = model.transformer_blocks[0]
    assert type(block).__name__ in model._no_split_modules
    assert isinstance(block, SanaTransformerBlock)
    assert classes(model)[0] == classes(model)[1]


def test_patch_draws_no_random_numbers():
    model = transformer()
    replacement._disagreement.cache_clear()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sana_ext.patch(model)
    assert torch.equal(torch.rand(3), expected)


def test_state_dict_is_untouched():
    model = transformer()
    before = {name: (p.data_ptr(), tuple(p.shape)) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    sana_ext.patch(model)
    assert list(model.state_dict()) == keys
    assert {name: (p.data_ptr(), tuple(p.shape)) for name, p in model.named_parameters()} == before


def test_save_pretrained_loads_in_stock(tmp_path):
    model = transformer()
    expected = run(model)
    sana_ext.patch(model)
    model.save_pretrained(tmp_path)
    loaded = SanaTransformer2DModel.from_pretrained(tmp_path)
    assert classes(loaded) == [STOCK] * 2
    assert torch.equal(run(loaded), expected)
    assert '"SanaTransformer2DModel"' in (tmp_path / "config.json").read_text()


def test_torch_save_of_a_state_dict():
    model, other = transformer(), transformer()
    sana_ext.patch(model)
    sana_ext.patch(other)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(run(other), run(model))


def test_pickled_model_is_stock_and_needs_no_sana_ext(tmp_path):
    model = transformer(TINY)
    sana_ext.patch(model)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    assert classes(pickle.loads(pickle.dumps(model))) == [STOCK]
    code = (
        "import pickle, sys; sys.modules['sana_ext'] = None\n"
        f"model = pickle.load(open({str(tmp_path / 'model.pickle')!r}, 'rb'))\n"
        "assert type(model.transformer_blocks[0]).__module__.startswith('diffusers.')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: copy.copy(m.transformer_blocks[0])], ids=["deep", "shallow"]
)
def test_copies_are_patched(copier):
    model = transformer()
    sana_ext.patch(model)
    twin = copier(model)
    block = twin if isinstance(twin, SanaTransformerBlock) else twin.transformer_blocks[0]
    assert type(block) is type(model.transformer_blocks[0])


def test_deepcopy_is_independent():
    model = transformer()
    sana_ext.patch(model)
    expected = run(model)
    twin = copy.deepcopy(model)
    assert_fused(twin)
    assert torch.equal(run(twin), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert torch.equal(run(model), expected)
    sana_ext.unpatch(twin)
    assert_fused(model)


def test_weights_are_read_at_every_call():
    """In-place updates, replaced parameters, load_state_dict: nothing goes stale."""
    model = transformer()
    sana_ext.patch(model)
    outputs = [run(model)]

    def changed():
        outputs.append(assert_agrees(model))
        assert (outputs[-1] - outputs[-2]).abs().max() > 1e-3

    block = model.transformer_blocks[1]
    with torch.no_grad():
        for name in ("attn1.to_q", "attn1.to_v", "attn2.to_k", "ff.conv_inverted", "ff.conv_depth", "ff.conv_point"):
            weight = block.get_submodule(name).weight
            weight.add_(weight.std() * torch.randn_like(weight))
            changed()
        block.attn1.to_out[0].weight = nn.Parameter(block.attn1.to_out[0].weight * -1)
        changed()
        block.scale_shift_table.neg_()
        changed()
        model.load_state_dict({name: t * 0.9 for name, t in model.state_dict().items()})
        changed()


def test_training_step_matches_stock():
    losses = []
    for patched in (False, True):
        model = transformer().train()
        if patched:
            sana_ext.patch(model)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        for _ in range(3):
            loss = run(model).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_dtype_moves_after_patch():
    model = transformer()
    sana_ext.patch(model)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert run(model).dtype == dtype
        assert_fused(model)
    model.to(memory_format=torch.channels_last)
    assert_fused(model)
    assert_agrees(model)


def test_meta_device_is_left_to_diffusers():
    model = transformer().to("meta")
    report = sana_ext.patch(model)
    assert report.replaced == []
    assert "no compiled kernel answers on meta" in report.skipped["transformer_blocks.0"]
    model = transformer()
    sana_ext.patch(model)
    model.to("meta")
    on_meta = {k: v.to("meta") for k, v in inputs(model).items()}
    assert model(**on_meta).sample.device.type == "meta"


def test_without_kernels_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(guards, "find_kernels", lambda: None)
    monkeypatch.setattr(guards, "compiled_parts", {})
    model = transformer()
    report = sana_ext.patch(model)
    assert (report.replaced, report.blocks) == ([], 2)
    assert classes(model) == [STOCK] * 2
    assert "0 of 2 blocks replaced" in str(report)
    assert "no compiled kernel answers on cpu" in str(report)


def test_kernels_decide_part_by_part(monkeypatch):
    """Parts with kernels run fused; those without backward kernels only where no gradient is wanted."""
    monkeypatch.setattr(guards, "find_kernels", lambda: None)
    monkeypatch.setattr(guards, "compiled_parts", {("cpu", False): ("norms", "ff"), ("cpu", True): ("norms",)})
    model = transformer()
    report = sana_ext.patch(model)
    assert report.skipped == dict.fromkeys(
        ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"], "no compiled kernel answers on cpu"
    )
    with torch.no_grad():
        assert_fused(model, without=("linear_attention_forward",))
    assert_fused(model, without=("linear_attention_forward", "dwconv_glu_forward"))
    assert_agrees(model)


def test_another_diffusers_that_computes_something_else_is_refused(monkeypatch):
    """The check that runs once per process sees a changed formula."""
    original = SanaTransformerBlock.forward

    def changed(self, hidden_states, *args, **kwargs):
        return original(self, hidden_states, *args, **kwargs) + 1e-2 * hidden_states

    monkeypatch.setattr(SanaTransformerBlock, "forward", changed)
    replacement._disagreement.cache_clear()
    try:
        report = sana_ext.patch(transformer())
    finally:
        replacement._disagreement.cache_clear()
    assert report.replaced == []
    assert "computes something else" in report.skipped["transformer_blocks.0"]


def test_controlnet():
    torch.manual_seed(0)
    model = SanaControlNetModel(**{k: v for k, v in SMALL.items() if k not in ("out_channels", "qk_norm")}).eval()
    for p in model.controlnet_blocks.parameters():
        nn.init.normal_(p, std=0.1)
    given = inputs(model)
    control = torch.randn_like(given["hidden_states"])
    expected = model(controlnet_cond=control, **given).controlnet_block_samples
    report = sana_ext.patch(model)
    assert report.replaced == ["transformer_blocks.0", "transformer_blocks.1"]
    got = []
    calls = fused_calls(lambda: got.extend(model(controlnet_cond=control, **given).controlnet_block_samples))
    assert calls["dwconv_glu_forward"] == 2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_pipeline():
    model = transformer()
    pipe = SanaPipeline(None, None, None, model, FlowMatchEulerDiscreteScheduler())
    report = sana_ext.patch(pipe)
    assert report.replaced == ["transformer.transformer_blocks.0", "transformer.transformer_blocks.1"]
    assert_fused(model)
    assert sana_ext.unpatch(pipe) == 2


def test_any_module_that_contains_blocks():
    holder = nn.Sequential(nn.Linear(2, 2), transformer(TINY))
    assert sana_ext.patch(holder).replaced == ["1.transformer_blocks.0"]
    block = transformer(TINY).transformer_blocks[0]
    assert sana_ext.patch(block).replaced == ["SanaTransformerBlock"]


def test_module_without_blocks():
    report = sana_ext.patch(nn.Linear(2, 2))
    assert (report.replaced, report.blocks) == ([], 0)
    assert "no SanaTransformerBlock of diffusers in Linear" in str(report)


@pytest.mark.parametrize("function", [sana_ext.patch, sana_ext.unpatch])
@pytest.mark.parametrize("wrong", [None, 3, "model", SanaTransformer2DModel, {"transformer": None}, object()])
def test_wrong_argument(function, wrong):
    with pytest.raises(
        TypeError, match=r"expected a torch.nn.Module or a diffusers pipeline with a transformer, got \w+$"
    ):
        function(wrong)


@pytest.mark.parametrize("option", ["cuda_graph", "cache_text"])
def test_options(option):
    model = transformer(TINY)
    if option == "cuda_graph":
        with pytest.raises(ValueError, match="cuda_graph=True needs a model on cuda, this one is on cpu"):
            sana_ext.patch(model, **{option: True})
    with pytest.raises(TypeError, match=f"{option} must be True or False"):
        sana_ext.patch(model, **{option: 1})
    assert classes(model) == [STOCK]


def test_the_package_names_the_function():
    assert callable(sana_ext.patch)
    assert sana_ext.patch is patch_function is replacement.patch
