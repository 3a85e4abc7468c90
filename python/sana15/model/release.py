"""The layout of the authors' released weights (NVlabs/Sana .pth), and conversion from and to it.

Every tensor of our model has one source there: a tensor of its own, or one of the equal parts of a stacked one (q, k, v
of the self-attention; k, v of the cross-attention). Buffers that inference does not need are left out on the way here, and
made on the way back, since readers of the release's layout ask for them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..storage.concurrency import claiming
from ..storage.files import DataError, converted, replacing
from ..storage.weights import (
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
from .position_table import interpolation_of, position_table
from .transformer import SanaTransformer

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
NULL_TEXT, POSITIONS = "y_embedder.y_embedding", "pos_embed"
LEFT_OUT = (NULL_TEXT, POSITIONS, "logvar_linear.weight", "logvar_linear.bias")
#: Tokens of a text in the release; the empty prompt's features have as many.
TEXT_TOKENS = 300


def source_of(name: str) -> tuple[str, int, int]:
    """Locates one of our parameters in the release: tensor, part, number of parts."""
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
    if path.suffix.lower() == ".safetensors":
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
    return {name: Weight.of(t) for name, t in state.items()}


def _nested(stored: Any, ema: bool, path: Path) -> Mapping[str, Any]:
    if not isinstance(stored, Mapping):
        raise DataError(f"{path} holds {type(stored).__name__}, not a state_dict")
    if ema and "state_dict_ema" not in stored:
        raise DataError(f"{path} holds no state_dict_ema")
    for key in ("state_dict_ema",) if ema else ("state_dict", "state_dict_ema"):
        if isinstance(stored.get(key), Mapping):
            return stored[key]
    return stored


def _check_changes(changes: Mapping[str, Any]) -> None:
    unknown = sorted(changes.keys() - {f.name for f in dataclasses.fields(SanaConfig)})
    if unknown:
        raise ValueError(f"unknown configuration key {unknown[0]}")


def infer_config(weights: Weights, where: str, changes: Mapping[str, Any] | None = None) -> SanaConfig:
    """The configuration that the shapes and the position table say; `changes` has the last word.

    The cross-attention's heads leave no trace: they are those of the published widths. The table's size is the side that the
    model was made for, its content whether the model adds positions, and at which scale. Without a table, which the
    authors' files always have, the model is taken for one of 1024 pixels that adds none.

    Raises:
        DataError: this is no SANA checkpoint. ValueError: unknown names in `changes`, or a width that was never published.
    """
    changes = dict(changes or {})
    _check_changes(changes)

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
    side = None if POSITIONS not in weights else _table_side(shape(POSITIONS, 3), C, where)
    numbers = [n.split(".")[1] for n in weights if n.startswith("blocks.")]
    ratio = hidden / C
    if int(ratio * C) < hidden:  # by rounding
        ratio = math.nextafter(ratio, math.inf)
    values = {
        "num_layers": 1 + max(int(n) for n in numbers if n.isdecimal()),
        "num_attention_heads": C // SanaConfig.attention_head_dim,
        "num_cross_attention_heads": heads,
        "cross_attention_head_dim": C // heads,
        "in_channels": channels,
        "out_channels": out,
        "caption_channels": caption,
        "mlp_ratio": ratio,
        "patch_size": patch,
        "sample_size": 32 if side is None else side * patch,
        "qk_norm": "rms_norm_across_heads" if any(".q_norm." in n for n in weights) else None,
        "guidance_embeds": any(n.startswith("cfg_embedder.") for n in weights),
        "attention_bias": "blocks.0.attn.qkv.bias" in weights,
    }
    config = SanaConfig(**values | changes)
    if side is None or "interpolation_scale" in changes:
        return config
    try:
        scale = interpolation_of(weights[POSITIONS].load(), side, config.sample_size // patch)
    except ValueError as error:
        raise DataError(f"{where}: {POSITIONS}: {error}; say interpolation_scale=NUMBER, or =null for none") from None
    return dataclasses.replace(config, interpolation_scale=scale)


def _table_side(shape: tuple[int, ...], C: int, where: str) -> int:
    """Tokens along a side of the position table."""
    side = math.isqrt(shape[1])
    if shape != (1, side * side, C) or side == 0:
        raise DataError(f"{where}: {POSITIONS} is {list(shape)}, expected [1, side * side, {C}]")
    return side


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


def to_release(weights: Weights, config: SanaConfig, dtype: torch.dtype | None = None) -> dict[str, Weight]:
    """The release's names for our tensors, in the model's order whatever the order of `weights`; from_release's inverse.

    Besides the model's tensors there are the two that readers ask for: the position table of `config`, and zeros for the
    features of the empty prompt, which no folder keeps and the authors' loader fills in from a file of its own.

    Args:
        dtype: in which they are to be written; None: as they are, that of stacked ones being wide enough for each part.
    """
    groups: dict[str, dict[int, Weight]] = {}
    for name in parameter_shapes(config):
        theirs, part, _ = source_of(name)
        groups.setdefault(theirs, {})[part] = weights[name]
    made = {name: _stacked([parts[i] for i in sorted(parts)]) for name, parts in groups.items()}
    common = made["x_embedder.proj.weight"].dtype
    side = config.sample_size // config.patch_size
    made[POSITIONS] = Weight((1, side * side, config.width), common, lambda: position_table(config, common))
    null_text = (TEXT_TOKENS, config.caption_channels)
    made[NULL_TEXT] = Weight(null_text, common, lambda: torch.zeros(null_text, dtype=common))
    return made if dtype is None else {name: Weight(w.shape, dtype, w.load) for name, w in made.items()}


def _stacked(parts: list[Weight]) -> Weight:
    """The parts one below the other."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    widest = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    return Weight(shape, widest, lambda: torch.cat([part.load().to(widest) for part in parts]))


def _kept(stored: Weights, dtype: torch.dtype | None) -> dict[str, Weight]:
    """Reads what a release file holds beside the model and goes on to another release file: all but the table, which is made."""
    kept = {name: stored[name] for name in LEFT_OUT if name in stored and name != POSITIONS}
    return {name: Weight(w.shape, dtype or w.dtype, w.load) for name, w in kept.items()}


def needed_changes(weights: Weights, config: SanaConfig) -> dict[str, Any]:
    """Lists what `convert` must be told to read `config` back from these tensors in the release's layout."""
    heads = config.num_cross_attention_heads
    published = {size.width: size.num_cross_attention_heads for size in SIZES.values()}
    changes: dict[str, Any] = {} if published.get(config.width) == heads else {"num_cross_attention_heads": heads}
    try:
        found = dataclasses.asdict(infer_config(weights, "the file", changes))
    except DataError:  # the table of a single position, say, tells no scale
        changes["interpolation_scale"] = config.interpolation_scale
        found = dataclasses.asdict(infer_config(weights, "the file", changes))
    wanted = dataclasses.asdict(config) | {"cross_attention_dim": None}
    return changes | {name: value for name, value in wanted.items() if found[name] != value}


def _write_release(weights: Weights, target: Path) -> None:
    """One file: .safetensors, tensor by tensor; .pth, as the authors' torch.load takes it, in one piece."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        if target.suffix.lower() == ".safetensors":
            write_weights(weights, partial)
            return
        # clone: a view would bring the whole of what it was cut from into the file
        state = {name: converted(w.load(), w.dtype, name).clone() for name, w in weights.items()}
        with partial.open("wb") as file:  # a path's name would become part of the file
            torch.save({"state_dict": state}, file)


@claiming(lambda given: given["target"], new=True)
def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    ema: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> SanaConfig:
    """A transformer from the release's layout or diffusers' into diffusers' folder, or into a file in the release's.

    Args:
        source: a .pth or .safetensors file in the release's layout, or a diffusers `transformer/` folder.
        target: a folder, or a file in the release's layout that ends in .safetensors, or in .pth for readers that know
            torch.load only: {"state_dict": tensors}, nothing else, the whole model in memory. It must not exist.
        dtype, shard_bytes: as in write_folder.
        ema: the averaged weights of a .pth.
        changes: configuration values that a release file does not tell (num_cross_attention_heads, sample_size, ...).

    Raises:
        ValueError: the target exists, changes that cannot be, or numbers too large for dtype. FileNotFoundError, DataError: the
        source is bad.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise ValueError(f"{target} exists; remove it or choose another place")
    if target.suffix.lower() in (".pt", ".ckpt", ".bin"):
        raise ValueError(f"{target} is no name for a folder, and files are written as .pth or .safetensors")
    stored: Weights = {}
    if source.is_dir():
        if changes or ema:
            raise ValueError(f"{source} is a folder with its own config.json: no changes, no averaged weights")
        config, weights = SanaConfig.load(source), folder_weights(source)
        require_fit(weights, parameter_shapes(config), str(source))
    else:
        _check_changes(changes or {})
        stored = read_release(source, ema=ema)
        config = infer_config(stored, str(source), changes)
        weights = from_release(stored, config, str(source))
    if target.suffix.lower() in (".safetensors", ".pth"):
        _write_release(to_release(weights, config, dtype) | _kept(stored, dtype), target)
    else:
        write_folder(config.to_dict(), weights, target, dtype=dtype, shard_bytes=shard_bytes)
    return config
