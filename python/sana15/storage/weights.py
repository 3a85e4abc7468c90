"""Weights in diffusers' folders: strict, sharded or whole, safetensors only. The layout of the authors' .pth: model/release.py."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .concurrency import claiming
from .files import CODES, DataError, open_tensors, read_json, replace_folder, staging, stream_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class Weight:
    """A tensor that is not in memory yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @staticmethod
    def of(tensor: torch.Tensor) -> Weight:
        """A tensor that is in memory."""
        return Weight(tuple(tensor.shape), tensor.dtype, lambda: tensor)


Weights = Mapping[str, Weight]


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of the transformer folder's weight files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(set(weight_files(folder).values())):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


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


def folder_weights(folder: str | Path) -> dict[str, Weight]:
    """Every tensor of a folder, by name."""
    files = weight_files(folder)
    weights: dict[str, Weight] = {}
    for path in sorted(set(files.values())):
        there = file_weights(path)
        for name in (n for n, file in files.items() if file == path):
            if name not in there:
                raise DataError(f"{path} lacks {name}, which the index says it holds")
            weights[name] = there[name]
    return weights


def file_weights(path: Path) -> dict[str, Weight]:
    """Every tensor of a safetensors file; the file stays open as long as one of them is needed."""
    stored = open_tensors(path)
    weights = {}
    for name in stored.keys():  # noqa: SIM118, no mapping
        part = stored.get_slice(name)
        if part.get_dtype() not in DTYPES:
            raise DataError(f"{path}: {name} holds {part.get_dtype()}, not floating-point numbers of 16 bits or more")
        weights[name] = Weight(tuple(part.get_shape()), DTYPES[part.get_dtype()], lambda n=name: stored.get_tensor(n))  # type: ignore[misc]
    return weights


def require_fit(weights: Weights, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """DataError that names the tensors missing, unexpected, or of another shape than expected."""
    require_names(expected, weights, f"{where} does not fit its config")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise DataError(f"{where}: {name} is {list(weights[name].shape)}, the config says {list(shape)}")


def require_names(expected: Iterable[str], found: Iterable[str], message: str) -> None:
    """DataError with `message` and the names that are on one side only."""
    missing, unexpected = sorted({*expected} - {*found}), sorted({*found} - {*expected})
    if missing or unexpected:
        parts = [_list(what, names) for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
        raise DataError(f"{message}: {'; '.join(parts)}")


def _list(what: str, names: list[str]) -> str:
    return f"{len(names)} tensors {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def load_weights(model: nn.Module, folder: str | Path, dtype: torch.dtype) -> None:
    """Fills a model (built on the meta device, say) from a folder's weights; names and shapes must fit exactly.

    Raises:
        FileNotFoundError: weights are missing. DataError: a damaged file, or names, shapes or dtypes that do not fit.
    """
    weights = folder_weights(folder)
    require_fit(weights, {name: tuple(p.shape) for name, p in model.state_dict().items()}, str(folder))
    model.load_state_dict({name: w.load().to(dtype) for name, w in weights.items()}, strict=True, assign=True)


@claiming(lambda given: given["folder"], new=True)
def write_folder(
    settings: Mapping[str, Any],
    weights: Weights,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Writes config.json and the weights, one tensor in memory at a time.

    Args:
        settings: of config.json. dtype: of all tensors; None: as they are.
        shard_bytes: the most that a file may hold; more goes to further files, named by an index. None: one file.
    """
    target = Path(folder)
    with staging(target) as partial:
        partial.mkdir()
        (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        _write_shards(weights, partial, dtype, shard_bytes)
        replace_folder(partial, target)


def _write_shards(weights: Weights, folder: Path, dtype: torch.dtype | None, shard_bytes: int | None) -> None:
    # Blocks in the order of their numbers: which file a tensor is in does not depend on the order of `weights`.
    weights = {name: weights[name] for name in sorted(weights, key=_in_words_and_numbers)}
    sizes = {name: torch.Size(w.shape).numel() * (dtype or w.dtype).itemsize for name, w in weights.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and shard_bytes is not None and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    stem = WEIGHTS.removesuffix(".safetensors")
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        write_weights({name: weights[name] for name in names}, folder / file, dtype)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _in_words_and_numbers(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def write_weights(weights: Weights, path: Path, dtype: torch.dtype | None = None) -> None:
    """One safetensors file, one tensor in memory at a time."""
    stream_tensors({name: (w.shape, dtype or w.dtype, w.load) for name, w in weights.items()}, path)
