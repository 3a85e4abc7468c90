"""The exact pixel checker: does a picture show what GenEval's metadata asks for?

It sees the picture and the metadata, never the scene. Two rules:

strict (default): the background is grey, every object is well formed, the picture has exactly the objects that are
    asked for, and GenEval's conditions hold. A malformed, an extra or a missing object is an error in every category.
geneval: GenEval's conditions alone, on the well-formed objects. Extra and malformed objects are ignored, except that a
    counting prompt excludes one more of its class.

GenEval's conditions: of each class the `count` best objects count; each has the colour asked for; a relation holds when
the offset of the boxes' centres, reduced along each axis by a tenth of the two boxes' sizes and divided by its length,
is beyond 0.5 on the relation's side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .detect import Detected, Picture, detect_batch
from .vocabulary import COLORS, RELATIONS, SHAPES

RULES = ("strict", "geneval")


@dataclass(frozen=True)
class Verdict:
    """Tells whether the image is correct, why not (empty when it is), and the objects that were found."""

    correct: bool
    reason: str
    objects: tuple[Detected, ...]


def check(picture: NDArray[np.uint8], metadata: Mapping[str, Any], rule: str = "strict") -> Verdict:
    """Judges one picture [64, 64, 3] uint8 by one GenEval metadata line."""
    return check_batch(np.asarray(picture)[None], [metadata], rule)[0]


def check_batch(
    pictures: NDArray[np.uint8], metadata: Sequence[Mapping[str, Any]], rule: str = "strict"
) -> list[Verdict]:
    """Judges pictures [B, 64, 64, 3] uint8, each by its own metadata line (keys `include` and, maybe, `exclude`).

    Raises:
        ValueError: an unknown rule, another number of lines than of pictures, or a line with a class, colour or
            position that no picture can show.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; the rules are {', '.join(RULES)}")
    if len(pictures) != len(metadata):
        raise ValueError(f"{len(pictures)} pictures but {len(metadata)} metadata lines")
    for line in metadata:
        _require_valid(line)
    verdicts = []
    for picture, line in zip(detect_batch(np.asarray(pictures)), metadata):
        reason = judge(picture, line, rule)
        verdicts.append(Verdict(reason == "", reason, picture.objects))
    return verdicts


def judge(picture: Picture, metadata: Mapping[str, Any], rule: str = "strict") -> str:
    """Why the picture is not what the metadata asks for; empty when it is."""
    include = metadata["include"]
    well_formed = [o for o in picture.objects if o.problem is None]
    if rule == "strict":
        if not picture.neutral:
            return "the background is not grey"
        for o in picture.objects:
            if o.problem is not None:
                return f"malformed object ({o.problem}) at {_place(o)}"
    by_class = {shape: sorted((o for o in well_formed if o.shape == shape), key=lambda o: -o.score) for shape in SHAPES}
    for entry in include:
        found = len(by_class[entry["class"]])
        if found < entry["count"]:
            return f"expected {entry['count']} {entry['class']}, found {found}"
    for entry in metadata.get("exclude", ()):
        found = len(by_class[entry["class"]])
        if found >= entry["count"]:
            return f"expected fewer than {entry['count']} {entry['class']}, found {found}"
    total = sum(entry["count"] for entry in include)
    if rule == "strict" and len(well_formed) != total:
        return f"expected {total} objects, found {len(well_formed)}"
    chosen = [by_class[entry["class"]][: entry["count"]] for entry in include]
    for entry, group in zip(include, chosen):
        wrong = [o.color for o in group if entry.get("color") not in (None, o.color)]
        if wrong:
            return f"expected {entry['color']} {entry['class']}, found {wrong[0]}"
    for entry, group in zip(include, chosen):
        if "position" in entry:
            relation, target = entry["position"]
            if not all(relation in relations(o.box, t.box) for o in group for t in chosen[target]):
                return f"expected {entry['class']} {relation} {include[target]['class']}"
    return ""


def relations(box: Sequence[float], reference: Sequence[float]) -> set[str]:
    """The relations of a box (x1, y1, x2, y2) to a reference box by GenEval's rule."""
    offset = [(box[i] + box[i + 2] - reference[i] - reference[i + 2]) / 2 for i in (0, 1)]
    sizes = [box[i + 2] - box[i] + reference[i + 2] - reference[i] for i in (0, 1)]
    length = hypot(*offset)
    if length == 0:
        return set()
    x, y = (np.sign(o) * max(abs(o) - 0.1 * s, 0) / length for o, s in zip(offset, sizes))
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def _place(o: Detected) -> str:
    return f"({(o.box[0] + o.box[2]) / 2:.0f}, {(o.box[1] + o.box[3]) / 2:.0f})"


def _require_valid(line: Mapping[str, Any]) -> None:
    try:
        include, exclude = line["include"], line.get("exclude", ())
        for entry in (*include, *exclude):
            if entry["class"] not in SHAPES:
                raise ValueError(f"unknown class {entry['class']!r}; the shapes are {', '.join(SHAPES)}")
            if entry["count"] < 1:
                raise ValueError(f"a count must be at least 1, got {entry['count']}")
            if entry.get("color") not in (None, *COLORS):
                raise ValueError(f"unknown colour {entry['color']!r}; the colours are {', '.join(COLORS)}")
            if "position" in entry:
                relation, target = entry["position"]
                if relation not in RELATIONS or not 0 <= target < len(include):
                    raise ValueError(f"unknown position {entry['position']!r}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a GenEval metadata line: {line!r}") from error
