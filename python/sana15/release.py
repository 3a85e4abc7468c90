"""The layout of the authors' released weights (NVlabs/Sana .pth), and conversion from and to it.

Every tensor of our model has one source there: a tensor of its own, or one of the equal parts of a stacked one (q, k, v
of the self-attention; k, v of the cross-attention). Buffers that inference does not need are left out.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint import (
    Weight,
    Weights,
    file_weights,
    folder_weights,
    require_fit,
    require_names,
    write_folder,
    write_weights,
)
from .config import SIZES, SanaConfig
from .files import DataError, replacing
from .model import SanaTransformer

#: Our module -> the release's, outside the blocks. A Sprint model's timestep embedder stands without `emb`.
OUTSIDE = {
    "patch_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm",
    "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.guidance_embedder.linear_1": "cfg_embedder.mlp.0",
    "time_embed.guidance_embedder.linear_2": "cfg_embedder.mlp.2",
    "time_embed.linear": "t_block.1",
    "proj_out": "final_layer.linear",
}
#: Our module -> (the release's, which of how many equal parts), inside a block.
BLOCK = {
    "attn1.to_q": ("attn.qkv", 0, 3),
    "attn1.to_k": ("attn.qkv", 1, 3),
    "attn1.to_v": ("attn.qkv", 2, 3),
    "attn1.norm_q": ("attn.q_norm", 0, 1),
    "attn1.norm_k": ("attn.k_norm", 0, 1),
    "attn1.to_out.0": ("attn.proj", 0, 1),
    "attn2.to_q": ("cross_attn.q_linear", 0, 1),
    "attn2.to_k": ("cross_attn.kv_linear", 0, 2),
    "attn2.to_v": ("cross_attn.kv_linear", 1, 2),
    "attn2.norm_q": ("cross_attn.q_norm", 0, 1),
    "attn2.norm_k": ("cross_attn.k_norm", 0, 1),
    "attn2.to_out.0": ("cross_attn.proj", 0, 1),
    "ff.conv_inverted": ("mlp.inverted_conv.conv", 0, 1),
    "ff.conv_depth": ("mlp.depth_conv.conv", 0, 1),
    "ff.conv_point": ("mlp.point_conv.conv", 0, 1),
}
#: In the files, but no part of the model: features of the empty prompt, the position table, a head for the loss.
LEFT_OUT = ("y_embedder.y_embedding", "pos_embed", "logvar_linear.weight", "logvar_linear.bias")


def source_of(name: str) -> tuple[str, int, int]:
    """Where one of our parameters stands in the release: tensor, part, number of parts."""
    if name == "scale_shift_table":
        return "final_layer.scale_shift_table", 0, 1
    if name.startswith("transformer_blocks."):
        _, number, inner = name.split(".", 2)
        if inner == "scale_shift_table":
            return f"blocks.{number}.scale_shift_table", 0, 1
        module, leaf = inner.rsplit(".", 1)
        theirs, part, parts = BLOCK[module]
        return f"blocks.{number}.{theirs}.{leaf}", part, parts
    module, leaf = name.rsplit(".", 1)
    return f"{OUTSIDE[module]}.{leaf}", 0, 1


def parameter_shapes(config: SanaConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in SanaTransformer(config).named_parameters()}


def read_release(path: Path, *, ema: bool = False) -> dict[str, Weight]:
    """The tensors of a release file: .safetensors, or a .pth with the weights as `state_dict`, `state_dict_ema` or alone.

    A .pth is read with torch's restricted unpickler (weights_only), whatever it holds; nothing in it is ever run.

    Args:
        ema: take the averaged weights, `state_dict_ema`.

    Raises:
        FileNotFoundError. DataError: damaged, or holding more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if path.suffix == ".safetensors":
        return file_weights(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles; what cannot be read is an error below
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise DataError(f"{path} is damaged or holds other objects than tensors, which are not read") from None
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"{path} is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    state = _nested(stored, ema, path)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise DataError(f"{path}: {name} is no floating-point tensor but {str(kind).removeprefix('torch.')}")
    return {name: Weight(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state.items()}  # type: ignore[misc]


def _nested(stored: Any, ema: bool, path: Path) -> Mapping[str, Any]:
    if not isinstance(stored, Mapping):
        raise DataError(f"{path} holds {type(stored).__name__}, not a state_dict")
    if ema and "state_dict_ema" not in stored:
        raise DataError(f"{path} holds no state_dict_ema")
    for key in ("state_dict_ema",) if ema else ("state_dict", "state_dict_ema"):
        if isinstance(stored.get(key), Mapping):
            return stored[key]
    return stored


def infer_config(weights: Weights, where: str, changes: Mapping[str, Any] | None = None) -> SanaConfig:
    """The configuration that the shapes say; `changes` has the last word.

    The cross-attention's heads and, without a position table, the side the model was made for leave no trace in the
    shapes: the heads are those of the published widths, the side is 1024 pixels'. A table of 64 x 64 latents and more
    means 2-D sin-cos positions, as in the 2K and 4K models.

    Raises:
        DataError: this is no SANA checkpoint. ValueError: unknown names in `changes`, or a width that was never published.
    """
    changes = dict(changes or {})
    unknown = sorted(changes.keys() - {f.name for f in dataclasses.fields(SanaConfig)})
    if unknown:
        raise ValueError(f"unknown configuration key {unknown[0]}")

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in weights:
            raise DataError(f"{where} is no SANA checkpoint: {name} is missing")
        if len(weights[name].shape) != dimensions:
            raise DataError(f"{where} is no SANA checkpoint: {name} is {list(weights[name].shape)}")
        return weights[name].shape

    C, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    hidden = shape("blocks.0.mlp.point_conv.conv.weight", 4)[1]
    caption = shape("y_embedder.y_proj.fc1.weight", 2)[1]
    out = shape("final_layer.linear.weight", 2)[0] // patch**2
    published = {size.width: size.num_cross_attention_heads for size in SIZES.values()}
    heads = changes.pop("num_cross_attention_heads", published.get(C))
    if heads is None:
        raise ValueError(f"{where} has width {C}, which was never published: add num_cross_attention_heads=N")
    if not isinstance(heads, int) or heads < 1 or C % heads:
        raise ValueError(f"num_cross_attention_heads must divide the width {C}, got {heads!r}")
    side = math.isqrt(shape("pos_embed", 3)[1]) * patch if "pos_embed" in weights else 32
    numbers = [n.split(".")[1] for n in weights if n.startswith("blocks.")]
    values = {
        "num_layers": 1 + max(int(n) for n in numbers if n.isdecimal()),
        "num_attention_heads": C // SanaConfig.attention_head_dim,
        "num_cross_attention_heads": heads,
        "cross_attention_head_dim": C // heads,
        "in_channels": channels,
        "out_channels": out,
        "caption_channels": caption,
        "mlp_ratio": hidden / C,
        "patch_size": patch,
        "sample_size": side,
        "qk_norm": "rms_norm_across_heads" if any(".q_norm." in n for n in weights) else None,
        "interpolation_scale": side / 64 if side >= 64 else None,
        "guidance_embeds": any(n.startswith("cfg_embedder.") for n in weights),
    }
    return SanaConfig(**values | changes)


def from_release(weights: Weights, config: SanaConfig, where: str) -> dict[str, Weight]:
    """Our names for the tensors of a release; DataError that names what is missing, unexpected or of a wrong shape."""
    shapes = parameter_shapes(config)
    sources = {name: source_of(name) for name in shapes}
    found = [name for name in weights if name not in LEFT_OUT]
    require_names(
        {theirs for theirs, _, _ in sources.values()}, found, f"{where} does not fit {config.num_layers} blocks"
    )
    ours = {}
    for name, (theirs, part, parts) in sources.items():
        stored, expected = weights[theirs], (shapes[name][0] * parts, *shapes[name][1:])
        if stored.shape != expected:
            raise DataError(f"{where}: {theirs} is {list(stored.shape)}, expected {list(expected)}")
        ours[name] = Weight(shapes[name], stored.dtype, lambda s=stored, p=part, n=parts: s.load().chunk(n)[p])  # type: ignore[misc]
    return ours


def to_release(weights: Weights) -> dict[str, Weight]:
    """The release's names for our tensors; the inverse of from_release."""
    groups: dict[str, list[Weight]] = {}
    for name, weight in weights.items():  # parts come in order: to_q, to_k, to_v
        groups.setdefault(source_of(name)[0], []).append(weight)
    theirs = {}
    for name, parts in groups.items():
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        theirs[name] = Weight(shape, parts[0].dtype, lambda ps=parts: torch.cat([p.load() for p in ps]))  # type: ignore[misc]
    return theirs


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    ema: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> SanaConfig:
    """A transformer from the release's layout or diffusers' into diffusers' folder, or into the release's as .safetensors.

    Args:
        source: a .pth or .safetensors file in the release's layout, or a diffusers `transformer/` folder.
        target: a folder, or a file that ends in .safetensors (the release's layout). It must not exist.
        dtype, shard_bytes: as in write_folder.
        ema: the averaged weights of a .pth.
        changes: configuration values that a release file does not tell (num_cross_attention_heads, sample_size, ...).

    Raises:
        ValueError: the target exists, or changes that cannot be. FileNotFoundError, DataError: the source is bad.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise ValueError(f"{target} exists; remove it or choose another place")
    if source.is_dir():
        if changes or ema:
            raise ValueError(f"{source} is a folder with its own config.json: no changes, no averaged weights")
        config, weights = SanaConfig.load(source), folder_weights(source)
        require_fit(weights, parameter_shapes(config), str(source))
    else:
        stored = read_release(source, ema=ema)
        config = infer_config(stored, str(source), changes)
        weights = from_release(stored, config, str(source))
    if target.suffix == ".safetensors":
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            write_weights(to_release(weights), partial, dtype)
    else:
        write_folder(config, weights, target, dtype=dtype, shard_bytes=shard_bytes)
    return config
