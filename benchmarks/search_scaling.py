"""What search gains on the mini model: one picture picked of N by the learned judge, scored by the exact checker.

    python benchmarks/search_scaling.py --out out/scaling

Every eighth prompt of the test set gets 256 candidates, once; previews after a quarter and half of the steps are judged
on the way. The curve, `stop` and `halving` are then replayed on disjoint sets of these candidates (noise depends on seed,
prompt and candidate only), and a sixth of the prompts is searched for real beside it. Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sana15.files import replacing
from sana15.generator import PipelineGenerator
from sana15.geneval import read_prompts
from sana15.pipeline import Pipeline
from sana15.sampling import Sampling
from sana15.scaling.curve import OVERALL, Recorded, draw, markdown, picked_worth, read_run, scaling_curve, sets_of
from sana15.scaling.policies import POLICIES, Policy, calibrate_stop, stopped
from sana15.scaling.search import SearchResult, search
from sana15.scores import Score, means

SETS = 4  # disjoint sets of candidates per prompt, of the curve
JUDGE = "learned"
TOLERANCES = (0.01, 0.005, 0.0)  # what stopping may cost on the prompts that its threshold is calibrated on


def preview_steps(steps: int) -> list[int]:
    """Where halving looks."""
    return sorted({max(steps // 4, 1), max(steps // 2, 1)} - {steps})


def watch(searches, stop_at):  # type: ignore[no-untyped-def]
    """A policy that judges every preview and drops nothing: what halving would have seen, of all candidates."""
    for s in searches:
        s.race(range(s.n), [(step, s.n) for step in preview_steps(s.generator.steps)])
    return [s.ranked(s.made)[: s.pick] for s in searches]


def generate(args: argparse.Namespace, out: Path, shard: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    POLICIES["watch"] = Policy(watch, previews=True)

    def progress(done: int, total: int) -> None:
        print(f"shard {shard[0]}: {done} of {total} prompts", flush=True)

    search(
        Pipeline.from_pretrained(args.model), chosen_prompts(args), out=out, n=args.n, pick=1, judge=JUDGE, policy="watch",
        seed=args.seed, shard=shard, steps=args.steps, progress=progress,
    )  # fmt: skip


def chosen_prompts(args: argparse.Namespace) -> list[dict]:
    return read_prompts("test")[:: args.every]


def all_candidates(args: argparse.Namespace, out: Path) -> Recorded:
    shards = [(i, args.processes) for i in range(args.processes)]
    if args.processes == 1:
        generate(args, out, shards[0])
    else:
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=generate, args=(args, out, shard)) for shard in shards]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise SystemExit("a worker failed; the same command goes on where it was")
    return read_run(out)


def overall(values: NDArray[np.float64], tags: Sequence[str]) -> Score:
    """Mean of the categories, with the interval of a bootstrap over prompts; differences by prompt make it a paired one."""
    return means(values.tolist(), tags, [0] * len(tags), np.random.default_rng(0), 10_000)[OVERALL]


def shown(score: Score, sign: str = "") -> str:
    return f"{score.value:{sign}.3f} ({score.low:{sign}.3f} - {score.high:{sign}.3f})"


# stop


def stop_replayed(
    scores: NDArray[np.float64], worth: NDArray[np.float64], n: int, tolerance: float = TOLERANCES[0]
) -> tuple[list[float], NDArray[np.float64], NDArray[np.float64]]:
    """stop with at most n pictures, its threshold calibrated on the other half of the prompts to cost `tolerance` there.

    Args:
        scores, worth: [P, candidates].

    Returns:
        (the two thresholds, [P] worth of what is picked, [P] pictures made), the means over disjoint sets.
    """
    P = len(scores)
    sets = sets_of(scores.shape[1], n, scores.shape[1] // n)
    levels, value, made = [], np.zeros(P), np.zeros(P)
    for half in range(2):
        others, mine = np.arange(P) % 2 != half, np.flatnonzero(np.arange(P) % 2 == half)
        level, _ = calibrate_stop(
            np.concatenate([scores[others][:, s] for s in sets]),
            np.concatenate([worth[others][:, s] for s in sets]),
            tolerance=tolerance,
        )
        levels.append(level)
        for s in sets:
            count, chosen = stopped(scores[mine][:, s], level)
            value[mine] += worth[mine][:, s][np.arange(len(mine)), chosen] / len(sets)
            made[mine] += count / len(sets)
    return levels, value, made


def stop_table(recorded: Recorded, n: int) -> tuple[str, list[float]]:
    """Markdown, a row for each tolerance, and the thresholds of the first."""
    best = picked_worth(recorded.finished, recorded.worth, n, recorded.worth.shape[1] // n)
    lines = [
        f"Best of {n}: {shown(overall(best, recorded.tags))}.",
        "",
        f"| tolerance | threshold | stop | minus best of {n}, paired | pictures of stop |",
        "|---|---|---|---|---|",
    ]
    chosen: list[float] = []
    for tolerance in TOLERANCES:
        levels, value, made = stop_replayed(recorded.finished[0], recorded.worth, n, tolerance)
        chosen = chosen or levels
        used = overall(made, recorded.tags)
        lines.append(
            f"| {tolerance} | {levels[0]:.4f} / {levels[1]:.4f} | {shown(overall(value, recorded.tags))} | "
            f"{shown(overall(value - best, recorded.tags), '+')} | {used.value:.1f} ({used.low:.1f} - {used.high:.1f}), "
            f"{used.value / n:.0%} |"
        )
    return "\n".join(lines), chosen


# halving


def halving_replayed(previews: Sequence[NDArray[np.float64]], final: NDArray[np.float64]) -> NDArray[np.int64]:
    """[P] the candidate that halving picks: of each preview's scores [P, n] the better half goes on, the best final one is it."""
    chosen = []
    for p, finals in enumerate(final):
        alive = np.arange(len(finals))
        for scores in previews:
            order = np.argsort(-scores[p, alive], kind="stable")
            alive = np.sort(alive[order[: -(-len(alive) // 2)]])
        chosen.append(alive[finals[alive].argmax()])
    return np.array(chosen)


def halving_price(generator: PipelineGenerator, n: int) -> int:
    """Transformer evaluations plus judge calls of halving from n candidates down to one of a quarter."""
    price, done = 0, 0
    for step in [*preview_steps(generator.steps), generator.steps]:
        price += n * (generator.evaluations(done, step) + 1)
        n, done = -(-n // 2), step
    return price


def halving_table(recorded: Recorded, generator: PipelineGenerator, sizes: Sequence[int]) -> str:
    *early, last = sorted(recorded.scores)
    P, total = recorded.worth.shape
    lines = [
        "| halving from | units | best of n at that price | halving | best of n | difference, paired |",
        "|---|---|---|---|---|---|",
    ]
    for n in sizes:
        price = halving_price(generator, n)
        equal = min(price // (generator.evaluations(0, generator.steps) + 1), total)
        value = np.zeros(P)
        parts = sets_of(total, n, total // n)
        for s in parts:
            chosen = halving_replayed(
                [recorded.scores[step][0][:, s] for step in early], recorded.scores[last][0][:, s]
            )
            value += recorded.worth[:, s][np.arange(P), chosen] / len(parts)
        best = picked_worth(recorded.finished, recorded.worth, equal, total // max(n, equal))
        cells = [
            str(n),
            str(price),
            str(equal),
            shown(overall(value, recorded.tags)),
            shown(overall(best, recorded.tags)),
        ]
        lines.append("| " + " | ".join([*cells, shown(overall(value - best, recorded.tags), "+")]) + " |")
    return "\n".join(lines)


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Equal values share their ranks' mean."""
    below, equal = values[None] < values[:, None], values[None] == values[:, None]
    return below.sum(1) + (equal.sum(1) - 1) / 2


def correlation_table(recorded: Recorded) -> str:
    """How well a preview's score tells the finished picture's: over all pictures, and among a prompt's own."""
    final = recorded.finished[0]
    lines = [
        "| preview after | Pearson, all pictures | Spearman within a prompt, mean | prompts |",
        "|---|---|---|---|",
    ]
    for step in sorted(recorded.scores)[:-1]:
        early = recorded.scores[step][0]
        spread = [p for p in range(len(final)) if np.ptp(early[p]) > 0 and np.ptp(final[p]) > 0]
        within = [np.corrcoef(ranks(early[p]), ranks(final[p]))[0, 1] for p in spread]
        pearson = np.corrcoef(early.ravel(), final.ravel())[0, 1]
        lines.append(f"| {step} steps | {pearson:.3f} | {np.mean(within):.3f} | {len(spread)} |")
    return "\n".join(lines)


# The policies themselves


def real_table(args: argparse.Namespace, recorded: Recorded, out: Path, n: int, level: float) -> str:
    """Real searches of every sixth of the prompts: what they made and called, and whether they pick what the replay picks."""
    pipe, lines = Pipeline.from_pretrained(args.model), chosen_prompts(args)
    final = recorded.finished[0][:, :n]
    early = [recorded.scores[step][0][:, :n] for step in sorted(recorded.scores)[:-1]]
    replayed = {
        "best_of_n": final.argmax(1),
        "stop": stopped(final, level)[1],
        "halving": halving_replayed(early, final),
    }
    rows = [
        "| policy | prompts | pictures | evaluations | judge calls | same pick as the replay |",
        "|---|---|---|---|---|---|",
    ]
    for policy, expected in replayed.items():
        found: SearchResult = search(
            pipe, lines, out=out / policy, n=n, pick=1, judge=JUDGE, policy=policy, seed=args.seed, steps=args.steps,
            stop_at=level if policy == "stop" else None, shard=(0, min(6, len(lines))),
        )  # fmt: skip
        made = sum(f.made for f in found.found)
        same = sum(f.picked[0] == expected[f.index] for f in found.found)
        spent, prompts = found.spent, len(found.found)
        rows.append(
            f"| {policy} | {prompts} | {made} | {spent.evaluations} | {spent.judge_calls} | {same} of {prompts} |"
        )
        if policy != "halving" and spent.judge_calls != made:
            raise SystemExit(f"{policy}: {spent.judge_calls} judge calls for {made} pictures")
    return "\n".join(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out/scaling", metavar="DIR", help="default out/scaling")
    parser.add_argument("--model", default="mini", metavar="DIR")
    parser.add_argument("--every", type=int, default=8, help="every how many prompts of the test set (default 8: 61)")
    parser.add_argument("--n", type=int, default=256, help="candidates per prompt (default 256)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="each works on its share of prompts")
    parser.add_argument("--smoke", action="store_true", help="a few prompts, steps and candidates: does it run?")
    args = parser.parse_args()
    if args.smoke:
        args.every, args.n, args.steps, args.processes = 80, 16, 4, 1
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        measure(args, Path(temporary if args.smoke else args.out))


def measure(args: argparse.Namespace, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    recorded = all_candidates(args, out / "run")
    prompts, n = recorded.worth.shape
    counts = [count for count in (1, 4, 16, 64) if count * SETS <= n]
    cap, sizes = min(32, n // 2), [size for size in (8, 16, 32, 64) if size <= n // 2]
    curve = scaling_curve(recorded, counts, SETS)
    draw(curve, out / "search_scaling.png")
    few, many = (picked_worth(recorded.finished, recorded.worth, count, SETS) for count in (counts[0], counts[-1]))
    stopping, levels = stop_table(recorded, cap)
    pipe = Pipeline.from_pretrained(args.model)
    generator = PipelineGenerator(pipe, Sampling(steps=args.steps))
    sections = [
        f"{prompts} prompts (every {args.every}th of the test set), {n} candidates each, {args.steps} steps, seed {args.seed}, "
        f"model {pipe.identity()['sha256'][:10]}, torch {torch.__version__}. Intervals: 95 %, bootstrap over prompts.",
        f"Pick 1 of N, mean over {SETS} disjoint sets of candidates per prompt:\n\n{markdown(curve)}",
        f"From 1 to {counts[-1]} pictures, paired: {shown(overall(many - few, recorded.tags), '+')}.",
        f"Stopping, the threshold calibrated on the other half of the prompts:\n\n{stopping}",
        f"Halving at equal budget (transformer evaluations and judge calls):\n\n{halving_table(recorded, generator, sizes)}",
        f"Scores of previews and of finished pictures:\n\n{correlation_table(recorded)}",
        f"The policies run for real, at most {cap} candidates:\n\n{real_table(args, recorded, out, cap, levels[0])}",
    ]
    text = "\n\n".join(sections) + "\n"
    print(f"\n{text}\nwritten: {out}/search_scaling.png and {out}/search_scaling.md")
    with replacing(out / "search_scaling.md") as partial:
        partial.write_text(text, encoding="utf-8")
    with replacing(out / "search_scaling.json") as partial:
        partial.write_text(json.dumps({name: {row: [vars(s) for s in points] for row, points in rows.items()}
                                       for name, rows in curve.scores.items()}) + "\n", encoding="utf-8")  # fmt: skip


if __name__ == "__main__":
    main()
