"""Kills a training run before its n-th change of a file, runs the same command again, and compares with a run never killed.

PYTHONPATH=python:tests/support python tests/support/kill_train.py --every 1
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from sana15.training.config import load_config
from sana15.training.run import train

OPTIONS = [
    "task=text", "text.width=16", "text.heads=2", "text.passes=1", "batch_size=2", "warmup=1", "workers=0", "device=cpu",
    "steps=4", "save_every=2", "sample_every=2", "log_every=1", "keep=1",
]  # fmt: skip
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "open")


def run(out):
    return train(load_config(None, [*OPTIONS, f"out={out}"]))


def kill_before(out, number):
    """From now on this process dies before it changes a file below `out` for the `number`-th time."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event not in CHANGES or str(out) not in str(arguments[0]):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed(out, number):
    """Whether the run was killed before its change of that number; else it is done."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            kill_before(out, number)
            run(out)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise AssertionError(f"the run failed: {out}")
    return os.WIFSIGNALED(status)


def result(out):
    """Everything that must not depend on a kill: metrics but for the speed, weights of checkpoint and export, names of files."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_s", None)
    tensors = {}
    for path in sorted(out.rglob("*.safetensors")):
        stored = load_file(path)
        tensors[str(path.relative_to(out))] = {name: tensor.tolist() for name, tensor in stored.items()}
    names = sorted(p.name for p in out.iterdir())
    return lines, tensors, names


def kill_and_compare(folder, numbers, report=lambda *_: None):
    """How many of the numbers were reached; AssertionError where the same command does not end in the same result."""
    run(folder / "straight")
    expected, reached = result(folder / "straight"), 0
    for number in numbers:
        out = folder / f"killed-{number}"
        if not killed(out, number):
            break
        reached += 1
        run(out)
        found = result(out)
        for what, a, b in zip(("metrics", "weights", "files"), expected, found):
            shown = "" if what == "weights" else f": {a}, {b}"
            assert a == b, f"killed before change {number}, other {what}{shown}"
        report(number)
    return reached


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="kill before every N-th change (default 1)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no worker threads
    with tempfile.TemporaryDirectory(prefix="kills") as folder:
        reached = kill_and_compare(
            Path(folder), range(1, 10_000, args.every), lambda n: print(f"\rchange {n}", end="", flush=True)
        )
    print(f"\n{reached} kills: the same command ends in the same checkpoint, export and metrics")


if __name__ == "__main__":
    main()
