"""`sana15 sample`: pictures for prompts of the command line or of a file, resumable, nothing half-written."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..device import resolved
from ..model.text import is_mini
from ..sampling.pipeline import Pipeline, check_folder_size, describe
from ..sampling.settings import Item, Sampling
from ..scenes.prompts import parse
from ..storage.concurrency import claiming
from ..storage.files import DataError
from ..storage.png import read_png, save_png
from . import layout

_logger = logging.getLogger(__name__)

# How many pictures are computed at once where --batch-size does not say: the mini model's and the published sizes'.
BATCH_MINI, BATCH = 32, 1


def settings_of(args: argparse.Namespace) -> Sampling:
    return Sampling(
        seed=args.seed, steps=args.steps, guidance=args.guidance,
        guidance_interval=None if args.guidance_interval is None else tuple(args.guidance_interval),
        height=args.height, width=args.width, negative_prompt=args.negative, sampler=args.sampler,
    )  # fmt: skip


@claiming(lambda given: given["args"].out)
def run(args: argparse.Namespace) -> None:
    settings, out = settings_of(args), Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, not a folder")
    check_folder_size(args.model, settings.height, settings.width)
    lines = layout.read_prompts(args.prompts) if args.prompts else [{"prompt": prompt} for prompt in args.prompt]
    pipe = Pipeline.from_pretrained(args.model, device=resolved(args.device))
    lines = [checked(pipe, line, i, args.prompts) for i, line in enumerate(lines)]
    items = [Item(line["prompt"], index, c) for index, line in enumerate(lines) for c in range(args.n)]
    if args.prompts:
        paths = {item: layout.picture_path(out, item.index, item.candidate) for item in items}
    else:
        paths = {item: out / f"{item.index:05d}-{item.candidate:03d}.png" for item in items}
    model = pipe.identity()
    described = {item: describe(pipe, settings, item, model) for item in items}
    missing = [item for item in items if not is_there(paths[item], described[item])]
    batch_size = args.batch_size
    if batch_size is None:
        batch_size = BATCH_MINI if is_mini(pipe.text) else BATCH
    with progress_bar("sampling") as progress:
        pictures = pipe.sample(missing, settings, batch_size=batch_size, callback=progress)
        # All arguments are checked by now: what comes next is the first thing that is written.
        if args.prompts:
            layout.write_metadata(out, lines)
        else:
            out.mkdir(parents=True, exist_ok=True)
        for item, picture in pictures:
            save_png(picture, paths[item], described[item])
    kept = f", {len(items) - len(missing)} were there" if len(missing) < len(items) else ""
    print(f"{len(missing)} pictures written to {out}/{kept}")


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A callback for Pipeline.sample that draws a bar where standard error is a terminal."""
    with tqdm(desc=description, unit="step", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def checked(pipe: Pipeline, line: dict[str, Any], index: int, source: str | None) -> dict[str, Any]:
    """The metadata line, with what the prompt asks for where the mini model makes the picture and only a prompt was given.

    Raises:
        ValueError: an empty prompt, or one that the mini model's grammar does not have (DataError from a file).
    """
    prompt = line["prompt"]
    try:
        if not prompt.strip():
            raise ValueError("the prompt is empty; try: a red circle")
        if is_mini(pipe.text):
            asked = parse(prompt).metadata(prompt)
            pipe.text.check([prompt])
            return line if "include" in line else asked
        return line
    except ValueError as error:
        if source:
            raise DataError(f"{source}, prompt {index}: {error}") from None
        raise


def is_there(path: Path, expected: dict[str, Any]) -> bool:
    """Tells whether this very image is on disk already; a damaged file counts as missing and is made again.

    Raises:
        ValueError: a picture that was made with other settings.
    """
    if not path.exists():
        return False
    try:
        _, values = read_png(path)
    except DataError as error:
        _logger.info("%s is made again: %s", path, error)
        return False
    if values is None:
        raise ValueError(f"{path} was not made by sana15 sample; choose another --out")
    for name, value in expected.items():
        if name != "version" and values.get(name) != value:
            raise ValueError(f"{path} has {name} {values.get(name)!r}, now it is {value!r}; choose another --out")
    return True
