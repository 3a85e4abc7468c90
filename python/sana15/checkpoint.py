"""Transformer weights in diffusers' folders: strict, sharded or whole, safetensors only. The release's .pth: release.py."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from .config import SanaConfig
from .files import DataError, open_tensors, read_json
from .model import SanaTransformer

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def weight_files(folder: str | Path) -> dict[str, Path]:
    """Tensor name -> file, from the index of a sharded checkpoint or the one file of a whole one."""
    root = Path(folder)
    if (root / INDEX).exists():
        names = read_json(root / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) and Path(f).name == f for f in names.values()):
            raise DataError(f"{root / INDEX} is damaged: weight_map must map tensors to files in the same folder")
        files = {name: root / file for name, file in names.items()}
    elif (root / WEIGHTS).exists():
        with open_tensors(root / WEIGHTS) as stored:
            files = dict.fromkeys(stored.keys(), root / WEIGHTS)
    else:
        raise FileNotFoundError(f"{root} holds no {WEIGHTS} and no {INDEX}")
    for path in sorted(set(files.values())):
        if not path.exists():
            raise FileNotFoundError(f"{path} is named by the index but missing")
    return files


def load_weights(model: nn.Module, folder: str | Path, dtype: torch.dtype) -> None:
    """Fills a model (built on the meta device, say) from a folder's weights; names and shapes must fit exactly.

    Raises:
        FileNotFoundError: weights are missing. DataError: a damaged file, or names, shapes or dtypes that do not fit.
    """
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    files = weight_files(folder)
    require_names(expected.keys(), files.keys(), f"{folder} does not fit its config")
    state = {}
    for path in sorted(set(files.values())):
        with open_tensors(path) as stored:
            there = set(stored.keys())
            for name in (n for n, file in files.items() if file == path):
                if name not in there:
                    raise DataError(f"{path} lacks {name}, which the index says it holds")
                state[name] = _fitting(stored.get_tensor(name), name, expected[name], path).to(dtype)
    model.load_state_dict(state, strict=True, assign=True)


def load_transformer(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> SanaTransformer:
    """A SanaTransformer in eval mode from a diffusers `transformer/` folder; raises as load_weights does."""
    config = SanaConfig.load(folder)
    with torch.device("meta"):
        model = SanaTransformer(config)
    load_weights(model, folder, dtype)
    return model.eval()


def save_transformer(
    model: SanaTransformer, folder: str | Path, *, dtype: torch.dtype | None = None, shard_bytes: int | None = None
) -> None:
    """Writes a folder that diffusers' SanaTransformer2DModel.from_pretrained loads; complete or not at all."""
    state = model.state_dict()
    write_folder(model.config, folder, lambda name: state[name], dtype or model.proj_out.weight.dtype, shard_bytes)


def write_folder(
    config: SanaConfig,
    folder: str | Path,
    tensor: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    shard_bytes: int | None = None,
) -> None:
    """Writes config.json and the weights that `tensor(name)` returns, asked for one shard at a time.

    Args:
        shard_bytes: the most a file may hold; more tensors go to further files, named by an index. None: one file.
    """
    target = Path(folder)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(config, partial, tensor, dtype, shard_bytes)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    config: SanaConfig,
    folder: Path,
    tensor: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    shard_bytes: int | None,
) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    sizes = {name: count * dtype.itemsize for name, count in parameter_sizes(config).items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and shard_bytes is not None and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    stem = WEIGHTS.removesuffix(".safetensors")
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        # A clone, because chunks of one tensor may not share memory in a file.
        state = {name: tensor(name).detach().to("cpu", dtype, copy=True).contiguous() for name in names}
        save_file(state, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def parameter_sizes(config: SanaConfig) -> dict[str, int]:
    """Parameter name -> number of values."""
    with torch.device("meta"):
        return {name: p.numel() for name, p in SanaTransformer(config).named_parameters()}


def require_names(expected: Mapping | set, found: Mapping | set, message: str) -> None:  # type: ignore[type-arg]
    """DataError with `message` and the names on one side only."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        parts = [_list(what, names) for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
        raise DataError(f"{message}: {'; '.join(parts)}")


def _fitting(tensor: torch.Tensor, name: str, shape: tuple[int, ...], path: Path) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise DataError(f"{path}: {name} is {list(tensor.shape)}, the config says {list(shape)}")
    if not tensor.is_floating_point():
        raise DataError(f"{path}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers")
    return tensor


def _list(what: str, names: list[str]) -> str:
    return f"{len(names)} tensors {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def parse_bytes(text: str) -> int:
    """ "5GB", "500MB", "100kB" or a number of bytes; ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.strip().lower())
    size = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]] if match else 0
    if size < 1:
        raise ValueError(f"a size must be written as 5GB or 500MB, got {text!r}")
    return int(size)
