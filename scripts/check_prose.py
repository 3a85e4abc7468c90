"""Measures the prose of the project, and fails where it breaks a rule; part of `make lint`.

Docstrings name the thing or begin with a verb: none begins with a question word or "Of". Sentences of README.md have at
most 40 words, 18 in the mean; code, tables, links' targets and list marks do not count.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sana_ext", "python/sana15")
FIRST_WORD = re.compile(r"(Of|What|Whether|Where|How|Which)\b")
LONGEST, MEAN = 40, 18  # words


def docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Yields (file:line, docstring) of every module, class and function of the packages."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                    yield f"{path.relative_to(root)}:{getattr(node, 'lineno', 1)}", text


def sentences(markdown: str) -> list[str]:
    """Returns the sentences of a page's running text; a list item or heading ends one."""
    text = re.sub(r"```.*?```|<!--.*?-->", "\n\n", markdown, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "#", "!["))]
    blocks = re.split(r"\n\s*\n|\n(?=\s*[-*] )", "\n".join(lines))
    found = []
    for block in blocks:
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(block.split()))
        plain = re.sub(r"`[^`]*`", "code", plain).lstrip("-* ")
        found += [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z*_\"(]|code)", plain) if len(s.split()) > 1]
    return found


def main() -> int:
    texts = list(docstrings(ROOT))
    wrong = [f"{place}: {text.splitlines()[0]}" for place, text in texts if FIRST_WORD.match(text)]
    page = sentences((ROOT / "README.md").read_text(encoding="utf-8"))
    words = [len(s.split()) for s in page]
    mean = sum(words) / len(words)
    print(f"{len(texts)} docstrings, {len(wrong)} of them begin with a question word or Of")
    print(f"README.md: {len(page)} sentences, {mean:.1f} words in the mean, {max(words)} in the longest")
    wrong += [f"README.md: {n} words: {s}" for s, n in zip(page, words) if n > LONGEST]
    if mean > MEAN:
        wrong.append(f"README.md: {mean:.1f} words in the mean, {MEAN} allowed")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
