"""The SANA transformer (arXiv:2410.10629, arXiv:2501.18427) on the ops of sana_ext.

Parameter names are those of diffusers' SanaTransformer2DModel, so its folders load strictly and ours load there.

B batch, h x w latent grid, N = h*w tokens, T text tokens, C width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sana_ext

from .block import Block, CrossAttention, Linear, Norm, RMSNorm
from .config import SanaConfig

FREQUENCIES = 256  # width of the sinusoidal embedding of time and guidance
FINAL_EPS = 1e-6  # of the last norm, whatever that of the blocks
MASKED = -10000.0  # additive bias of a masked text token; finite, so a fully masked row is uniform instead of NaN


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

    def forward(self, sample: torch.Tensor) -> torch.Tensor:  # [B, 256] -> [B, C]
        return self.linear_2(nn.functional.silu(self.linear_1(sample)))


class TimestepEmbedding(nn.Module):
    """The embedding of the timestep alone."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.timestep_embedder = Embedder(C)

    def forward(self, timestep: torch.Tensor, hidden_dtype: torch.dtype) -> torch.Tensor:  # [B] -> [B, C]
        return self.timestep_embedder(sinusoid(timestep).to(hidden_dtype))


class TimeEmbedding(nn.Module):
    """adaLN-single: the 6C vector all blocks share, and the embedding of the timestep (and of the guidance scale)."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        C = config.width
        if config.guidance_embeds:  # diffusers names the Sprint embedder without `emb`
            self.timestep_embedder, self.guidance_embedder = Embedder(C), Embedder(C)
        else:
            self.emb = TimestepEmbedding(C)
        self.linear = Linear(C, 6 * C)

    def forward(
        self, timestep: torch.Tensor, *, guidance: torch.Tensor | None = None, hidden_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [B] -> [B, 6C], [B, C]
        if guidance is not None:
            embedded = self.timestep_embedder(sinusoid(timestep).to(hidden_dtype))
            embedded = embedded + self.guidance_embedder(sinusoid(guidance).to(hidden_dtype))
        else:
            embedded = self.emb(timestep, hidden_dtype=hidden_dtype)
        return self.linear(nn.functional.silu(embedded)), embedded


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


class TextStates(NamedTuple):
    """A text as the blocks' cross-attentions see it: what does not change from one denoising step to the next."""

    pairs: list[tuple[torch.Tensor, torch.Tensor]]  # keys and values [B, T, C] of every block
    bias: torch.Tensor | None  # [B, 1, T]

    def last(self, B: int) -> TextStates:
        """Returns the text of the last B of its images."""
        return TextStates([(k[-B:], v[-B:]) for k, v in self.pairs], None if self.bias is None else self.bias[-B:])

    def select(self, rows: torch.Tensor) -> TextStates:
        """Returns the text of the chosen images."""
        return TextStates([(k[rows], v[rows]) for k, v in self.pairs], None if self.bias is None else self.bias[rows])


def _projects(block: Any) -> bool:
    """Tells whether keys and values may stand for the text in this block."""
    plain = sana_ext.nn.is_plain
    if not plain(block, Block) or not plain(attn := block.attn2, CrossAttention):
        return False
    norm = attn.norm_k
    return plain(attn.to_k, Linear) and plain(attn.to_v, Linear) and (norm is None or plain(norm, RMSNorm))


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

    def project(self, text: torch.Tensor, text_mask: torch.Tensor | None = None) -> TextStates:
        """Computes what forward takes in place of text and mask, to be computed once for many steps. It keeps the weights' values.

        Raises:
            ValueError: shapes that do not fit, or a model that cannot (`projects`).
        """
        if not self.projects:
            raise ValueError(
                "a block, its cross-attention or a layer on the text's way was replaced or has hooks, so no text can be "
                "projected for it"
            )
        self._check_text(text, text_mask, text.shape[0])
        states = self._states(text)
        blocks: list[Block] = list(self.transformer_blocks)  # type: ignore[arg-type]
        pairs = [block.attn2.keys_and_values(states) for block in blocks]
        return TextStates(pairs, self._bias(text_mask, states.dtype))

    @property
    def projects(self) -> bool:
        """Tells whether `project` may stand for the text: no block, cross-attention or layer on the text's way is replaced or has
        hooks, which might want to see the text itself, or to be called at every step."""
        plain, caption = sana_ext.nn.is_plain, self.caption_projection
        return (
            plain(caption, TextProjection)
            and plain(caption.linear_1, Linear)
            and plain(caption.linear_2, Linear)
            and plain(self.caption_norm, RMSNorm)
            and all(_projects(block) for block in self.transformer_blocks)
        )

    def _states(self, text: torch.Tensor) -> torch.Tensor:
        return self.caption_norm(self.caption_projection(text))

    def _bias(self, text_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        return None if text_mask is None else ((1 - text_mask.to(dtype)) * MASKED)[:, None]

    def forward(
        self,
        latents: torch.Tensor,
        text: torch.Tensor | TextStates,
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
        if guidance is None:
            t6, embedded = self.time_embed(timestep, hidden_dtype=x.dtype)
        else:
            t6, embedded = self.time_embed(timestep, guidance=guidance, hidden_dtype=x.dtype)
        texts: Sequence[torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
        if isinstance(text, TextStates):
            bias, texts = text.bias, text.pairs
        else:
            bias, texts = self._bias(text_mask, x.dtype), [self._states(text)] * len(self.transformer_blocks)
        n = self._blocks(x, texts, bias, t6, embedded, height, width)
        out = self.proj_out(n).unflatten(1, (height, width)).unflatten(-1, (patch, patch, -1))
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # [B, channels, h, patch, w, patch]

    def _blocks(
        self, x: torch.Tensor, texts: Sequence[Any], bias: torch.Tensor | None, t6: torch.Tensor, embedded: torch.Tensor,
        height: int, width: int,
    ) -> torch.Tensor:  # fmt: skip
        """The blocks and the final norm. A block that is not plainly ours (hooks, a wrapper, another module) is called as
        the module it is, and brings its own first norm."""
        blocks: list[Any] = list(self.transformer_blocks)
        plain = [sana_ext.nn.is_plain(block, Block, "scale_shift_table") for block in blocks]
        shift, scale = (self.scale_shift_table + embedded[:, None]).unbind(1)
        final = Norm(shift, scale, FINAL_EPS)
        n = None
        for i, (block, states) in enumerate(zip(blocks, texts)):
            if not plain[i]:
                x, n = self._run(block, x, None, states, bias, t6, height, width), None
                continue
            following: Norm | None = final
            if i + 1 < len(blocks):
                following = blocks[i + 1].first_norm(t6) if plain[i + 1] else None
            n = block.first_norm(t6)(x) if n is None else n
            x, n = self._run(block.between_norms, x, n, states, bias, t6, following, height, width)
        return final(x) if n is None else n

    def _run(self, fn: Any, *arguments: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(fn, *arguments, use_reentrant=False)
        return fn(*arguments)

    def _check(
        self,
        latents: torch.Tensor,
        text: torch.Tensor | TextStates,
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
        if isinstance(text, TextStates):
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
