"""Transformer weights in diffusers' folders: strict, sharded or whole, safetensors only."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import SanaConfig
from .model import SanaTransformer

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"


def weight_files(folder: str | Path) -> dict[str, Path]:
    """Tensor name -> file, from the index of a sharded checkpoint or the one file of a whole one."""
    root = Path(folder)
    if (root / INDEX).exists():
        names = json.loads((root / INDEX).read_text())["weight_map"]
        files = {name: root / file for name, file in names.items()}
    elif (root / WEIGHTS).exists():
        with _open(root / WEIGHTS) as stored:
            files = dict.fromkeys(stored.keys(), root / WEIGHTS)
    else:
        raise FileNotFoundError(f"{root} holds no {WEIGHTS} and no {INDEX}")
    for path in set(files.values()):
        if not path.exists():
            raise FileNotFoundError(f"{path} is named by the index but missing")
    return files


def load_transformer(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> SanaTransformer:
    """A SanaTransformer in eval mode from a diffusers `transformer/` folder.

    Raises:
        FileNotFoundError: config or weights are missing. ValueError: a damaged file, or names or shapes that do not fit.
    """
    config = SanaConfig.load(folder)
    with torch.device("meta"):
        model = SanaTransformer(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    files = weight_files(folder)
    missing, unexpected = sorted(expected.keys() - files.keys()), sorted(files.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{folder} does not fit its config: {_list('missing', missing)}{_list('unexpected', unexpected)}"
        )
    state = {}
    for path in sorted(set(files.values())):
        with _open(path) as stored:
            for name in (n for n, file in files.items() if file == path):
                tensor = stored.get_tensor(name)
                if tuple(tensor.shape) != expected[name]:
                    raise ValueError(f"{path}: {name} is {list(tensor.shape)}, the config says {list(expected[name])}")
                state[name] = tensor.to(dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def save_transformer(model: SanaTransformer, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes a folder that diffusers' SanaTransformer2DModel.from_pretrained loads; complete or not at all."""
    target = Path(folder)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    state = {k: (v if dtype is None else v.to(dtype)).contiguous().cpu() for k, v in model.state_dict().items()}
    save_file(state, partial / WEIGHTS, metadata={"format": "pt"})
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def _open(path: Path):  # type: ignore[no-untyped-def]
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _list(what: str, names: list[str]) -> str:
    return f"{len(names)} tensors {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) " if names else ""
