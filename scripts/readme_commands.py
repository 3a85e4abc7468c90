"""Runs the commands and examples of README.md that follow a line `<!-- checked -->`: ```sh and ```python blocks.

Each block runs in its own empty folder except those marked `<!-- checked: here -->`, which run in the repository. The
environment's programs (python, pip, pytest) come first on PATH. Those marked `<!-- checked: install -->` need an
environment of their own: `make check PARTS=install` runs them in order, in a clean copy of the checkout.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"^<!-- checked(?:: (?P<where>here|install))? -->\n```(?P<language>sh|python)\n(?P<text>.*?)^```",
    re.DOTALL | re.MULTILINE,
)


def blocks_of_readme() -> list[re.Match[str]]:
    return list(BLOCK.finditer((ROOT / "README.md").read_text()))


def install_commands() -> list[str]:
    """The lines of the section on installation, in order."""
    texts = [block["text"] for block in blocks_of_readme() if block["where"] == "install"]
    return [line for text in texts for line in text.splitlines() if line.strip()]


def main() -> int:
    blocks = [block for block in blocks_of_readme() if block["where"] != "install"]
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    for block in blocks:
        interpreter = ["bash", "-euo", "pipefail"] if block["language"] == "sh" else [sys.executable, "-"]
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as empty:
            folder = ROOT if block["where"] == "here" else empty
            result = subprocess.run(interpreter, input=block["text"], text=True, cwd=folder, env=env)
        if result.returncode:
            print(f"FAILED with exit code {result.returncode}:\n{block['text']}")
            return 1
        print(f"{time.monotonic() - start:.0f} s: {block['text'].splitlines()[0]}", flush=True)
    print(f"{len(blocks)} blocks of README.md run")
    return 0 if blocks else 1


if __name__ == "__main__":
    sys.exit(main())
