"""The fixed test set in GenEval's JSONL format, and what training must never show.

Held out of training, pictures included:
  - 16 of the 80 shape-colour pairs, two per shape (HELD_OUT_PAIRS), even where the prompt leaves the colour open;
  - 8 of the 28 pairs of shapes that may share a picture (HELD_OUT_SHAPE_PAIRS).
Held out as something a prompt asks for:
  - 6 of the 24 (shape, count) (HELD_OUT_COUNTS);
  - for each other pair of shapes one of the four relations (a ring above a heart is a heart below a ring);
  - one in five combinations of two coloured shapes.
And no test prompt, letter case and punctuation aside, is ever a training prompt.
"""

import json
from collections.abc import Iterator
from functools import cache
from importlib import resources
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from .prompts import geneval_wording, normalized, wording
from .spec import Clause, Spec
from .vocabulary import CATEGORIES, COLOR_NAMES, OPPOSITE, RELATIONS, SHAPES

ASSET = "assets/scenes/test.jsonl"

# A shape's two colours are five apart, and no colour is held out for more than two shapes.
HELD_OUT_PAIRS = frozenset(
    (shape, COLOR_NAMES[(i + offset) % len(COLOR_NAMES)]) for i, shape in enumerate(SHAPES) for offset in (1, 6)
)
# Each shape with the two that are three places away.
HELD_OUT_SHAPE_PAIRS = frozenset(frozenset((shape, SHAPES[(i + 3) % len(SHAPES)])) for i, shape in enumerate(SHAPES))
HELD_OUT_COUNTS = frozenset({("circle", 3), ("square", 2), ("triangle", 4), ("diamond", 3), ("star", 2), ("heart", 4)})
_SEEN_SHAPE_PAIRS = tuple(p for p in combinations(SHAPES, 2) if frozenset(p) not in HELD_OUT_SHAPE_PAIRS)
# (first, relation, second) with the first shape before the second in SHAPES.
HELD_OUT_RELATIONS = frozenset((a, RELATIONS[i % 4], b) for i, (a, b) in enumerate(_SEEN_SHAPE_PAIRS))


def is_held_out(spec: Spec) -> bool:
    """Tells whether training must not show what `spec` asks for."""
    return held_out_reason(spec) is not None


def held_out_reason(spec: Spec) -> str | None:
    """Why a spec is held out (shape-colour pair, shape pair, count, relation, combination); None: it is not."""
    clauses = spec.clauses
    if any((clause.shape, clause.color) in HELD_OUT_PAIRS for clause in clauses):
        return "shape-colour pair"
    if len(clauses) == 2 and frozenset(clause.shape for clause in clauses) in HELD_OUT_SHAPE_PAIRS:
        return "shape pair"
    if any((clause.shape, clause.count) in HELD_OUT_COUNTS for clause in clauses):
        return "count"
    if spec.relation is not None:
        reference, subject = (clause.shape for clause in spec.clauses)
        relation = spec.relation
        if SHAPES.index(subject) > SHAPES.index(reference):
            reference, subject, relation = subject, reference, OPPOSITE[relation]
        if (subject, relation, reference) in HELD_OUT_RELATIONS:
            return "relation"
    if len(clauses) == 2 and all(clause.color for clause in clauses):
        a, b = sorted((SHAPES.index(c.shape), COLOR_NAMES.index(str(c.color))) for c in clauses)
        # 1 and 2 as factors: neither colour alone decides, and exchanging the two colours changes the answer.
        if (a[1] + 2 * b[1] + a[0] + b[0]) % 5 == 0:
            return "combination"
    return None


def generate() -> list[dict[str, Any]]:
    """The lines of the test set, by category in GenEval's order."""
    rng = Random("sana15.scenes test set 1")
    lines: list[dict[str, Any]] = []
    prompts: set[str] = set()
    for category in CATEGORIES:
        for number, spec in enumerate(_test_specs(category, rng)):
            # With two objects there are specs enough: every other one is worded freely.
            free = number % 2 == 1 and category in ("two_object", "position", "color_attr")
            prompt = wording(spec, rng) if free else geneval_wording(spec)
            while prompt_key(prompt) in prompts:
                prompt = wording(spec, rng)
            prompts.add(prompt_key(prompt))
            lines.append(spec.metadata(prompt))
    return lines


def _test_specs(category: str, rng: Random) -> Iterator[Spec]:
    """The specs of one category, in order; a spec that comes again is worded differently."""
    shape_pairs = list(combinations(SHAPES, 2))
    if category == "single_object":
        yield from (Spec((Clause(shape),)) for _ in range(7) for shape in SHAPES)
    elif category == "counting":
        yield from (Spec((Clause(shape, count),)) for _ in range(3) for count in (2, 3, 4) for shape in SHAPES)
    elif category == "colors":
        specs = [Spec((Clause(shape, 1, color),)) for color in COLOR_NAMES for shape in SHAPES]
        yield from specs + [spec for spec in specs if is_held_out(spec)]
    elif category == "two_object":
        orders = [pair for a, b in shape_pairs for pair in ((a, b), (b, a))]
        specs = [Spec((Clause(a), Clause(b))) for a, b in orders]
        yield from specs + [spec for spec in specs if is_held_out(spec)]
    else:
        yield from _balanced(_all_position() if category == "position" else _all_color_attr(), rng)


def _all_position() -> list[Spec]:
    return [Spec((Clause(b), Clause(a)), r) for a in SHAPES for b in SHAPES if a != b for r in RELATIONS]


def _all_color_attr() -> list[Spec]:
    colors = [(p, q) for p in COLOR_NAMES for q in COLOR_NAMES if p != q]
    return [Spec((Clause(a, 1, p), Clause(b, 1, q))) for a in SHAPES for b in SHAPES if a != b for p, q in colors]


def _balanced(specs: list[Spec], rng: Random, count: int = 48) -> list[Spec]:
    """`count` seen and `count` held-out specs, alternating by twos so that both get both kinds of wording."""
    order = sorted(specs, key=lambda _: rng.random())
    seen = [spec for spec in order if not is_held_out(spec)][:count]
    held_out = [spec for spec in order if is_held_out(spec)][:count]
    return [spec for i in range(0, count, 2) for spec in (*seen[i : i + 2], *held_out[i : i + 2])]


def prompt_key(prompt: str) -> str:
    """Prompts that differ only in letter case and punctuation have the same key."""
    return " ".join(normalized(prompt))


def to_jsonl(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def load() -> list[dict[str, Any]]:
    """The committed test set: one GenEval metadata line per prompt."""
    text = resources.files("sana15").joinpath(ASSET).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@cache
def forbidden_prompts() -> frozenset[str]:
    """The keys of the test prompts: what no training prompt may be."""
    return frozenset(prompt_key(line["prompt"]) for line in load())


if __name__ == "__main__":
    path = Path(str(resources.files("sana15").joinpath(ASSET)))
    path.write_text(to_jsonl(generate()), encoding="utf-8")
    print(f"wrote {path}")
