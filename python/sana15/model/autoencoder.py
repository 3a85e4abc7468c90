"""Pictures to latents and back: the deep-compression autoencoder, in the published size and in the mini size.

Both are diffusers' AutoencoderDC; this wrapper fixes the ranges, the scaling factor and the errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..storage.files import DataError, read_json
from ..storage.weights import load_weights

#: f8c16: 64x64 pictures to 8x8 latents of 16 channels; residual stages, then one linear-attention stage.
MINI_SIZES = {
    "in_channels": 3,
    "latent_channels": 16,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": (16, 32, 64, 64),
    "decoder_block_out_channels": (16, 32, 64, 64),
    "encoder_layers_per_block": (1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (), ()),
    "decoder_qkv_multiscales": ((), (), (), ()),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
    "scaling_factor": 1.0,
}


def factor_of(stages: Sequence[int]) -> int:
    """Returns the pixels per latent along a side, of an autoencoder with these stages: each after the first halves the side."""
    return 2 ** (len(stages) - 1)


class Autoencoder(nn.Module):
    """encode: [B, 3, H, W] in [-1, 1] -> [B, channels, H / factor, W / factor] of about unit variance; decode: the inverse."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model  # diffusers' AutoencoderDC

    @staticmethod
    def build(config: dict[str, Any]) -> Autoencoder:
        from diffusers import AutoencoderDC

        return Autoencoder(AutoencoderDC(**config))

    @staticmethod
    def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Autoencoder:
        """From a folder saved by diffusers (config.json, diffusion_pytorch_model.safetensors), every tensor accounted for.

        Raises:
            FileNotFoundError: config or weights are missing. DataError: they are damaged or do not fit each other.
        """
        from diffusers import AutoencoderDC

        if not (Path(folder) / "config.json").exists():
            raise FileNotFoundError(f"{folder} holds no autoencoder: config.json is missing")
        config = read_json(Path(folder) / "config.json")
        try:
            with torch.device("meta"):
                model = AutoencoderDC.from_config(config)
        except (TypeError, ValueError, KeyError) as error:
            raise DataError(f"{Path(folder) / 'config.json'} is no AutoencoderDC config: {error}") from None
        load_weights(model, folder, dtype)
        return Autoencoder(model.eval())

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return factor_of(self.model.config.encoder_block_out_channels)

    @property
    def channels(self) -> int:
        return self.model.config.latent_channels

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        if (
            pictures.dim() != 4
            or pictures.shape[1] != 3
            or pictures.shape[2] % self.factor
            or pictures.shape[3] % self.factor
        ):
            raise ValueError(
                f"pictures must be [B, 3, H, W] with sides divisible by {self.factor}, got {list(pictures.shape)}"
            )
        return self.model.encode(pictures).latent * self.model.config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        if latents.dim() != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"latents must be [B, {self.channels}, h, w], got {list(latents.shape)}")
        return self.model.decode(latents / self.model.config.scaling_factor).sample

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(pictures))
