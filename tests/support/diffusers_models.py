"""Small diffusers SANA models, and how to tell what a patched one computes and with what."""

from collections import Counter

import torch
from diffusers import SanaTransformer2DModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sana_ext

# The test configuration of diffusers' own suite (head_dim 4), and a smaller sister of SANA-1.5.
TINY = {
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 4,
    "num_attention_heads": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 4,
    "cross_attention_dim": 8,
    "caption_channels": 8,
    "sample_size": 32,
}
SMALL = TINY | {
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "num_cross_attention_heads": 3,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 96,
    "mlp_ratio": 1.0,
    "caption_channels": 24,
    "qk_norm": "rms_norm_across_heads",
}
SIGN_MARGIN = 6.0
TIMESTEP = torch.tensor([4, 512])  # powers of two: the sinusoid's arguments are the same in every precision


def transformer(config=SMALL, **changes):
    """A model whose modulation is large enough that every gate, shift and scale matters.

    With attention_bias, the q and k of self-attention keep their signs under rounding: every other channel is pushed
    up, the rest down. Without it, one q that changes sign in front of the ReLU decides a gradient's largest error.
    """
    torch.manual_seed(0)
    model = SanaTransformer2DModel(**(config | changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("scale_shift_table"):
                p.copy_(0.7 * torch.randn_like(p))
            elif "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
            elif name.endswith(("attn1.to_q.bias", "attn1.to_k.bias")):
                p.copy_(SIGN_MARGIN * (1 - 2.0 * (torch.arange(len(p)) % 2)))
    return model


def inputs(model, height=5, width=7, tokens=6, masked=True, batch=2):
    torch.manual_seed(1)
    given = {
        "hidden_states": torch.randn(batch, model.config.in_channels, height, width),
        "encoder_hidden_states": torch.randn(batch, tokens, model.config.caption_channels),
        "timestep": TIMESTEP[:batch],
    }
    if masked:
        given["encoder_attention_mask"] = torch.ones(batch, tokens)
        given["encoder_attention_mask"][0, tokens // 2 :] = 0
    dtype = model.dtype if model.dtype.itemsize > 1 else torch.float32
    return {k: v if k == "timestep" else v.to(dtype) for k, v in given.items()}


def run(model, **changes):
    return model(**(inputs(model) | changes)).sample


class _Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sana_ext":
            self.calls[func._schema.name.removeprefix("sana_ext::")] += 1
        return func(*args, **(kwargs or {}))


def fused_calls(fn):
    """How often each op of this package ran inside fn()."""
    with _Record() as record:
        fn()
    return record.calls


FUSED_BLOCK = {
    "norm_modulate_forward": 1,
    "gated_residual_forward": 2,
    "residual_norm_modulate_forward": 1,
    "linear_attention_forward": 1,
    "dwconv_glu_forward": 1,
}


def assert_fused(model, blocks=None, without=()):
    """Every block runs every op of the fused path, except those in `without`."""
    calls = fused_calls(lambda: run(model))
    blocks = len(model.transformer_blocks) if blocks is None else blocks
    expected = {op: n * blocks for op, n in FUSED_BLOCK.items() if op not in without and n * blocks}
    assert {op: n for op, n in calls.items() if op in FUSED_BLOCK} == expected


def assert_agrees(model, tolerance=2e-5):
    """The patched model computes what it computes after unpatch (fp32); leaves it patched."""
    with torch.no_grad():
        fused = run(model)
        assert sana_ext.unpatch(model)
        stock = run(model)
    sana_ext.patch(model)
    assert (fused - stock).abs().max() <= tolerance * stock.abs().max()
    return fused


class ExactStock(TorchFunctionMode):
    """diffusers casts to fp32 in its attention core and its RMSNorms; under this mode an fp64 model stays fp64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        elif func is torch.Tensor.to and torch.float32 in args:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **(kwargs or {}))
