"""`sana15 search`."""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path

from tqdm import tqdm

from ..device import resolved
from ..evaluation.layout import read_prompts
from ..evaluation.sample import checked, settings_of
from ..judges import check_name, check_patience
from ..sampling.pipeline import Pipeline, check_folder_size
from ..storage.files import replacing
from .run import SearchResult, check_options, check_shard, search
from .sheet import candidate_grid, scored

_logger = logging.getLogger(__name__)
UNJUDGED = 4  # exit code


def run(args: argparse.Namespace) -> int:
    shard = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if shard is None:
        raise ValueError(f"--shard must be I/N, such as 0/4, got {args.shard}")
    lines = read_prompts(args.prompts)
    settings = vars(settings_of(args))
    names = args.judge or ["learned"]
    check_options(args.n, args.pick, args.policy, args.stop_at, len(names))
    for name in names:
        check_name(name)
    check_patience(args.attempts, args.timeout)
    check_shard(int(shard[1]), int(shard[2]), len(lines))
    check_folder_size(args.model, args.height, args.width)
    pipe = Pipeline.from_pretrained(args.model, device=resolved(args.device))
    lines = [checked(pipe, line, i, args.prompts) for i, line in enumerate(lines)]
    with tqdm(desc="searching", unit="prompt", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = search(
            pipe, lines, out=args.out, n=args.n, pick=args.pick, judge=names, policy=args.policy,
            budget=args.budget, batch_size=args.batch_size, stop_at=args.stop_at,
            shard=(int(shard[1]), int(shard[2])), attempts=args.attempts, timeout=args.timeout, progress=progress,
            **settings,
        )  # fmt: skip
    print(summary(result, args.budget, Path(args.out)))
    grid = Path(args.out) / f"grid-{int(shard[1]):03d}-of-{int(shard[2]):03d}.png"
    if tiles := scored(result):
        with replacing(grid) as partial:
            candidate_grid(tiles).save(partial, format="PNG")
        print(f"{grid} shows the first prompts' candidates, sorted by score")
    for index, reason in result.unjudged:
        _logger.warning("sana15 search: prompt %d is unjudged: %s", index, reason)
    return UNJUDGED if result.unjudged else 0


def summary(result: SearchResult, budget: int | None, out: Path) -> str:
    spent, made = result.spent, sum(f.made for f in result.found)
    limit = "" if budget is None else f" of {budget:,}"
    retries = f", {result.retries} calls repeated" if result.retries else ""
    unjudged = f", {len(result.unjudged)} unjudged" if result.unjudged else ""
    return (
        f"{len(result.found)} prompts{unjudged}, {made:,} pictures, {sum(len(f.picked) for f in result.found):,} picked: {out}/picks/\n"
        f"spent {spent.total:,}{limit} units: {spent.evaluations:,} transformer evaluations, {spent.judge_calls:,} judge calls{retries}"
    )
