"""A small learned judge of scenes: a network that finds the objects, and the probability that they are what was asked for.

It has learned from what the renderer drew (training/judge.py), never from the checker, and makes mistakes of its own: a
selector, never the metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from ..scenes.vocabulary import COLOR_NAMES, IMAGE_SIZE, SHAPES
from ..storage.concurrency import using
from ..storage.files import DataError, read_json, read_tensors, require_finite, write_durably, write_tensors
from .base import Verdict
from .scene import scene_line

ASSET = Path(__file__).parents[1] / "assets" / "judge"
STRIDE = 4  # pixels of a cell; centres of two objects are at least 18 pixels apart
GRID = IMAGE_SIZE // STRIDE
# Channels of the output: an object's centre lies in this cell, it is well formed, where in the cell, log(diameter / 20),
# its shape, its colour.
CENTRE, WELL_FORMED, OFFSET, SIZE = 0, 1, slice(2, 4), 4
SHAPE = slice(5, 5 + len(SHAPES))
COLOR = slice(SHAPE.stop, SHAPE.stop + len(COLOR_NAMES))
LIKELY = 0.02  # below it a centre is no object
MISSING = math.log(LIKELY)  # of an object that was asked for and not found
SHARPNESS = 12.0  # of a relation's probability around GenEval's limit of 0.5


class SceneDetector(nn.Module):
    """[B, 3, 64, 64] in -1..1 -> [B, 23, 16, 16]. 0.2 million parameters at the default width."""

    def __init__(self, width: int = 48, blocks: int = 4) -> None:
        super().__init__()
        self.width, self.blocks = width, blocks
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1), nn.GELU(),
            Residual(width // 2, 1), nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
        )  # fmt: skip
        # Dilated by turns, so that a cell sees a whole object of 26 pixels and its neighbours.
        self.body = nn.Sequential(*(Residual(width, 1 + i % 2) for i in range(blocks)))
        self.head = nn.Sequential(nn.GELU(), nn.Conv2d(width, COLOR.stop, 1))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(pictures)))


class Residual(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.first = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(nn.functional.gelu(self.first(nn.functional.gelu(self.norm(x)))))


@dataclass(frozen=True)
class SeenObject:
    """One object as the network sees it."""

    centre: tuple[float, float]  # pixels
    diameter: float
    there: float  # probability
    well_formed: float  # log probability
    shapes: NDArray[np.float64]  # log probabilities
    colors: NDArray[np.float64]


def to_tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    if pixels.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"the learned judge sees {IMAGE_SIZE}x{IMAGE_SIZE} pictures, got {pixels.shape[2]}x{pixels.shape[1]}"
        )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def find(out: torch.Tensor) -> list[SeenObject]:
    """The objects in one picture's output [23, 16, 16]: local maxima of the centre's probability."""
    out = out.double()
    there = out[CENTRE].sigmoid()
    highest = nn.functional.max_pool2d(there[None], 5, stride=1, padding=2)[0]
    found = []
    for y, x in ((there == highest) & (there > LIKELY)).nonzero().tolist():
        cell = out[:, y, x]
        dx, dy = cell[OFFSET].tolist()
        found.append(SeenObject(
            centre=((x + 0.5 + dx) * STRIDE, (y + 0.5 + dy) * STRIDE),
            diameter=20 * math.exp(min(max(float(cell[SIZE]), -2), 2)), there=float(there[y, x]),
            well_formed=float(nn.functional.logsigmoid(cell[WELL_FORMED])),
            shapes=cell[SHAPE].log_softmax(0).numpy(), colors=cell[COLOR].log_softmax(0).numpy(),
        ))  # fmt: skip
    return sorted(found, key=lambda o: -o.there)[:8]


def probability(found: Sequence[SeenObject], line: Mapping[str, Any]) -> float:
    """That exactly the objects of GenEval's metadata are there, well formed, in their colours and places.

    Each object that is asked for takes the one found that suits it best, all together; the others should not be there.
    """
    from scipy.optimize import linear_sum_assignment

    slots = [entry for entry in line["include"] for _ in range(entry["count"])]
    fits = np.full((len(slots), len(found) + len(slots)), MISSING)
    absent = np.array([math.log1p(-min(o.there, 1 - 1e-6)) for o in found])
    for i, entry in enumerate(slots):
        for j, o in enumerate(found):
            fits[i, j] = math.log(o.there) + o.well_formed + o.shapes[SHAPES.index(entry["class"])]
            if entry.get("color") is not None:
                fits[i, j] += o.colors[COLOR_NAMES.index(entry["color"])]
    gain = fits.copy()
    gain[:, : len(found)] -= absent
    rows, columns = linear_sum_assignment(gain, maximize=True)
    total = float(absent.sum() + gain[rows, columns].sum())
    place = {id(slots[i]): found[j] for i, j in zip(rows, columns) if j < len(found)}
    for entry in line["include"]:
        if "position" in entry:
            relation, target = entry["position"]
            subject, reference = place.get(id(entry)), place.get(id(line["include"][target]))
            total += MISSING if subject is None or reference is None else _relation(relation, subject, reference)
    return math.exp(min(total, 0.0))


def _relation(relation: str, subject: SeenObject, reference: SeenObject) -> float:
    """Log probability of GenEval's relation: a soft step around its limit."""
    offset = [s - r for s, r in zip(subject.centre, reference.centre)]
    slack, length = 0.1 * (subject.diameter + reference.diameter), max(math.hypot(*offset), 1e-6)
    x, y = (math.copysign(max(abs(o) - slack, 0.0), o) / length for o in offset)
    along = {"left of": -x, "right of": x, "above": -y, "below": y}[relation]
    return -math.log1p(math.exp(-SHARPNESS * (along - 0.5)))


class LearnedJudge:
    """Scores are probabilities."""

    name = "learned"

    def __init__(self, network: SceneDetector, source: str = "unsaved", training: dict[str, Any] | None = None) -> None:
        self.network, self.source, self.training = network.eval(), source, training or {}

    @staticmethod
    def load(folder: str | Path | None = None) -> LearnedJudge:
        """From a folder that save wrote; None is the one in the package.

        Raises:
            FileNotFoundError: it is missing. DataError: it is damaged.
        """
        root = Path(folder) if folder else ASSET
        if not (root / "config.json").exists():
            how = "python -m sana15.training.judge --out DIR makes one, for --judge learned:DIR"
            raise FileNotFoundError(f"{root} holds no learned judge; {how}")
        values = read_json(root / "config.json")
        try:
            with using(torch.default_generator), torch.random.fork_rng(devices=[]):  # reading is no draw
                network = SceneDetector(int(values["width"]), int(values["blocks"]))
            network.load_state_dict({k: v.float() for k, v in read_tensors(root / "model.safetensors").items()})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{root} does not fit its config: {' '.join(str(error).split())[:200]}") from None
        return LearnedJudge(network, str(folder or "sana15"), values.get("training"))

    def save(self, folder: str | Path) -> None:
        """config.json and model.safetensors in half precision."""
        import json

        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        config = {"width": self.network.width, "blocks": self.network.blocks, "training": self.training}
        tensors = {k: v.half().contiguous() for k, v in self.network.state_dict().items()}
        require_finite(tensors, str(root), "the judge is not written")
        write_tensors(tensors, root / "model.safetensors")
        write_durably((json.dumps(config, indent=1) + "\n").encode(), root / "config.json")

    def identity(self) -> dict[str, Any]:
        import hashlib

        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in self.network.state_dict().values()))
        return {"judge": self.name, "sha256": digest.hexdigest()}

    @torch.no_grad()
    def judge(self, pictures: Sequence[Image.Image], line: Mapping[str, Any]) -> list[Verdict]:
        asked = scene_line(line)
        device = next(self.network.parameters()).device
        found = [find(out) for out in self.network(to_tensor(pictures).to(device)).cpu()]
        return [_verdict(probability(objects, asked), objects) for objects in found]


def _verdict(p: float, objects: Sequence[SeenObject]) -> Verdict:
    seen = ", ".join(
        f"{COLOR_NAMES[int(o.colors.argmax())]} {SHAPES[int(o.shapes.argmax())]}" for o in objects if o.there > 0.5
    )
    return Verdict(p, p > 0.5, f"sees {seen or 'nothing'}")
