"""Measures what search gains on the mini model: one image picked of N by the learned judge, scored by the exact checker.

Some prompts of the test set get many candidates, once; previews after a quarter and half of the steps are judged on the
way. The curve, `stop` and `halving` are then replayed on disjoint sets of these candidates, and a part of the prompts is
searched for real beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..evaluation.layout import read_prompts
from ..sampling.pipeline import Pipeline, PipelineGenerator
from ..sampling.settings import Sampling
from ..scaling.curve import draw, markdown, picked_worth, read_run, scaling_curve
from ..scaling.policies import POLICIES, Policy, stopped
from ..scaling.run import search
from .grid import Cell, Experiment, Place, Report, Results
from .replay import (
    correlation_table,
    halving_replayed,
    halving_table,
    overall,
    preview_steps,
    shown,
    stop_table,
)

SETS = 4  # disjoint sets of candidates per prompt, of the curve
JUDGE = "learned"
REAL = ("best_of_n", "stop", "halving")


@dataclass(frozen=True)
class Options:
    """Sizes of the experiment.

    Attributes:
        every: every how many prompts of the test set. n: candidates per prompt. real: prompts that are searched for real.
    """

    every: int = 8
    n: int = 256
    steps: int = 20
    seed: int = 777
    real: int = 10

    @property
    def cap(self) -> int:
        """Most candidates of stopping and of the real searches."""
        return min(32, self.n // 2)


BUDGETS = {
    "smoke": Options(every=80, n=16, steps=4, real=2),
    "small": Options(every=32, n=64),
    "full": Options(),
}


def prompts(options: Options) -> list[dict[str, Any]]:
    return read_prompts("test")[:: options.every]


def watch(searches: Sequence[Any], stop_at: float | None) -> list[Any]:
    """Judges every preview and drops nothing: a policy that sees what halving would have seen, of all candidates."""
    for s in searches:
        s.race(range(s.n), [(step, s.n) for step in preview_steps(s.generator.steps)])
    return [s.ranked(s.made)[: s.pick] for s in searches]


def candidates(place: Place, options: Options, prompt: int, of: int) -> dict[str, Any]:
    """Makes and judges all candidates of one prompt, a shard of one search."""
    POLICIES["watch"] = Policy(watch, previews=True)
    try:
        found = search(
            Pipeline.from_pretrained("mini", device=place.device), prompts(options), out=place.folder / "run",
            n=options.n, pick=1, judge=JUDGE, policy="watch", seed=options.seed, shard=(prompt, of), steps=options.steps,
        )  # fmt: skip
    finally:
        del POLICIES["watch"]
    return {"prompt": prompt, "spent": found.spent.total}


def searched(place: Place, options: Options, policy: str) -> dict[str, Any]:
    """Searches some prompts for real: what was made and called, and whether the replay picks the same."""
    recorded = read_run(place.folder / "run")
    final = recorded.finished[0][:, : options.cap]
    early = [recorded.scores[step][0][:, : options.cap] for step in sorted(recorded.scores)[:-1]]
    level = stop_table(recorded, options.cap)[1][0]
    expected = {
        "best_of_n": lambda: final.argmax(1),
        "stop": lambda: stopped(final, level)[1],
        "halving": lambda: halving_replayed(early, final),
    }[policy]()
    lines = prompts(options)
    share = max(len(lines) // options.real, 1)
    found = search(
        Pipeline.from_pretrained("mini", device=place.device), lines, out=place.folder / policy, n=options.cap, pick=1,
        judge=JUDGE, policy=policy, seed=options.seed, steps=options.steps, stop_at=level if policy == "stop" else None,
        shard=(0, share),
    )  # fmt: skip
    made = sum(f.made for f in found.found)
    if policy != "halving" and found.spent.judge_calls != made:
        raise ValueError(f"{policy}: {found.spent.judge_calls} judge calls for {made} images")
    return {
        "prompts": len(found.found), "images": made, "evaluations": found.spent.evaluations,
        "judge_calls": found.spent.judge_calls,
        "same": sum(int(f.picked[0] == expected[f.index]) for f in found.found),
    }  # fmt: skip


def cells(options: Options) -> list[Cell]:
    number = len(prompts(options))
    made = [
        Cell(f"candidates-{i:03d}", partial(candidates, options=options, prompt=i, of=number)) for i in range(number)
    ]
    after = tuple(cell.name for cell in made)
    return made + [Cell(f"real-{policy}", partial(searched, options=options, policy=policy), after) for policy in REAL]


def report(options: Options, results: Results, folder: Path) -> Report:
    number = len(prompts(options))
    there = sum(name.startswith("candidates") for name in results)
    if there < number:
        return Report(f"The candidates of {there} of {number} prompts are there; the tables need all.")
    recorded = read_run(folder / "run")
    n = options.n
    counts = [count for count in (1, 4, 16, 64) if count * SETS <= n]
    sizes = [size for size in (8, 16, 32, 64) if size <= n // 2]
    curve = scaling_curve(recorded, counts, SETS)
    few, many = (picked_worth(recorded.finished, recorded.worth, count, SETS) for count in (counts[0], counts[-1]))
    pipe = Pipeline.from_pretrained("mini")
    generator = PipelineGenerator(pipe, Sampling(steps=options.steps))
    sections = [
        f"{number} prompts (every {options.every}th of the test set), {n} candidates each, {options.steps} steps, seed "
        f"{options.seed}, model {pipe.identity()['sha256'][:10]}. Intervals: 95 %, bootstrap over prompts.",
        f"One image of N, mean over {SETS} disjoint sets of candidates per prompt:\n\n{markdown(curve)}",
        f"From 1 to {counts[-1]} images, paired: {shown(overall(many - few, recorded.tags), '+')}.",
        "Stopping, the threshold calibrated on the other half of the prompts:\n\n"
        + stop_table(recorded, options.cap)[0],
        "Halving at equal budget (transformer evaluations and judge calls):\n\n"
        + halving_table(recorded, generator, sizes),
        f"Scores of previews and of finished images:\n\n{correlation_table(recorded)}",
        f"The policies run for real, at most {options.cap} candidates:\n\n{_real_table(results)}",
    ]
    return Report("\n\n".join(sections), partial(draw, curve))


def _real_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        "| policy | prompts | images | evaluations | judge calls | same pick as the replay |",
        "|---|---|---|---|---|---|",
    ]
    for policy in REAL:
        if r := results.get(f"real-{policy}"):
            rows.append(
                f"| {policy} | {r['prompts']} | {r['images']} | {r['evaluations']} | {r['judge_calls']} | "
                f"{r['same']} of {r['prompts']} |"
            )
    return "\n".join(rows)


EXPERIMENT = Experiment("scaling", BUDGETS, cells, report)
