"""What several test files share of nn."""

from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import nn

import sana_ext

C, H = 64, 2


def attentions(qk_norm, bias=False):
    """(ours, diffusers'), with the same weights."""
    stock = Attention(
        C, heads=H, kv_heads=H if qk_norm else None, dim_head=32, bias=bias, qk_norm=qk_norm,
        processor=SanaLinearAttnProcessor2_0(),
    )  # fmt: skip
    ours = sana_ext.nn.LinearAttention(C, qk_norm=qk_norm, bias=bias)
    assert list(ours.state_dict()) == list(stock.state_dict())
    if qk_norm:
        nn.init.normal_(stock.norm_q.weight, 1, 0.3)
        nn.init.normal_(stock.norm_k.weight, 1, 0.3)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours, stock


def convolutions(**options):
    stock = GLUMBConv(16, 16, 2.5, **options)
    ours = sana_ext.nn.GLUMBConv(16, 16, 2.5, **options)
    assert list(ours.state_dict()) == list(stock.state_dict())
    if stock.norm is not None:
        nn.init.normal_(stock.norm.weight, 1, 0.3)
        nn.init.normal_(stock.norm.bias)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours, stock
