"""What depth pruning costs the mini model, and how much of it a short healing brings back.

    python benchmarks/pruning_quality.py --out out/pruning

12 blocks to 8, 6 and 4 by each strategy; per seed (of calibration, choice and healing) the exact checker's score before
pruning, after it and after 100 steps of healing, on the same prompts and noise. A cell (strategy, depth, seed) is one
JSON file in OUT; what is there is not run again, so cells can be run in pieces and in any order, and one without its
"healed" has the same blocks healed anew. OUT/options.json holds what all cells of an OUT have in common.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sana15.config import SanaConfig
from sana15.device import DEVICES, resolved
from sana15.files import replacing
from sana15.healing import DISTILL, LR, LR_LIMIT, PLAIN_PART, Healing
from sana15.importance import Importance, block_importance
from sana15.pipeline import MINI, Pipeline
from sana15.pruning import STRATEGIES, choose
from sana15.pruning_files import prune_folder
from sana15.scenes.checker import check
from sana15.scenes.testset import load
from sana15.trajectory import calibration, calibration_prompts

DRAWS = 2000
COMMON = ("every", "n", "steps", "count")  # options that cells of one report must share, beside the healing's


def chosen_prompts(every: int) -> list[dict[str, Any]]:
    return load()[::every]


def worth(folder: Path, args: argparse.Namespace) -> list[float]:
    """Of every prompt, the part of its pictures that the exact checker accepts."""
    entries = chosen_prompts(args.every)
    made = Pipeline.from_pretrained(folder, device=args.device)(
        [e["prompt"] for e in entries], n=args.n, seed=777, steps=args.steps, batch_size=64
    )
    return [float(np.mean([check(np.asarray(p), e).correct for p in pictures])) for e, pictures in zip(entries, made)]


def chosen(out: Path, by: str, keep: int, seed: int, args: argparse.Namespace) -> list[int]:
    """The blocks that stay. Importance and loss of a seed are measured once, for all depths; so is the search."""
    order = out / f"searched-{seed}.json"
    if by == "search" and order.exists():
        removed = json.loads(order.read_text())
        if len(removed) >= (layers := SanaConfig.load(MINI / "transformer").num_layers) - keep:
            return sorted(set(range(layers)) - set(removed[: layers - keep]))
    pipe = Pipeline.from_pretrained(MINI, device=args.device)
    prompts = calibration_prompts(pipe, None, args.count, seed)
    batches = calibration(pipe, prompts, steps=args.steps, seed=seed)
    if by in ("importance", "loss"):
        path = out / f"measured-{seed}.json"
        if not path.exists():
            block_importance(pipe.transformer, batches).save(path)
        return choose(None, pipe.config.num_layers, keep, by, importance=Importance.load(path)).kept
    choice = choose(
        pipe.transformer, pipe.config.num_layers, keep, by, batches=batches, seed=seed, flow_shift=pipe.flow_shift
    )
    if by == "search":
        with replacing(order) as partial:
            partial.write_text(json.dumps(choice.removed) + "\n")
    return choice.kept


def cell(out: Path, by: str, keep: int, seed: int, args: argparse.Namespace) -> None:
    path = out / f"{by}-{keep}-{seed}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "healed" in result:
        return
    if "kept" not in result:
        result["kept"] = chosen(out, by, keep, seed, args)
    kept = result["kept"]
    work = Path(tempfile.mkdtemp(dir=out, prefix=f"{by}-{keep}-{seed}-"))
    try:
        for name, heal in (("pruned", None), ("healed", Healing(args.heal, seed=seed, distill=args.distill))):
            if name not in result:
                prune_folder("mini", work / name, by="indices", indices=kept, heal=heal, device=args.device)
                result[name] = worth(work / name, args)
                with replacing(path) as partial:
                    partial.write_text(json.dumps(result) + "\n")
    finally:
        shutil.rmtree(work)
    print(f"{path.name}: kept {' '.join(map(str, kept))}", flush=True)


def claim(out: Path, args: argparse.Namespace) -> None:
    """Writes down the options of OUT's cells; SystemExit where it holds those of others."""
    path, ours = out / "options.json", {name: getattr(args, name) for name in COMMON}
    healing = dataclasses.asdict(Healing(args.heal, distill=args.distill)) | {"rates": [LR, LR_LIMIT, PLAIN_PART]}
    ours |= {f"heal_{name}": value for name, value in healing.items()}
    if not path.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} holds something else: there is no {path.name}; another --out")
    theirs = json.loads(path.read_text()) if path.exists() else ours
    if theirs != ours:
        name = next(name for name in ours if theirs.get(name) != ours[name])
        raise SystemExit(f"{out} holds cells with {name} {theirs.get(name)}, now it is {ours[name]}; another --out")
    with replacing(path) as partial:
        partial.write_text(json.dumps(ours) + "\n")


def overall(values: NDArray[np.float64], tags: Sequence[str]) -> NDArray[np.float64]:
    """The mean of the categories' means over the last axis."""
    kinds = np.array(tags)
    return np.mean([values[..., kinds == tag].mean(-1) for tag in dict.fromkeys(tags)], axis=0)


def recovered(
    whole: NDArray[np.float64], pruned: NDArray[np.float64], healed: NDArray[np.float64], tags: Sequence[str]
) -> dict[str, tuple[float, float, float]]:
    """Values with 95 % intervals of a bootstrap that draws prompts within their categories, and seeds.

    Args:
        whole: [P] worth of each prompt before pruning. pruned, healed: [seeds, P].

    Returns:
        "pruned", "healed": scores; "lost": before minus pruned; "recovered": (healed - pruned) / (before - pruned).
    """
    rng = np.random.default_rng(0)
    kinds, found = np.array(tags), []
    for draw in range(DRAWS + 1):
        seeds, rows = np.arange(len(pruned)), np.arange(len(tags))
        if draw:
            seeds = rng.integers(len(pruned), size=len(pruned))
            rows = np.concatenate(
                [rng.choice(np.flatnonzero(kinds == t), (kinds == t).sum()) for t in dict.fromkeys(tags)]
            )
        drawn = [tags[i] for i in rows]
        before = float(overall(whole[rows], drawn))
        after, again = (float(overall(x[seeds][:, rows].mean(0), drawn)) for x in (pruned, healed))
        lost = before - after
        found.append((after, again, lost, (again - after) / lost if lost else np.nan))
    table = np.array(found)
    low, high = np.nanquantile(table[1:], [0.025, 0.975], axis=0)
    names = ("pruned", "healed", "lost", "recovered")
    return {name: (float(table[0, i]), float(low[i]), float(high[i])) for i, name in enumerate(names)}


def report(out: Path, args: argparse.Namespace) -> str:
    tags = [e["tag"] for e in chosen_prompts(args.every)]
    whole = np.array(json.loads((out / "whole.json").read_text()))
    lines = [
        f"{len(tags)} prompts (every {args.every}th of the test set), {args.n} pictures each, {args.steps} steps; healing: "
        f"{args.heal} steps, distillation {args.distill:g}. Before pruning: {overall(whole, tags):.3f}.",
        "",
        "| blocks | by | seeds | pruned | healed | lost | part of it recovered |",
        "|---" * 7 + "|",
    ]
    for keep in args.keep:
        for by in args.by:
            cells = [json.loads(p.read_text()) for p in sorted(out.glob(f"{by}-{keep}-*.json"))]
            cells = [c for c in cells if "healed" in c]
            if not cells:
                continue
            numbers = recovered(whole, *(np.array([c[k] for c in cells]) for k in ("pruned", "healed")), tags)
            shown = " | ".join(f"{v:.3f} ({a:.3f} - {b:.3f})" for v, a, b in numbers.values())
            lines.append(f"| {keep} | {by} | {len(cells)} | {shown} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    strategies = [s for s in STRATEGIES if s != "indices"]
    parser.add_argument("--out", type=Path, default=Path("out/pruning"))
    parser.add_argument("--by", nargs="+", choices=strategies, default=strategies)
    parser.add_argument("--keep", nargs="+", type=int, default=[8, 6, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--every", type=int, default=5, help="every Nth prompt of the test set")
    parser.add_argument("--n", type=int, default=2, help="pictures per prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--count", type=int, default=100, help="calibration prompts")
    parser.add_argument("--heal", type=int, default=100, help="steps of healing")
    parser.add_argument(
        "--distill",
        type=float,
        default=DISTILL,
        help="weight of distillation in healing; another OUT for another weight",
    )
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument(
        "--smoke", action="store_true", help="one cell of each strategy, little of everything: does it run?"
    )
    args = parser.parse_args(arguments)
    if args.smoke:
        args.out, args.keep, args.seeds = Path(tempfile.mkdtemp()), [8], [0]
        args.by, args.every, args.n, args.steps, args.count, args.heal = ["importance", "loss"], 60, 1, 2, 2, 1
    args.device = resolved(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    claim(args.out, args)
    whole = args.out / "whole.json"
    if not whole.exists():
        values = worth(MINI, args)
        with replacing(whole) as partial:
            partial.write_text(json.dumps(values) + "\n")
    for seed in args.seeds:
        for by in args.by:
            for keep in sorted(args.keep):  # the deepest search first: the others are on its way
                cell(args.out, by, keep, seed, args)
    print(report(args.out, args))


if __name__ == "__main__":
    main()
