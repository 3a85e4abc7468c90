"""The two halves of a SANA block that have kernels, as modules whose state dicts are those of diffusers' modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import _guards as guards
from .ops._arithmetic import autocast_dtype
from .ops.glumbconv import glumbconv
from .ops.linear import linear
from .ops.linear_attention import linear_attention


class LinearAttention(nn.Module):
    """ReLU linear attention with its projections: ``out = relu(q) S / (relu(q) z + eps)``.

    S = sum relu(k) v^T and z = sum relu(k) run over the tokens, per head.

    The state dict is that of diffusers' ``Attention`` with ``SanaLinearAttnProcessor2_0``: to_q, to_k, to_v, to_out.0
    and, with qk_norm, norm_q and norm_k (RMSNorm over all channels, before ReLU).

    Args:
        dim: channels of input and output.
        heads: number of heads; default dim // head_dim.
        head_dim: channels per head (SANA: 32).
        qk_norm: None, or "rms_norm_across_heads" (SANA-1.5).
        bias, out_bias: biases of to_q, to_k, to_v and of to_out.0.
        dropout: probability, after to_out.0.
        norm_eps: eps of the RMSNorms.
        eps: added to the denominator (diffusers 1e-15, NVlabs/Sana 1e-8).
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown qk_norm, or heads and head_dim missing for dim.

    Source: arXiv:2410.10629, section 2.2; SANA-1.5, arXiv:2501.18427.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None = None,
        head_dim: int = 32,
        *,
        qk_norm: str | None = None,
        bias: bool = False,
        out_bias: bool = True,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
        eps: float = 1e-15,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if qk_norm not in (None, "rms_norm_across_heads"):
            raise ValueError(
                f"sana_ext.nn.LinearAttention: qk_norm must be None or 'rms_norm_across_heads', got {qk_norm!r}"
            )
        if heads is None and dim % head_dim:
            raise ValueError(
                f"sana_ext.nn.LinearAttention: dim {dim} is not a multiple of head_dim {head_dim}; give heads"
            )
        self.heads = heads or dim // head_dim
        self.norm_eps, self.eps = norm_eps, eps
        inner = self.heads * head_dim
        where: Any = {"device": device, "dtype": dtype}
        self.norm_q = nn.RMSNorm(inner, norm_eps, **where) if qk_norm else None
        self.norm_k = nn.RMSNorm(inner, norm_eps, **where) if qk_norm else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=bias, **where) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, dim, bias=out_bias, **where), nn.Dropout(dropout)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, N, C] -> [B, N, C]."""
        q, k, v = (_project(layer, x).unflatten(-1, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        out = linear_attention(
            q,
            k,
            v,
            weight_q=None if self.norm_q is None else self.norm_q.weight,
            weight_k=None if self.norm_k is None else self.norm_k.weight,
            norm_eps=self.norm_eps,
            eps=self.eps,
        )
        return self.to_out[1](_project(self.to_out[0], out.flatten(2)))


class GLUMBConv(nn.Module):
    """SANA's Mix-FFN: 1x1 convolution, SiLU, depthwise 3x3, GLU, 1x1 convolution; optional RMSNorm and residual.

    The state dict is that of diffusers' ``GLUMBConv``: conv_inverted, conv_depth, conv_point and, with norm_type, norm.

    Args:
        in_channels, out_channels: channels of input and output.
        expand_ratio: hidden channels F = int(expand_ratio * in_channels) (SANA's transformer: 2.5).
        norm_type: None, or "rms_norm" (over channels, eps 1e-5, with weight and bias), after the last convolution.
        residual_connection: add the input at the end (SANA's transformer: False; its autoencoder: True).
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown norm_type.

    Source: arXiv:2410.10629, section 2.2; diffusers ``GLUMBConv``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expand_ratio: float = 4,
        norm_type: str | None = None,
        residual_connection: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm_type not in (None, "rms_norm"):
            raise ValueError(f"sana_ext.nn.GLUMBConv: norm_type must be None or 'rms_norm', got {norm_type!r}")
        hidden = int(expand_ratio * in_channels)
        where: Any = {"device": device, "dtype": dtype}
        self.residual_connection = residual_connection
        self.conv_inverted = nn.Conv2d(in_channels, hidden * 2, 1, **where)
        self.conv_depth = nn.Conv2d(hidden * 2, hidden * 2, 3, padding=1, groups=hidden * 2, **where)
        self.conv_point = nn.Conv2d(hidden, out_channels, 1, bias=False, **where)
        self.norm = None if norm_type is None else _BiasedRMSNorm(out_channels, **where)

    def forward(self, x: torch.Tensor, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """x: [B, C, h, w] -> [B, C', h, w], or tokens [B, N, C] with height and width -> [B, N, C']."""
        image = x.dim() == 4
        if image:
            height, width = x.shape[2:]
            x = x.flatten(2).transpose(1, 2)
        elif height is None or width is None:
            raise ValueError("sana_ext.nn.GLUMBConv: tokens [B, N, C] need height and width")
        y = self._glumbconv(x, height, width)
        if self.norm is not None:
            y = self.norm(y)
        if self.residual_connection:
            y = y + x
        return y.transpose(1, 2).unflatten(2, (height, width)) if image else y

    def _glumbconv(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        inner, depth, point = self.conv_inverted, self.conv_depth, self.conv_point
        if any(guards.leaf_reason(conv, nn.Conv2d, _operand(x)) for conv in (inner, depth, point)):
            # A replaced layer (LoRA, hooked) is called as the module it is.
            u = depth(F.silu(inner(x.transpose(1, 2).unflatten(2, (height, width)))))
            a, g = u.chunk(2, dim=1)
            return point(a * F.silu(g)).flatten(2).transpose(1, 2)
        return glumbconv(x, inner.weight, inner.bias, depth.weight, depth.bias, point.weight, height, width)


class _BiasedRMSNorm(nn.RMSNorm):
    """RMSNorm with a bias, as diffusers' GLUMBConv has it in the autoencoder."""

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(channels, 1e-5, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.bias


def _operand(x: torch.Tensor) -> guards.Operand:
    return guards.Operand(x.device, x.dtype, autocast_dtype(x.device))


def _project(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """A plain nn.Linear's product; a replaced one (LoRA, quantised, hooked) is called as the module it is."""
    if guards.leaf_reason(layer, nn.Linear, _operand(x)):
        return layer(x)
    return linear(x, layer.weight, layer.bias)
