"""The SANA transformer (arXiv:2410.10629, arXiv:2501.18427) on the ops of sana_ext.

Parameter names are those of diffusers' SanaTransformer2DModel, so its folders load strictly and ours load there.

B batch, h x w latent grid, N = h*w tokens, T text tokens, C width, H heads, D head dim, F Mix-FFN hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sana_ext

from .config import SanaConfig

FREQUENCIES = 256  # width of the sinusoidal embedding of time and guidance
MASKED = -10000.0  # additive bias of a masked text token; finite, so a fully masked row is uniform instead of NaN


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
        return (accumulator * rstd).to(self.weight.dtype) * self.weight


class SelfAttention(nn.Module):
    """ReLU linear attention, H heads of D; qk-norm over all channels before the ReLU."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        C = config.width
        self.heads = config.num_attention_heads
        if config.qk_norm:
            self.norm_q: RMSNorm | None = RMSNorm(C)
            self.norm_k: RMSNorm | None = RMSNorm(C)
        else:
            self.norm_q = self.norm_k = None
        self.to_q = Linear(C, C, bias=config.attention_bias)
        self.to_k = Linear(C, C, bias=config.attention_bias)
        self.to_v = Linear(C, C, bias=config.attention_bias)
        self.to_out = nn.ModuleList([Linear(C, C)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, N, C] -> [B, N, C]
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)) for to in (self.to_q, self.to_k, self.to_v))
        weights: dict[str, Any] = {}
        if self.norm_q is not None and self.norm_k is not None:
            weights = {"weight_q": self.norm_q.weight, "weight_k": self.norm_k.weight, "norm_eps": self.norm_q.eps}
        out = self.to_out[0](sana_ext.linear_attention(q, k, v, **weights).flatten(2))
        # The fp16-trained SANA-1.0 1.6B needs this clip (its activations exceed fp16's range).
        return out.clip(-65504, 65504) if x.dtype == torch.float16 else out


class CrossAttention(nn.Module):
    """Softmax attention from image tokens to text tokens."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        C = config.width
        self.heads = config.num_cross_attention_heads
        if config.qk_norm:
            self.norm_q: nn.Module = RMSNorm(C)
            self.norm_k: nn.Module = RMSNorm(C)
        else:
            self.norm_q = self.norm_k = nn.Identity()
        self.to_q, self.to_k, self.to_v = Linear(C, C), Linear(C, C), Linear(C, C)
        self.to_out = nn.ModuleList([Linear(C, C)])

    def keys_and_values(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # [B, T, C] -> twice [B, T, C]
        return self.norm_k(self.to_k(text)), self.to_v(text)

    def forward(
        self, x: torch.Tensor, text: torch.Tensor | tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor | None
    ) -> torch.Tensor:
        # x [B, N, C], text [B, T, C] or its keys and values, bias [B, 1, T]
        k, v = self.keys_and_values(text) if isinstance(text, torch.Tensor) else text
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (self.norm_q(self.to_q(x)), k, v))
        return self.to_out[0](sana_ext.cross_attention(q, k, v, bias).flatten(2).to(q.dtype))


class MixFFN(nn.Module):
    """1x1 to 2F, SiLU, depthwise 3x3, a * silu(g), 1x1 back. The zero padding of the 3x3 is the position signal."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        C, F = config.width, config.hidden
        self.conv_inverted = nn.Conv2d(C, 2 * F, 1)
        self.conv_depth = nn.Conv2d(2 * F, 2 * F, 3, padding=1, groups=2 * F)
        self.conv_point = nn.Conv2d(F, C, 1, bias=False)

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:  # [B, N, C] -> [B, N, C]
        i, d, p = self.conv_inverted, self.conv_depth, self.conv_point
        return sana_ext.glumbconv(x, i.weight, i.bias, d.weight, d.bias, p.weight, height, width)


class Block(nn.Module):
    """x += gate1 * attn(mod1(LN x));  x += cross(x, text), no norm, no gate;  x += gate2 * ffn(mod2(LN x))."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        C = config.width
        self.eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, C) / C**0.5)
        self.attn1 = SelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.ff = MixFFN(config)

    def modulation(self, t6: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(shift1, scale1, gate1, shift2, scale2, gate2), [B, C] each, from the shared t6 [B, 6, C]."""
        return (self.scale_shift_table + t6).unbind(1)

    def forward(
        self,
        x: torch.Tensor,  # [B, N, C], the residual stream
        n: torch.Tensor,  # [B, N, C], x normalised and modulated for this block's attention
        text: torch.Tensor | tuple[torch.Tensor, torch.Tensor],  # [B, T, C], or its keys and values
        bias: torch.Tensor | None,  # [B, 1, T]
        t6: torch.Tensor,  # [B, 6, C]
        next_shift: torch.Tensor,  # [B, C], the modulation of what follows this block
        next_scale: torch.Tensor,  # [B, C]
        height: int,
        width: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream after the block, and the same normalised for what follows: the last gated residual and the
        next norm are one pass over memory."""
        _, _, gate1, shift2, scale2, gate2 = self.modulation(t6)
        x = sana_ext.gated_residual(x, self.attn1(n), gate1)
        x, n = sana_ext.residual_norm_modulate(
            x, self.attn2(x, text, bias), shift2, scale2, eps=self.eps, out_dtype=n.dtype
        )
        y = self.ff(n, height, width)
        return sana_ext.residual_norm_modulate(
            x, y, next_shift, next_scale, gate=gate2, eps=self.eps, out_dtype=n.dtype
        )


def sinusoid(t: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 256] in fp32: 128 cosines, then 128 sines, of t * 10000^(-i/128)."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class Embedder(nn.Module):
    """Linear, SiLU, Linear on a sinusoid."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(FREQUENCIES, C), Linear(C, C)

    def forward(self, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(sinusoid(t).to(dtype))))


class TimeEmbedding(nn.Module):
    """adaLN-single: the embedding of the timestep (and of the guidance scale), and the 6C vector all blocks share."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        C = config.width
        if config.guidance_embeds:  # diffusers names the Sprint embedder without `emb`
            self.timestep_embedder, self.guidance_embedder = Embedder(C), Embedder(C)
        else:
            self.emb = nn.ModuleDict({"timestep_embedder": Embedder(C)})
        self.linear = Linear(C, 6 * C)

    def forward(
        self, t: torch.Tensor, guidance: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if guidance is not None:
            embedded = self.timestep_embedder(t, dtype) + self.guidance_embedder(guidance, dtype)
        else:
            embedded = self.emb["timestep_embedder"](t, dtype)
        t6 = self.linear(nn.functional.silu(embedded))
        return embedded, t6.unflatten(-1, (6, -1))


class TextProjection(nn.Module):
    """Linear, GELU (tanh form), Linear on the text encoder's features."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        self.linear_1 = Linear(config.caption_channels, config.width)
        self.linear_2 = Linear(config.width, config.width)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(text), approximate="tanh"))


class PatchEmbed(nn.Module):
    """patch x patch convolution to C; a 2-D sin-cos embedding only where the config asks for one (2K, 4K)."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, patch, stride=patch)
        self.base, self.interpolation_scale = config.sample_size // patch, config.interpolation_scale

    def forward(self, latents: torch.Tensor) -> torch.Tensor:  # [B, channels, H, W] -> [B, N, C]
        x = self.proj(latents)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        if self.interpolation_scale is None:
            return x
        return (x + position_embedding(height, width, x.shape[-1], self.base, self.interpolation_scale, x.device)).to(
            x.dtype
        )


def position_embedding(
    height: int, width: int, C: int, base: int, interpolation_scale: float, device: torch.device
) -> torch.Tensor:
    """[N, C]: sines and cosines of the column, then of the row, on a grid scaled to the side the model was made for."""
    frequencies = 1.0 / 10000 ** (torch.arange(C // 4, dtype=torch.float64, device=device) / (C / 4))

    def axis(count: int) -> torch.Tensor:  # [count, C / 2]
        position = torch.arange(count, device=device).double() * (base / count) / interpolation_scale
        angles = position[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)

    columns = axis(width)[None].expand(height, -1, -1)
    rows = axis(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1).float()


class Text(NamedTuple):
    """A text as the blocks' cross-attentions see it: what does not change from one denoising step to the next."""

    pairs: list[tuple[torch.Tensor, torch.Tensor]]  # keys and values [B, T, C] of every block
    bias: torch.Tensor | None  # [B, 1, T]

    def last(self, B: int) -> Text:
        """Of the last B of its images."""
        return Text([(k[-B:], v[-B:]) for k, v in self.pairs], None if self.bias is None else self.bias[-B:])

    def select(self, rows: torch.Tensor) -> Text:
        """Of the chosen images."""
        return Text([(k[rows], v[rows]) for k, v in self.pairs], None if self.bias is None else self.bias[rows])


class SanaTransformer(nn.Module):
    """Latents, text features and a timestep in; the flow's velocity out.

    Args:
        config: SanaConfig; SanaConfig.named("1600M") and so on for the published sizes.

    Attributes:
        gradient_checkpointing: recompute each block in the backward instead of storing its activations.
        growth_map: of a model that sana15.grow made: for every block the source's block that it copies, None for a new one.
        kept_blocks: of a model that sana15.prune made: the source's blocks that it consists of.
    """

    growth_map: list[int | None] | None = None
    kept_blocks: list[int] | None = None

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        C = config.width
        self.patch_embed = PatchEmbed(config)
        self.time_embed = TimeEmbedding(config)
        self.caption_projection = TextProjection(config)
        self.caption_norm = RMSNorm(C)
        self.transformer_blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.scale_shift_table = nn.Parameter(torch.randn(2, C) / C**0.5)
        self.proj_out = Linear(C, config.patch_size**2 * config.out_channels)

    def project(self, text: torch.Tensor, text_mask: torch.Tensor | None = None) -> Text:
        """What forward takes in place of text and mask, to be computed once for many steps. It keeps the weights' values."""
        self._check_text(text, text_mask, text.shape[0])
        states = self._states(text)
        pairs = [block.attn2.keys_and_values(states) for block in self.transformer_blocks]  # type: ignore[union-attr,operator]
        return Text(pairs, self._bias(text_mask, states.dtype))

    def _states(self, text: torch.Tensor) -> torch.Tensor:
        return self.caption_norm(self.caption_projection(text))

    def _bias(self, text_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        return None if text_mask is None else ((1 - text_mask.to(dtype)) * MASKED)[:, None]

    def forward(
        self,
        latents: torch.Tensor,
        text: torch.Tensor | Text,
        timestep: torch.Tensor,
        text_mask: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocity of the flow, eps - x0.

        Args:
            latents: [B, in_channels, H, W], float; H and W multiples of the patch size.
            text: [B, T, caption_channels], float, the text encoder's features; or what `project` made of them.
            timestep: [B], 1000 * sigma (0 clean, 1000 noise).
            text_mask: [B, T], 1 or True = keep; None keeps all, or what `project` was given.
            guidance: [B], guidance scale times guidance_embeds_scale; exactly for models with guidance_embeds.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: shapes that do not fit, or guidance missing or unexpected.
        """
        self._check(latents, text, timestep, text_mask, guidance)
        patch = self.config.patch_size
        height, width = latents.shape[-2] // patch, latents.shape[-1] // patch
        x = self.patch_embed(latents).contiguous()
        embedded, t6 = self.time_embed(timestep, guidance, x.dtype)
        blocks: list[Block] = list(self.transformer_blocks)  # type: ignore[arg-type]
        texts: Sequence[torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
        if isinstance(text, Text):
            bias, texts = text.bias, text.pairs
        else:
            bias, texts = self._bias(text_mask, x.dtype), [self._states(text)] * len(blocks)
        final_shift, final_scale = (self.scale_shift_table + embedded[:, None]).unbind(1)

        following = [block.modulation(t6)[:2] for block in blocks] + [(final_shift, final_scale)]
        n = sana_ext.norm_modulate(x, *following[0], eps=self.config.norm_eps)
        for block, states, (shift, scale) in zip(blocks, texts, following[1:]):
            arguments = (x, n, states, bias, t6, shift, scale, height, width)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, n = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, n = block(*arguments)

        out = self.proj_out(n).unflatten(1, (height, width)).unflatten(-1, (patch, patch, -1))
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # [B, channels, h, patch, w, patch]

    def _check(
        self,
        latents: torch.Tensor,
        text: torch.Tensor | Text,
        timestep: torch.Tensor,
        text_mask: torch.Tensor | None,
        guidance: torch.Tensor | None,
    ) -> None:
        config, patch = self.config, self.config.patch_size
        if latents.dim() != 4 or latents.shape[1] != config.in_channels:
            raise ValueError(f"latents must be [B, {config.in_channels}, H, W], got {list(latents.shape)}")
        B = latents.shape[0]
        if latents.shape[2] % patch or latents.shape[3] % patch or 0 in latents.shape[2:]:
            raise ValueError(
                f"latents' sides must be positive multiples of the patch size {patch}, got {list(latents.shape[2:])}"
            )
        if isinstance(text, Text):
            if text_mask is not None or len(text.pairs) != config.num_layers or text.pairs[0][0].shape[0] != B:
                raise ValueError(f"a projected text must be this model's, of {B} images, and brings its mask")
        else:
            self._check_text(text, text_mask, B)
        if timestep.shape != (B,):
            raise ValueError(f"timestep must have shape [{B}], got {list(timestep.shape)}")
        if (guidance is not None) != config.guidance_embeds:
            raise ValueError(
                "this model takes the guidance scale as an input: pass guidance" if config.guidance_embeds else
                "this model has no guidance embedding: guidance must be None"
            )  # fmt: skip

    def _check_text(self, text: torch.Tensor, text_mask: torch.Tensor | None, B: int) -> None:
        channels = self.config.caption_channels
        if text.dim() != 3 or text.shape[0] != B or text.shape[2] != channels or text.shape[1] == 0:
            raise ValueError(f"text must be [{B}, T, {channels}] with T >= 1, got {list(text.shape)}")
        if text_mask is not None and text_mask.shape != text.shape[:2]:
            raise ValueError(f"text_mask must be {list(text.shape[:2])}, got {list(text_mask.shape)}")
