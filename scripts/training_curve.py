"""Draws metrics.jsonl of a training run: `python scripts/training_curve.py runs/mini docs/images/mini_training.png`.

Left the loss (mean of each logged interval) and the learning rate, right the scores of the samples by category. Needs
matplotlib (extra [dev]).
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(run: Path, picture: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    scores = [line for line in lines if "score" in line]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot([line["step"] for line in losses], [line["loss"] for line in losses], linewidth=0.8)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    rate = left.twinx()
    rate.plot([line["step"] for line in losses], [line["lr"] for line in losses], "--", color="gray", linewidth=0.8)
    rate.set(ylabel="learning rate (dashed)", ylim=(0, None))
    for name in scores[0] if scores else []:
        if name.startswith("score"):
            wide = 2.0 if name == "score" else 0.9
            label = name.removeprefix("score_").replace("_", " ") if name != "score" else "mean"
            right.plot([s["step"] for s in scores], [s[name] for s in scores], "o-", ms=2, linewidth=wide, label=label)
    right.set(xlabel="step", ylabel="checker: part of pictures correct", ylim=(0, 1))
    right.legend(fontsize=7)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/training_curve.py RUN PICTURE.png")
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
