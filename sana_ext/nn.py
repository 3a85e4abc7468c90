"""The two halves of a SANA block that have kernels, as modules whose state dicts are those of diffusers' modules.

`linear_attention` and `glumbconv` are the same for models that have their layers elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import _plain as plain
from .ops.glumbconv import dwconv_glu
from .ops.linear import linear
from .ops.linear_attention import linear_attention as _linear_attention

_EPS = 1e-5  # of a norm that is not there


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
        self.eps = eps
        inner = self.heads * head_dim
        where: Any = {"device": device, "dtype": dtype}
        self.norm_q = nn.RMSNorm(inner, norm_eps, **where) if qk_norm else None
        self.norm_k = nn.RMSNorm(inner, norm_eps, **where) if qk_norm else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=bias, **where) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, dim, bias=out_bias, **where), nn.Dropout(dropout)])

    @property
    def norm_eps(self) -> float | None:
        """eps of norm_q, or None without one; set, that of both norms."""
        return None if self.norm_q is None else self.norm_q.eps

    @norm_eps.setter
    def norm_eps(self, eps: float) -> None:
        for norm in (self.norm_q, self.norm_k):
            if norm is not None:
                norm.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, N, C] -> [B, N, C]."""
        q, k, v = (_project(layer, x) for layer in (self.to_q, self.to_k, self.to_v))
        out = linear_attention(q, k, v, self.heads, self.norm_q, self.norm_k, eps=self.eps)
        return self.to_out[1](_project(self.to_out[0], out.to(x.dtype)))  # a foreign layer may have changed it


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
        tokens = x.dim() != 4
        if tokens:
            if height is None or width is None:
                raise ValueError("sana_ext.nn.GLUMBConv: tokens [B, N, C] need height and width")
            x = _image(x, height, width)
        y = glumbconv(x, self.conv_inverted, self.conv_depth, self.conv_point)
        if self.norm is not None:
            y = self.norm(y.movedim(1, -1)).movedim(-1, 1)
        if self.residual_connection:
            y = y + x
        return _tokens(y) if tokens else y


class _BiasedRMSNorm(nn.RMSNorm):
    """RMSNorm with a bias, as diffusers' GLUMBConv has it in the autoencoder."""

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(channels, 1e-5, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.bias


def is_plain(module: nn.Module | None, expected: type, *parameters: str) -> bool:
    """Tells whether code that knows the class may do the module's work itself, or must call it as the module it is.

    Args:
        module: any.
        expected: a class of modules.
        parameters: names of its own weights that are to be read.

    Returns:
        True if the module is exactly of that class, no hook and no other forward (of an adapter, of offloading) would
        take part in its call, and these weights are its own dense tensors (not parametrised, quantised or sharded).
    """
    return plain.owner_reason(module, expected, *parameters) is None


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    norm_q: nn.Module | None = None,
    norm_k: nn.Module | None = None,
    *,
    norm: type = nn.RMSNorm,
    eps: float = 1e-15,
) -> torch.Tensor:
    """``sana_ext.linear_attention`` with modules for norms: those of another kind, or with hooks, are called.

    Args:
        q, k, v: [B, N, H * D], float.
        heads: H.
        norm_q, norm_k: of q and of k, each over all channels; None for no norm.
        norm: the class of norms that the kernels know: x / rms(x) * weight, with attributes weight and eps.
        eps: added to the denominator.

    Returns:
        [B, N, H * D], dtype of q behind its norm.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit.
    """
    q, weight_q, eps_q = _normed(norm_q, norm, q)
    k, weight_k, eps_k = _normed(norm_k, norm, k, None if weight_q is None else eps_q)
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
    norm_eps = eps_k if weight_q is None else eps_q
    return _linear_attention(q, k, v, weight_q=weight_q, weight_k=weight_k, norm_eps=norm_eps, eps=eps).flatten(2)


def glumbconv(x: torch.Tensor, conv_inverted: nn.Module, conv_depth: nn.Module, conv_point: nn.Module) -> torch.Tensor:
    """``sana_ext.glumbconv`` with modules for convolutions: those of another kind or geometry, or with hooks, are called.

    Args:
        x: [B, C, h, w], float.
        conv_inverted, conv_depth, conv_point: 1x1 to 2F channels, 3x3 over each channel, 1x1 from F channels, or
            whatever stands in their places.

    Returns:
        [B, C', h, w], or of the size that the convolutions make.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit.
    """
    u = _pointwise(conv_inverted, x)
    if plain.convolution_reason(conv_depth, 3, plain.operand_of(u), depthwise=True) is None:
        weight, bias = plain.parameter(conv_depth, "weight"), plain.parameter(conv_depth, "bias")
        y = _image(dwconv_glu(_tokens(u), weight, bias, *u.shape[2:]), *u.shape[2:])
    else:
        a, g = conv_depth(F.silu(u)).chunk(2, dim=1)
        y = a * F.silu(g)
    return _pointwise(conv_point, y)


def _normed(norm: Any, expected: type, x: torch.Tensor, eps: float | None = None) -> tuple[torch.Tensor, Any, float]:
    """x, the weight and the eps of a norm that the kernel applies, if its eps is the other norm's; or the norm of x."""
    if norm is None:
        return x, None, _EPS
    if plain.rms_norm_reason(norm, expected, x.shape[-1], plain.operand_of(x)) or eps not in (None, norm.eps):
        return norm(x), None, _EPS
    return x, plain.parameter(norm, "weight"), norm.eps


def _pointwise(conv: Any, x: torch.Tensor) -> torch.Tensor:
    if plain.convolution_reason(conv, 1, plain.operand_of(x)):
        return conv(x)
    y = linear(_tokens(x), plain.parameter(conv, "weight"), plain.parameter(conv, "bias"))
    return _image(y, *x.shape[2:])


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B, h * w, C]; undone by _image, and both are views of what the other made."""
    return x.flatten(2).transpose(1, 2)


def _image(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return x.transpose(1, 2).unflatten(2, (height, width))


def _project(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """A plain nn.Linear's product; a replaced one (LoRA, quantised, hooked) is called as the module it is."""
    if plain.leaf_reason(layer, nn.Linear, plain.operand_of(x)):
        return layer(x)
    return linear(x, plain.parameter(layer, "weight"), plain.parameter(layer, "bias"))
