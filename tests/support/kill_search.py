"""Kills a search at random moments, resumes it, and compares its folder with that of a run that was never killed.

PYTHONPATH=python python tests/support/kill_search.py --kills 200
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch

from sana15.sampling.pipeline import Pipeline
from sana15.scaling.run import search

PROMPTS = ["a red circle", "two stars", "a blue ring above a heart"]
POLICIES = {
    "best_of_n": {}, "tournament": {}, "halving": {}, "stop": {"stop_at": 2.0}, "bandit": {"budget": 60},
}  # fmt: skip


class Shade:
    """A judge that is quick and has an opinion on noise; no two pictures are equally grey."""

    name = "shade"

    def identity(self):
        return {"judge": self.name}

    def judge(self, pictures, line):
        from sana15.judges import Verdict

        return [Verdict(sum(i * n for i, n in enumerate(p.convert("L").histogram())) / 1e5) for p in pictures]


def run(pipe, out, policy):
    return search(
        pipe, PROMPTS, out=out, n=6, pick=2, judge=Shade(), policy=policy, steps=2, guidance=1.0, batch_size=2,
        **POLICIES[policy],
    )  # fmt: skip


def digest(folder):
    """Every file's name and bytes."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def killed(pipe, out, policy, after):
    """Whether the run was killed, `after` seconds from its start, before it was done."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            run(pipe, out, policy)
            status = 0
        finally:
            os._exit(status)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise AssertionError(f"the run failed: {out}")
    return os.WIFSIGNALED(status)


def kill_and_compare(pipe, folder, kills, seed, policies=tuple(POLICIES), report=lambda *_: None):
    """Number of kills before a run was done; AssertionError where a resumed folder differs."""
    rng, hits, rounds = random.Random(seed), 0, 0
    expected, duration = {}, {}
    for policy in policies:
        run(pipe, folder / "warm", policy)
        shutil.rmtree(folder / "warm")
        begin = time.monotonic()
        run(pipe, folder / policy, policy)
        duration[policy] = time.monotonic() - begin
        expected[policy] = digest(folder / policy)
    while hits < kills:
        policy = policies[rounds % len(policies)]
        out = folder / f"killed-{policy}"
        for _ in range(rng.randint(1, 4)):
            hits += killed(pipe, out, policy, rng.uniform(0, duration[policy]))
        run(pipe, out, policy)
        assert digest(out) == expected[policy], f"{out} differs from {folder / policy}"
        shutil.rmtree(out)
        rounds += 1
        report(hits, rounds)
    return hits


def main():
    from tiny_pipeline import make

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no worker threads
    folder = Path(tempfile.mkdtemp(prefix="kills"))
    pipe = Pipeline.from_pretrained(make(folder / "model"))
    hits = kill_and_compare(
        pipe,
        folder,
        args.kills,
        args.seed,
        report=lambda h, r: print(f"\r{h} kills, {r} resumed runs", end="", flush=True),
    )
    shutil.rmtree(folder)
    print(f"\n{hits} kills: every resumed run has the bytes of one that was never killed")


if __name__ == "__main__":
    main()
