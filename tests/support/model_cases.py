"""What several test files share of model."""

import torch
from diffusers import SanaTransformer2DModel
from helpers import rand

from sana15 import SanaConfig, SanaTransformer

SMALL = {
    "num_layers": 2,
    "num_attention_heads": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 48,
    "in_channels": 4,
    "out_channels": 4,
    "caption_channels": 20,
    "sample_size": 8,
}


def pair(dtype=torch.float32, **changes):
    """(diffusers' model, ours) with equal weights, none of them trivial."""
    config = SanaConfig(**SMALL | changes)
    torch.manual_seed(0)
    theirs = SanaTransformer2DModel.from_config(config.to_dict())
    for name, p in theirs.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.2)
    ours = SanaTransformer(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype), ours.to(dtype)


def batch(side=(8, 8), dtype=torch.float32, guidance=False, seed=0):
    values = {
        "latents": rand(10 * seed, 2, 4, *side),
        "text": rand(10 * seed + 1, 2, 7, 20),
        "timestep": torch.tensor([999.0, 137.0], dtype=torch.float64),
    }
    values = {k: v.to(dtype) for k, v in values.items()}
    mask = torch.ones(2, 7)
    mask[1, 3:] = 0
    return values | {"mask": mask} | ({"guidance": torch.tensor([0.45, 0.1], dtype=dtype)} if guidance else {})
