"""GenEval's rules on photos: a Mask2Former finds objects, a CLIP names their colours.

GenEval-compatible, not identical: the published figures come from mmdetection's Swin-S on COCO and open_clip's ViT-L-14. The
same architectures' weights in transformers (facebook/mask2former-swin-small-coco-instance) and open_clip give nearby boxes.
Source of the rules: GenEval (arXiv:2310.11513) and its program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn

from ..scenes.checker import relations
from ..scenes.vocabulary import COLOR_NAMES
from ..storage.concurrency import using
from ..storage.files import DataError, read_json
from ..storage.redaction import said
from .export import Shown, result_row

THRESHOLD, COUNTING_THRESHOLD, MOST = 0.3, 0.9, 16  # GenEval's: of a box's score, in counting prompts, boxes of a class
BLANK = "#999999"  # around an object whose colour is asked for
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
# GenEval's names of COCO's classes, where they are not COCO's.
COCO = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class Box:
    """One object: x1, y1, x2, y2 in pixels, its score, and its pixels [H, W]."""

    box: tuple[float, float, float, float]
    score: float
    mask: NDArray[np.bool_]


Colors = Callable[
    [Image.Image, Sequence[Box], str], list[str]
]  # (picture, boxes of one class, its name) -> their colours


class PhotoDetector:
    """A Mask2Former for instances: a picture's boxes by class, the surest first.

    Args:
        model: transformers' Mask2FormerForUniversalSegmentation. size: (shorter, longer) side that pictures are scaled to,
            at most the longer one. image_mean, image_std: of the model's training.
    """

    def __init__(
        self, model: Any, size: tuple[int, int] = (800, 1333), image_mean: Sequence[float] = IMAGENET["image_mean"],
        image_std: Sequence[float] = IMAGENET["image_std"],
    ) -> None:  # fmt: skip
        self.model, self.size = model.eval(), size
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (image_mean, image_std))
        self.names: dict[int, str] = {int(k): v for k, v in model.config.id2label.items()}

    @staticmethod
    def load(source: str, device: str = "cpu") -> PhotoDetector:
        """A folder in transformers' layout, or a name that transformers can find; DataError where it is no Mask2Former."""
        from transformers import Mask2FormerForUniversalSegmentation

        try:
            model: Any = Mask2FormerForUniversalSegmentation.from_pretrained(source)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DataError(f"{source} is no Mask2Former: {said(error, 200)}") from None
        path = Path(source) / "preprocessor_config.json"
        values = IMAGENET | (read_json(path) if path.exists() else {})
        size = values.get("size") or {}
        sides = (
            (size.get("shortest_edge", 800), size.get("longest_edge", 1333)) if isinstance(size, dict) else (size, 1333)
        )
        return PhotoDetector(model.to(device), sides, values["image_mean"], values["image_std"])

    @torch.no_grad()
    def detect(self, picture: Image.Image) -> dict[str, list[Box]]:
        """Class -> boxes, whatever their score; every query's best classes count, as in mmdetection's instance head."""
        W, H = picture.size
        scale = min(self.size[0] / min(W, H), self.size[1] / max(W, H))
        w, h = max(round(W * scale), 1), max(round(H * scale), 1)
        pixels = torch.from_numpy(np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR), dtype=np.float32))
        x = (pixels.permute(2, 0, 1) / 255 - self.mean) / self.std
        x = nn.functional.pad(x, (0, -w % 32, 0, -h % 32))[None].to(self.model.device, self.model.dtype)
        out = self.model(pixel_values=x, pixel_mask=torch.ones_like(x[:, 0], dtype=torch.long))
        chances = out.class_queries_logits[0].float().softmax(-1)[:, :-1]  # [Q, C]; the last class is "nothing"
        Q, C = chances.shape
        scores, index = chances.flatten().topk(min(Q, Q * C))
        logits = nn.functional.interpolate(
            out.masks_queries_logits.float(), x.shape[-2:], mode="bilinear", align_corners=False
        )[:, :, :h, :w]
        logits = nn.functional.interpolate(logits, (H, W), mode="bilinear", align_corners=False)[0]  # [Q, H, W]
        found: dict[str, list[Box]] = {}
        for score, i in zip(scores.tolist(), index.tolist()):
            mask = logits[i // C] > 0
            if not mask.any():
                continue
            sure = float(logits[i // C].sigmoid()[mask].mean())
            ys, xs = mask.any(1).nonzero(), mask.any(0).nonzero()
            box = (float(xs[0]), float(ys[0]), float(xs[-1]) + 1, float(ys[-1]) + 1)
            found.setdefault(self.names[i % C], []).append(Box(box, score * sure, mask.cpu().numpy()))
        return {name: sorted(boxes, key=lambda b: -b.score) for name, boxes in found.items()}


class ClipColors:
    """A CLIP as a reader of colours: the object alone on grey, compared with GenEval's three sentences for each colour.

    Args:
        embed_pictures: pictures -> [B, D]. embed_texts: sentences -> [B, D].
    """

    def __init__(
        self, embed_pictures: Callable[[Sequence[Image.Image]], torch.Tensor],
        embed_texts: Callable[[Sequence[str]], torch.Tensor],
    ) -> None:  # fmt: skip
        self.embed_pictures, self.embed_texts = embed_pictures, embed_texts
        self._known: dict[str, torch.Tensor] = {}

    @staticmethod
    def load(source: str, device: str = "cpu") -> ClipColors:
        """ "open_clip:ARCHITECTURE:WEIGHTS" (GenEval's: open_clip:ViT-L-14:openai), or a CLIP of transformers.

        Raises:
            ModuleNotFoundError: open_clip is not installed. DataError: no such model.
        """
        kind, _, rest = source.partition(":")
        return _open_clip(rest, device) if kind == "open_clip" else _transformers_clip(source, device)

    @torch.no_grad()
    def __call__(self, picture: Image.Image, boxes: Sequence[Box], name: str) -> list[str]:
        if name not in self._known:
            texts = [t.format(color=color, name=name) for color in COLOR_NAMES for t in TEMPLATES]
            vectors = nn.functional.normalize(self.embed_texts(texts).float(), dim=-1)
            means = vectors.view(len(COLOR_NAMES), len(TEMPLATES), -1).mean(1)
            self._known[name] = nn.functional.normalize(means, dim=-1)  # [colours, D]
        blank = Image.new("RGB", picture.size, BLANK)
        crops = []
        for b in boxes:
            left, top, right, bottom = map(int, b.box)
            alone = Image.composite(picture, blank, Image.fromarray(b.mask))
            crops.append(alone.crop((left, top, right, bottom)))
        seen = nn.functional.normalize(self.embed_pictures(crops).float(), dim=-1)
        return [COLOR_NAMES[i] for i in (seen @ self._known[name].T).argmax(1).tolist()]


def _transformers_clip(source: str, device: str) -> ClipColors:
    from ..judges.clip import ClipJudge

    clip = ClipJudge.load(source, device)

    def pictures(crops: Sequence[Image.Image]) -> torch.Tensor:
        with using(clip.processor):
            given = clip.processor(text=["color"], images=list(crops), return_tensors="pt", padding=True)
        return clip.model(**given.to(clip.model.device)).image_embeds

    def texts(sentences: Sequence[str]) -> torch.Tensor:
        with using(clip.processor):
            given = clip.processor(
                text=list(sentences),
                images=[Image.new("RGB", (32, 32))],
                return_tensors="pt",
                padding=True,
                truncation=True,
            )
        return clip.model(**given.to(clip.model.device)).text_embeds

    return ClipColors(pictures, texts)


def _open_clip(name: str, device: str) -> ClipColors:
    import open_clip

    architecture, _, weights = name.partition(":")
    try:
        model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=weights or None)
        tokenizer = open_clip.get_tokenizer(architecture)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"open_clip has no {name}: {said(error, 200)}") from None
    model.eval().to(device)
    return ClipColors(
        lambda crops: model.encode_image(torch.stack([transform(crop) for crop in crops]).to(device)),
        lambda sentences: model.encode_text(tokenizer(list(sentences)).to(device)),
    )


def kept(found: Mapping[str, list[Box]], tag: str) -> dict[str, list[Box]]:
    """The boxes that GenEval looks at: sure enough, and not too many of a class; no suppression of overlaps."""
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    chosen = {name: [b for b in boxes if b.score > least][:MOST] for name, boxes in found.items()}
    return {name: boxes for name, boxes in chosen.items() if boxes}


def judge(
    found: Mapping[str, Sequence[Box]], line: Mapping[str, Any], colors: Callable[[Sequence[Box], str], list[str]]
) -> str:
    """Why a picture is not what GenEval's metadata asks for; empty when it is.

    Of each class the `count` surest boxes are looked at: there must be as many, all of the colour asked for, and each in the
    relation to each box of the class that it refers to, which must itself be right. found: boxes by GenEval's class names,
    the surest first. colors(boxes, class) -> their colours.
    """
    reasons: list[str] = []
    groups: list[Sequence[Box] | None] = []
    for entry in line.get("include", ()):
        name, count = entry["class"], entry["count"]
        boxes = list(found.get(name, ()))[:count]
        wrong = f"expected {name}>={count}, found {len(boxes)}" if len(boxes) < count else ""
        if not wrong and "color" in entry:
            right = colors(boxes, name).count(entry["color"])
            if right < count:
                wrong = f"expected {entry['color']} {name}>={count}, found {right}"
        if not wrong and "position" in entry:
            relation, target = entry["position"]
            others = groups[target]
            if others is None:
                wrong = f"no target for {name} to be {relation}"
            elif not all(relation in relations(b.box, o.box) for b in boxes for o in others):
                wrong = f"expected {name} {relation} target"
        groups.append(None if wrong else boxes)
        reasons += [wrong] if wrong else []
    for entry in line.get("exclude", ()):
        number = len(found.get(entry["class"], ()))
        if number >= entry["count"]:
            reasons.append(f"expected {entry['class']}<{entry['count']}, found {number}")
    return "\n".join(reasons)


def photo_results(shown: Sequence[Shown], detector: PhotoDetector, colors: Colors | None) -> list[dict[str, Any]]:
    """Rows of GenEval's results.jsonl for every picture.

    Raises:
        ValueError: a class that the detector does not know, or a colour is asked for and there is nobody to tell it.
        DataError: a damaged picture, or a line without GenEval's metadata.
    """
    known = set(detector.names.values())
    alias = {name: name if name in known else COCO.get(name, name) for name in [*COCO, *known]}
    for s in shown:
        try:
            wanted = [entry["class"] for entry in (*s.line["include"], *s.line.get("exclude", ()))]
            asks_color = any("color" in entry for entry in s.line["include"])
            s.line["tag"], [entry["count"] for entry in s.line["include"]]
        except (KeyError, TypeError) as error:
            raise DataError(f"{s.paths[0].parent.parent}/metadata.jsonl: no GenEval metadata ({error!r})") from None
        if unknown := [name for name in wanted if alias.get(name) not in known]:
            raise ValueError(f"the detector knows no {unknown[0]!r}, which {s.prompt!r} asks for")
        if asks_color and colors is None:
            raise ValueError(f"{s.prompt!r} asks for a colour: name a CLIP that tells colours")
    rows = []
    for s in shown:
        for path in s.paths:
            picture = _open(path)
            found = kept(detector.detect(picture), s.line["tag"])
            by_name = {name: found[coco] for name, coco in alias.items() if coco in found}

            def read(boxes: Sequence[Box], name: str, picture: Image.Image = picture) -> list[str]:
                return colors(picture, boxes, name) if colors is not None else []

            reason = judge(by_name, s.line, read)
            details = {name: [[*b.box, b.score] for b in boxes] for name, boxes in by_name.items()}
            rows.append(result_row(str(path), s.line, not reason, reason, details))
    return rows


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
