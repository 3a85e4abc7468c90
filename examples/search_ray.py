"""A search on many machines by Ray Data: each worker loads the model once and works on shards of one folder that all share.

    pip install 'ray[data]'
    python examples/search_ray.py --prompts test --n 32 --out /shared/search --workers 8 --shards 64

`--address auto` joins a cluster that is running; without it, Ray starts here. A shard that dies with its machine is begun
again by Ray and resumes from its ledger; so does the same command after anything else. The candidates, and with them what
each prompt gets, are those of a search without shards: noise depends on seed, prompt and candidate only. (Of `bandit` and
of budgets each shard has its own part.)
"""

from __future__ import annotations

import argparse
from typing import Any

import ray
import ray.data


class Shards:
    """A worker: the pipeline, and what it does with a batch of shard numbers."""

    def __init__(self, model: str, prompts: str, shards: int, options: dict[str, Any]) -> None:
        from sana15 import Pipeline
        from sana15.evaluation.layout import read_prompts

        self.pipe, self.lines = Pipeline.from_pretrained(model), read_prompts(prompts)
        self.shards, self.options = shards, options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from sana15 import search

        rows: dict[str, list[int]] = {"shard": [], "prompts": [], "pictures": [], "units": [], "unjudged": []}
        for shard in map(int, batch["shard"]):
            result = search(self.pipe, self.lines, shard=(shard, self.shards), **self.options)
            made = sum(found.made for found in result.found)
            row = (shard, len(result.found), made, result.spent.total, len(result.unjudged))
            for name, value in zip(rows, row):
                rows[name].append(value)
        return rows


def run(
    model: str, prompts: str, shards: int, workers: int, cpus: float = 1, gpus: float = 0, **options: Any
) -> list[dict[str, int]]:
    """One row for each shard, in order. options: of sana15.search, `out` a folder that every machine sees."""
    # The numbers are there from the start: to read them would take a CPU, and the workers may hold all of them.
    found = ray.data.from_items([{"shard": i} for i in range(shards)], override_num_blocks=shards).map_batches(
        Shards, batch_size=1, compute=ray.data.ActorPoolStrategy(size=workers), num_cpus=cpus, num_gpus=gpus,
        fn_constructor_args=(model, prompts, shards, options),
    )  # fmt: skip
    return sorted(found.take_all(), key=lambda row: row["shard"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", required=True, help='a file, or "test"')
    parser.add_argument("--out", required=True, help="a folder that every machine sees by this name")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--pick", type=int, default=4)
    parser.add_argument("--judge", default="learned")
    parser.add_argument("--policy", default="best_of_n")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shards", type=int, default=8, help="several for each worker, at most one for each prompt")
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    parser.add_argument("--address", help="of a running cluster; default: start Ray here")
    args = parser.parse_args()
    ray.init(address=args.address, include_dashboard=False if args.address is None else None)
    rows = run(
        args.model, args.prompts, args.shards, args.workers, gpus=args.gpus, out=args.out, n=args.n, pick=args.pick,
        judge=args.judge, policy=args.policy, seed=args.seed, steps=args.steps,
    )  # fmt: skip
    total = {name: sum(row[name] for row in rows) for name in ("prompts", "pictures", "units", "unjudged")}
    print(", ".join(f"{value:,} {name}" for name, value in total.items()) + f": {args.out}/picks/")
    if total["unjudged"]:
        raise SystemExit(4)


if __name__ == "__main__":
    main()
