"""Model sizes: one table of what is published, one dataclass that names every choice."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage.files import DataError, read_json

#: diffusers' values for keys that a config.json leaves out, where ours differ: SANA-1.0's folders have no qk_norm.
DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "num_layers": 20, "num_attention_heads": 70, "num_cross_attention_heads": 20, "cross_attention_head_dim": 112,
    "qk_norm": None,
}  # fmt: skip
#: What diffusers' EMAModel.save_pretrained adds to the model's own keys.
EMA_KEYS = frozenset({
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"
})  # fmt: skip
#: Head dimension of the linear attention in every published SANA.
LINEAR_HEAD_DIM = 32


@dataclass(frozen=True)
class SanaConfig:
    """Everything that fixes the architecture. Field names and meanings are those of diffusers' `transformer/config.json`."""

    num_layers: int
    num_attention_heads: int
    num_cross_attention_heads: int
    cross_attention_head_dim: int
    attention_head_dim: int = LINEAR_HEAD_DIM
    in_channels: int = 32
    out_channels: int = 32
    caption_channels: int = 2304  # width of the text features: Gemma-2-2B
    cross_attention_dim: int | None = None  # None: the width; released models use no other
    mlp_ratio: float = 2.5  # Mix-FFN hidden width over model width
    patch_size: int = 1
    sample_size: int = 32  # latent side the model was made for; fixes the position embedding where there is one
    qk_norm: str | None = "rms_norm_across_heads"  # SANA-1.5; None is SANA-1.0
    interpolation_scale: float | None = None  # 2-D sin-cos position embedding (2K: 1.0, 4K: 2.0); None: no embedding
    guidance_embeds: bool = False  # Sprint: the guidance scale is an input
    guidance_embeds_scale: float = 0.1
    timestep_scale: float = 1.0
    attention_bias: bool = False
    dropout: float = 0.0  # diffusers' in training; kept for it, sana15 trains without
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise ValueError(f"SanaConfig.{field.name} must be a positive integer, got {value!r}")
            if field.type == "float" and not (type(value) in (int, float) and 0 <= value < math.inf):
                raise ValueError(f"SanaConfig.{field.name} must be a finite number of at least 0, got {value!r}")
        scale = self.interpolation_scale
        if scale is not None and not (type(scale) in (int, float) and 0 < scale < math.inf):
            raise ValueError(f"SanaConfig.interpolation_scale must be a finite number above 0, or None, got {scale!r}")
        if self.num_cross_attention_heads * self.cross_attention_head_dim != self.width:
            raise ValueError(
                f"SanaConfig: num_cross_attention_heads * cross_attention_head_dim = "
                f"{self.num_cross_attention_heads * self.cross_attention_head_dim} must equal the width {self.width}"
            )
        if self.qk_norm not in (None, "rms_norm_across_heads"):
            raise ValueError(f"SanaConfig.qk_norm must be None or 'rms_norm_across_heads', got {self.qk_norm!r}")
        if self.norm_elementwise_affine:
            raise ValueError("SanaConfig: affine norms are not part of SANA; no released model has them")
        if self.dropout >= 1:
            raise ValueError(f"SanaConfig.dropout must be below 1, got {self.dropout!r}")
        if self.cross_attention_dim not in (None, self.width):
            raise ValueError(
                f"SanaConfig.cross_attention_dim must be the width {self.width}, got {self.cross_attention_dim}"
            )

    @property
    def width(self) -> int:
        """C, the model's width."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """F, the Mix-FFN's hidden width after the gate."""
        return int(self.mlp_ratio * self.width)

    @staticmethod
    def named(name: str, **changes: Any) -> SanaConfig:
        """A published size (600M, 1600M, 2400M, 3200M, 4800M) or `mini`; `changes` override its fields."""
        if name not in SIZES:
            raise ValueError(f"unknown model size {name!r}; choose one of {', '.join(SIZES)}")
        return dataclasses.replace(SIZES[name], **changes)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> SanaConfig:
        """From the contents of diffusers' config.json, with diffusers' values for what it leaves out.

        Keys that start with an underscore are diffusers' own notes; those of its EMAModel are left aside.
        """
        known = {f.name for f in dataclasses.fields(SanaConfig)}
        unknown = [k for k in values if k not in known | EMA_KEYS and not k.startswith("_")]
        if unknown:
            raise ValueError(f"unknown keys in the model's config: {', '.join(sorted(unknown))}")
        given = DIFFUSERS_DEFAULTS | {k: v for k, v in values.items() if k in known}
        if given.get("out_channels", 0) is None:
            given["out_channels"] = given.get("in_channels", SanaConfig.in_channels)
        return SanaConfig(**given)

    @staticmethod
    def load(folder: str | Path) -> SanaConfig:
        path = Path(folder) / "config.json"
        try:
            return SanaConfig.from_dict(read_json(path))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing: not a model folder") from None
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} is not a SANA model config: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns what diffusers' SanaTransformer2DModel.from_config takes."""
        return dataclasses.asdict(self) | {"cross_attention_dim": self.width, "_class_name": "SanaTransformer2DModel"}


def _wide(layers: int) -> SanaConfig:  # width 2240; SANA-1.5 grows in depth only
    return SanaConfig(
        num_layers=layers, num_attention_heads=70, num_cross_attention_heads=20, cross_attention_head_dim=112
    )


#: arXiv:2501.18427, table of model sizes, with qk-norm throughout (SANA-1.0's 600M and 1600M: qk_norm=None).
SIZES = {
    "600M": SanaConfig(
        num_layers=28, num_attention_heads=36, num_cross_attention_heads=16, cross_attention_head_dim=72
    ),
    "1600M": _wide(20),
    "2400M": _wide(30),
    "3200M": _wide(40),
    "4800M": _wide(60),
    # Trained by this project on rendered scenes; see docs/mini.md.
    "mini": SanaConfig(
        num_layers=12,
        num_attention_heads=4,
        num_cross_attention_heads=4,
        cross_attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        caption_channels=128,
        sample_size=8,
        interpolation_scale=1.0,  # relations between objects are learned much sooner
    ),
}
