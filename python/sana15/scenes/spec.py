"""Describes what a prompt asks for, also as GenEval's metadata.

GenEval lists a position prompt's reference first; the subject follows with `position: [relation, 0]`. A counting prompt
also excludes the same class with one more. Here a class is a shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .vocabulary import CATEGORIES, COLORS, MAX_COUNT, RELATIONS, SHAPES


@dataclass(frozen=True)
class Clause:
    """`count` objects of one shape; `color` None leaves the colour open."""

    shape: str
    count: int = 1
    color: str | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"unknown shape {self.shape!r}; the shapes are {', '.join(SHAPES)}")
        if self.color is not None and self.color not in COLORS:
            raise ValueError(f"unknown colour {self.color!r}; the colours are {', '.join(COLORS)}")
        if self.count < 1:
            raise ValueError(f"a count must be at least 1, got {self.count}")


@dataclass(frozen=True)
class Spec:
    """One or two clauses, and for a position prompt the relation of the second (subject) to the first (reference)."""

    clauses: tuple[Clause, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.clauses) not in (1, 2):
            raise ValueError(f"a spec has one or two clauses, got {len(self.clauses)}")
        if len({clause.shape for clause in self.clauses}) != len(self.clauses):
            raise ValueError(f"the two shapes must differ, got {self.clauses[0].shape} twice")
        if self.relation not in (None, *RELATIONS):
            raise ValueError(f"unknown relation {self.relation!r}; the relations are {', '.join(RELATIONS)}")
        if self.relation is not None and (len(self.clauses), self.total()) != (2, 2):
            raise ValueError(f"{self.relation!r} relates two single objects, not {self.total()} objects")

    def total(self) -> int:
        return sum(clause.count for clause in self.clauses)

    @property
    def tag(self) -> str:
        """GenEval's category. Mixtures that GenEval does not have count as the hardest part they contain."""
        if self.relation is not None:
            return "position"
        if self.total() > len(self.clauses):
            return "counting"
        colored = any(clause.color for clause in self.clauses)
        if len(self.clauses) == 2:
            return "color_attr" if colored else "two_object"
        return "colors" if colored else "single_object"

    def metadata(self, prompt: str) -> dict[str, Any]:
        """One line of GenEval's prompt file: tag, include, exclude (counting only), prompt."""
        include: list[dict[str, Any]] = []
        for clause in self.clauses:
            entry: dict[str, Any] = {"class": clause.shape, "count": clause.count}
            if clause.color is not None:
                entry["color"] = clause.color
            include.append(entry)
        if self.relation is not None:
            include[1]["position"] = [self.relation, 0]
        line: dict[str, Any] = {"tag": self.tag, "include": include}
        if self.tag == "counting":
            line["exclude"] = [{"class": c.shape, "count": c.count + 1} for c in self.clauses]
        line["prompt"] = prompt
        return line


def spec_from_metadata(metadata: Mapping[str, Any]) -> Spec:
    """The Spec of one line of GenEval's prompt file, as `Spec.metadata` writes it."""
    try:
        include = metadata["include"]
        clauses = tuple(Clause(e["class"], int(e["count"]), e.get("color")) for e in include)
        relations = [(i, *e["position"]) for i, e in enumerate(include) if "position" in e]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a GenEval metadata line: {metadata!r}") from error
    if relations and (len(relations) != 1 or relations[0][0] != 1 or relations[0][2] != 0):
        raise ValueError(f"the position must be the second clause's, relative to the first, got {relations}")
    if metadata.get("tag") not in (None, *CATEGORIES):
        raise ValueError(f"unknown tag {metadata['tag']!r}; the tags are {', '.join(CATEGORIES)}")
    spec = Spec(clauses, relations[0][1] if relations else None)
    if spec.total() > MAX_COUNT:
        raise ValueError(f"at most {MAX_COUNT} objects, got {spec.total()}")
    return spec
