"""Reads the import graph of the two packages by AST: late imports count like those at the top of a file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LONGEST_FILE, LONGEST_FUNCTION = 400, 80  # lines


@dataclass(frozen=True)
class Tree:
    """The modules of some packages: dotted name to source."""

    sources: dict[str, str]
    packages: frozenset[str]  # the names among them that are an __init__.py

    @classmethod
    def read(cls, **folders: Path) -> Tree:
        """Reads package folders: `Tree.read(sana15=Path("python/sana15"))`."""
        sources, packages = {}, set()
        for package, folder in folders.items():
            for path in sorted(folder.rglob("*.py")):
                parts = [package, *path.relative_to(folder).with_suffix("").parts]
                if parts[-1] == "__init__":
                    parts.pop()
                    packages.add(".".join(parts))
                sources[".".join(parts)] = path.read_text()
        return cls(sources, frozenset(packages))

    def imports(self, module: str) -> set[str]:
        """The names that a module imports from the tree: modules where they are one, else `module.name`."""
        found = set()
        for node in ast.walk(ast.parse(self.sources[module])):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = self._base(module, node)
                found |= {f"{base}.{alias.name}" for alias in node.names}
        own = {name.split(".")[0] for name in self.sources}
        return {name for name in found if name.split(".")[0] in own}

    def _base(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = module.split(".") if module in self.packages else module.split(".")[:-1]
        above = package[: len(package) - node.level + 1]
        return ".".join([*above, *([node.module] if node.module else [])])

    def module_of(self, name: str) -> str:
        """The module that holds an imported name."""
        while name not in self.sources and "." in name:
            name = name.rpartition(".")[0]
        return name

    def arrows(self) -> set[tuple[str, str]]:
        """(importer, imported), modules of the tree; an `__init__` hands names on and is no end of an arrow."""
        return {
            (module, imported)
            for module in self.sources
            if module not in self.packages and not module.endswith("__main__")
            for imported in map(self.module_of, self.imports(module))
            if imported in self.sources and imported not in self.packages and imported != module
        }

    def long_files(self) -> set[str]:
        return {name for name, source in self.sources.items() if len(source.splitlines()) > LONGEST_FILE}

    def long_functions(self) -> set[str]:
        return {
            f"{module}.{node.name}"
            for module, source in self.sources.items()
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and (node.end_lineno or 0) - node.lineno + 1 > LONGEST_FUNCTION
        }


def circles(arrows: set[tuple[str, str]]) -> set[frozenset[str]]:
    """The sets of two and more modules that import each other, directly or through others (Tarjan, 1972)."""
    follow: dict[str, list[str]] = {}
    for a, b in sorted(arrows):
        follow.setdefault(a, []).append(b)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = set()

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in follow.get(node, []):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            at = stack.index(node)
            circle = frozenset(stack[at:])
            del stack[at:]
            if len(circle) > 1:
                found.add(circle)

    for node in list(follow):
        if node not in index:
            visit(node)
    return found


def rooms_of(module: str) -> str:
    """The module or package directly under its top package: `sana15.judges.clip` is in `sana15.judges`."""
    return ".".join(module.split(".")[:2])


def upward(arrows: set[tuple[str, str]], floor: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Imports from a room to one that stands on a higher floor."""
    for a, b in sorted(arrows):
        if floor[rooms_of(a)] < floor[rooms_of(b)]:
            yield a, b
