"""From one model folder to another, as growth and pruning do it: the source stays as it is, the target appears when it is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..storage.files import DataError, make_writable, open_tensors, read_json, rename_durably, staging
from ..storage.values import is_finite, is_interval
from ..storage.weights import Weight, Weights, folder_weights, require_fit, weight_files, write_folder
from .config import SanaConfig
from .release import parameter_shapes

#: The mini model's pipeline folder, which comes with the package.
MINI = Path(__file__).parents[1] / "assets" / "mini"
#: What a folder of ours says beside diffusers' files: `guidance`, `guidance_interval`, `growth`, `pruning`, `trained_steps`.
SETTINGS = "sana15.json"
GUIDANCE = 4.5  # of the published sizes
#: A written checkpoint is cut into files of at most this many bytes, or of the source's largest file if that is more.
SHARD_BYTES = 5_000_000_000


class ModelFolder:
    """A transformer folder or a whole pipeline folder in diffusers' layout.

    Args:
        source: the folder; or "mini".

    Attributes:
        root: the folder. transformer: where its transformer is. pipeline: whether there are other parts. config.

    Raises:
        FileNotFoundError, DataError: it is no model folder.
    """

    def __init__(self, source: str | Path) -> None:
        self.root = MINI if str(source) == "mini" else Path(source)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{source} is no folder")
        self.pipeline = (self.root / "transformer").is_dir()
        self.transformer = self.root / "transformer" if self.pipeline else self.root
        self.config = SanaConfig.load(self.transformer)

    def weights(self) -> dict[str, Weight]:
        """Every tensor, none in memory; they fit the configuration."""
        weights = reopening(self.transformer)
        require_fit(weights, parameter_shapes(self.config), str(self.transformer))
        return weights

    def settings(self) -> dict[str, Any]:
        """The settings of its sana15.json; empty where there is none."""
        return recorded(self.root)

    def check_target(self, target: Path) -> None:
        """ValueError for a target that exists or lies inside this folder."""
        if target.exists() or target.is_symlink():
            raise ValueError(f"{target} exists; remove it or choose another place")
        if self.root.resolve() in target.resolve().parents:
            raise ValueError(f"{target} lies inside the source {self.root}; choose another place")

    def rewrite(
        self,
        target: Path,
        config: SanaConfig,
        weights: Weights,
        settings: dict[str, Any],
        *,
        shard_bytes: int | None = None,
        finish: Callable[[Path, Path], Path] = lambda whole, transformer: whole,
    ) -> None:
        """This folder with another transformer, one tensor in memory at a time; other parts of a pipeline are copied.

        Args:
            target: must not exist; it appears when everything is written and `finish` is done. A run that was killed
                leaves a hidden folder beside it, which the next one removes.
            settings: of the target's sana15.json.
            shard_bytes: the most that a weights file may hold. Default: as this folder's largest file, at least 5 GB.
            finish: given the whole new folder and its transformer folder, the last step; it returns the folder that
                becomes the target. What it raises leaves no target.
        """
        self.check_target(target)
        if shard_bytes is None:
            files = set(weight_files(self.transformer).values())
            shard_bytes = max(SHARD_BYTES, *(path.stat().st_size for path in files))
        with staging(target) as partial:
            if self.pipeline:  # links are followed: a download cache is made of them
                shutil.copytree(
                    self.root, partial, ignore=lambda at, _: ["transformer"] if Path(at) == self.root else []
                )
                make_writable(partial)  # the source may be read-only, and the copy has its modes
            else:
                partial.mkdir()
            made = partial / "transformer"
            write_folder(config.to_dict(), weights, made, shard_bytes=shard_bytes)
            whole = partial if self.pipeline else made
            record(whole, settings)
            finished = finish(whole, made)
            self.check_target(target)  # another run may have been quicker
            rename_durably(finished, target)


def reopening(folder: Path) -> dict[str, Weight]:
    """Every tensor of a folder; its file is opened for each anew, so that no more of it than that tensor is in memory."""
    files = weight_files(folder)

    def load(name: str) -> torch.Tensor:
        with open_tensors(files[name]) as stored:
            return stored.get_tensor(name)

    return {
        name: Weight(w.shape, w.dtype, lambda n=name: load(n))  # type: ignore[misc]
        for name, w in folder_weights(folder).items()
    }


def pipeline_root(source: str | Path) -> Path:
    """The folder that "mini" or a path names; FileNotFoundError for the mini model of an installation without it."""
    if str(source) != "mini":
        return Path(source)
    if not (MINI / "transformer").is_dir():
        raise FileNotFoundError(f"the mini model is not in this installation: {MINI} is missing; name a --model folder")
    return MINI


def recorded(root: Path) -> dict[str, Any]:
    """The settings of a folder's sana15.json; empty where there is none."""
    return read_json(root / SETTINGS) if (root / SETTINGS).exists() else {}


def record(root: Path, settings: dict[str, Any]) -> None:
    """Writes sana15.json into a folder that is not in its place yet."""
    (root / SETTINGS).unlink(missing_ok=True)  # a copy of a read-only file would be read-only
    (root / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def record_scheduler(root: Path, flow_shift: float) -> None:
    """Writes the scheduler's configuration as diffusers reads it: Flow-DPM-Solver++ with this shift."""
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "solver_order": 2,
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": flow_shift,
    }  # fmt: skip
    (root / "scheduler").mkdir(parents=True, exist_ok=True)
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")


def recorded_guidance(root: Path) -> tuple[float, tuple[float, float]]:
    """Scale and interval of guidance in the folder's sana15.json; the published sizes' where none is recorded."""
    path, settings = root / SETTINGS, recorded(root)
    scale, interval = settings.get("guidance", GUIDANCE), settings.get("guidance_interval", [0.0, 1.0])
    if not is_finite(scale):
        raise DataError(f"{path}: guidance must be a finite number, got {scale!r}")
    if not is_interval(interval):
        raise DataError(f"{path}: guidance_interval must be two numbers 0 <= low <= high <= 1, got {interval!r}")
    return float(scale), (float(interval[0]), float(interval[1]))


def recorded_kept(folder: Path) -> list[int]:
    """The kept blocks in a pruned folder's sana15.json; DataError where there are none."""
    pruning = recorded(folder).get("pruning")
    kept = pruning.get("kept") if isinstance(pruning, dict) else None
    if not isinstance(kept, list) or not all(type(i) is int for i in kept):
        raise DataError(f"{folder / SETTINGS} does not say which blocks were kept")
    return kept


def recorded_blocks(path: Path) -> tuple[list[int], int | None]:
    """The block numbers in a file, and the depth of the model that they are of: a pruned folder's sana15.json, or a JSON list (None).

    Raises:
        DataError: a file without such a list.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        pruning = values["pruning"] if isinstance(values, dict) else {"kept": values}
        kept, depth = pruning["kept"], pruning.get("source_layers")
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError):
        kept, depth = None, None
    if not isinstance(kept, list):
        raise DataError(f"{path} holds no list of block numbers and no pruning")
    return kept, depth


def recorded_map(folder: str | Path, layers: int) -> list[int | None]:
    """The growth map in a folder's sana15.json; empty where none is recorded.

    Raises:
        DataError: it is not a map of `layers` blocks.
    """
    path = Path(folder) / SETTINGS
    growth = recorded(Path(folder)).get("growth")
    if growth is None:
        return []
    blocks = growth.get("map") if isinstance(growth, dict) else None
    valid = isinstance(blocks, list) and all(b is None or (type(b) is int and b >= 0) for b in blocks)
    if not isinstance(blocks, list) or not valid or len(blocks) != layers:
        raise DataError(f"{path}: growth.map must name a source block or null for each of the {layers} blocks")
    return blocks
