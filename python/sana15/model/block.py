"""One block of the SANA transformer (arXiv:2410.10629, section 2.2; qk-norm: arXiv:2501.18427), and its layers.

B batch, N tokens, T text tokens, C width, H heads, D head dim, F Mix-FFN hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

import sana_ext

from .config import SanaConfig


class Linear(nn.Linear):
    """nn.Linear on sana_ext.linear: on CPUs without 16-bit arithmetic it computes in fp32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sana_ext.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the channels; statistics in fp32, rounded before the weight as diffusers does."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        accumulator = x.double() if x.dtype == torch.float64 else x.float()
        rstd = torch.rsqrt(accumulator.square().mean(-1, keepdim=True) + self.eps)
        weight = self.weight  # once: it may be a function of other parameters
        return (accumulator * rstd).to(weight.dtype) * weight


class SelfAttention(nn.Module):
    """ReLU linear attention, H heads of D; qk-norm over all channels before the ReLU."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        C = config.width
        self.heads = config.num_attention_heads
        self.norm_q = RMSNorm(C) if config.qk_norm else None
        self.norm_k = RMSNorm(C) if config.qk_norm else None
        self.to_q = Linear(C, C, bias=config.attention_bias)
        self.to_k = Linear(C, C, bias=config.attention_bias)
        self.to_v = Linear(C, C, bias=config.attention_bias)
        self.to_out = nn.ModuleList([Linear(C, C)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, N, C] -> [B, N, C]
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        out = sana_ext.nn.linear_attention(q, k, v, self.heads, self.norm_q, self.norm_k, norm=RMSNorm)
        out = self.to_out[0](out.to(x.dtype))  # a foreign layer may have changed it
        # The fp16-trained SANA-1.0 1.6B needs this clip (its activations exceed fp16's range).
        return out.clip(-65504, 65504) if x.dtype == torch.float16 else out


class CrossAttention(nn.Module):
    """Softmax attention from image tokens to text tokens."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        C = config.width
        self.heads = config.num_cross_attention_heads
        self.norm_q = RMSNorm(C) if config.qk_norm else None
        self.norm_k = RMSNorm(C) if config.qk_norm else None
        self.to_q, self.to_k, self.to_v = Linear(C, C), Linear(C, C), Linear(C, C)
        self.to_out = nn.ModuleList([Linear(C, C)])

    def keys_and_values(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # [B, T, C] -> twice [B, T, C]
        k, v = self.to_k(text), self.to_v(text)
        return (k if self.norm_k is None else self.norm_k(k)), v

    def forward(
        self,
        hidden_states: torch.Tensor,  # [B, N, C]
        encoder_hidden_states: torch.Tensor | tuple[torch.Tensor, torch.Tensor],  # [B, T, C], or its keys and values
        attention_mask: torch.Tensor | None = None,  # [B, 1, T], added to the scores
    ) -> torch.Tensor:
        text = encoder_hidden_states
        q = self.to_q(hidden_states)
        k, v = (self.to_k(text), self.to_v(text)) if isinstance(text, torch.Tensor) else text
        if self.norm_q is not None:
            q = self.norm_q(q)
        if self.norm_k is not None and isinstance(text, torch.Tensor):
            k = self.norm_k(k)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        return self.to_out[0](sana_ext.cross_attention(q, k, v, attention_mask).flatten(2).to(q.dtype))


class MixFFN(nn.Module):
    """1x1 to 2F, SiLU, depthwise 3x3, a * silu(g), 1x1 back. The zero padding of the 3x3 is the position signal."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        C, F = config.width, config.hidden
        self.conv_inverted = nn.Conv2d(C, 2 * F, 1)
        self.conv_depth = nn.Conv2d(2 * F, 2 * F, 3, padding=1, groups=2 * F)
        self.conv_point = nn.Conv2d(F, C, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, C, h, w] -> [B, C, h, w]
        return sana_ext.nn.glumbconv(x, self.conv_inverted, self.conv_depth, self.conv_point)


class Norm(NamedTuple):
    """A LayerNorm's adaptive modulation and its eps."""

    shift: torch.Tensor  # [B, C]
    scale: torch.Tensor  # [B, C]
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return sana_ext.norm_modulate(x, self.shift, self.scale, eps=self.eps)


class Block(nn.Module):
    """x += gate1 * attn(mod1(LN x));  x += cross(x, text), no norm, no gate;  x += gate2 * ffn(mod2(LN x)).

    `forward` is called as diffusers calls its block, and so are the modules inside: hooks see what they see there.
    """

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        C = config.width
        self.eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, C) / C**0.5)
        self.attn1 = SelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.ff = MixFFN(config)

    def forward(
        self,
        hidden_states: torch.Tensor,  # [B, N, C], the residual stream
        attention_mask: None,  # without effect, as in diffusers
        encoder_hidden_states: torch.Tensor | tuple[torch.Tensor, torch.Tensor],  # [B, T, C], or its keys and values
        encoder_attention_mask: torch.Tensor | None,  # [B, 1, T]
        timestep: torch.Tensor,  # [B, 6C]
        height: int,
        width: int,
    ) -> torch.Tensor:  # [B, N, C]
        modulation = self._modulation(timestep)
        n = self._first(modulation)(hidden_states)
        text, bias = encoder_hidden_states, encoder_attention_mask
        return self._parts(hidden_states, n, text, bias, modulation, None, height, width)[0]

    def first_norm(self, t6: torch.Tensor) -> Norm:
        return self._first(self._modulation(t6))

    def between_norms(
        self,
        x: torch.Tensor,  # [B, N, C], the residual stream
        n: torch.Tensor,  # [B, N, C], first_norm of x
        text: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        bias: torch.Tensor | None,
        t6: torch.Tensor,  # [B, 6C]
        following: Norm | None,  # of what comes after this block
        height: int,
        width: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The residual stream after the block, and its following norm: the last gated residual and that norm are one pass
        over memory."""
        return self._parts(x, n, text, bias, self._modulation(t6), following, height, width)

    def _modulation(self, t6: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(shift1, scale1, gate1, shift2, scale2, gate2), [B, C] each."""
        return (self.scale_shift_table + t6.unflatten(-1, (6, -1))).unbind(1)

    def _first(self, modulation: tuple[torch.Tensor, ...]) -> Norm:
        return Norm(modulation[0], modulation[1], self.eps)

    def _parts(
        self, x: torch.Tensor, n: torch.Tensor, text: Any, bias: torch.Tensor | None, modulation: Sequence[torch.Tensor],
        following: Norm | None, height: int, width: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        _, _, gate1, shift2, scale2, gate2 = modulation
        dtype = n.dtype
        x = sana_ext.gated_residual(x, self.attn1(n), gate1)
        y = self.attn2(x, encoder_hidden_states=text, attention_mask=bias)
        x, n = sana_ext.residual_norm_modulate(x, y, shift2, scale2, eps=self.eps, out_dtype=dtype)
        y = self.ff(n.transpose(1, 2).unflatten(2, (height, width))).flatten(2).transpose(1, 2)  # views of the tokens
        if following is None:
            return sana_ext.gated_residual(x, y, gate2), None
        shift, scale, eps = following
        return sana_ext.residual_norm_modulate(x, y, shift, scale, gate=gate2, eps=eps, out_dtype=dtype)
