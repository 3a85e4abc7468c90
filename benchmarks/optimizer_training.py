"""Does CAME with an 8-bit first moment learn as CAME with an fp32 one does? The mini model's first steps, several seeds.

    python benchmarks/optimizer_training.py --out runs/optimizers          # 12 runs of 400 steps; resumable
    python benchmarks/optimizer_training.py --out runs/optimizers --plot docs/images/optimizers.png

Every optimizer sees the same batches, noise and initial weights for the same seed, so their losses are compared seed by
seed. Each run is `sana15 train`'s own, in a folder OUT/OPTIMIZER-SEED; a run that is done is not repeated.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from sana15.pipeline import MINI
from sana15.train import train
from sana15.train_config import load_config

#: lr and betas: AdamW's of configs/mini.yaml; CAME's betas from its paper, its rate the best of three tried with fp32.
SETTINGS = {
    "adamw": (1.5e-3, [0.9, 0.99]),
    "adamw8bit": (1.5e-3, [0.9, 0.99]),
    "came": (5e-4, [0.9, 0.999, 0.9999]),
    "came8bit": (5e-4, [0.9, 0.999, 0.9999]),
}
#: Of the steps, the last part over which the loss is averaged.
LAST = 0.25


def run(out: Path, optimizer: str, seed: int, args: argparse.Namespace) -> None:
    lr, betas = SETTINGS[optimizer]
    options = {
        "out": out / f"{optimizer}-{seed}", "optimizer": optimizer, "lr": args.lr or lr, "betas": betas, "seed": seed,
        "steps": args.steps, "batch_size": args.batch_size, "warmup": args.steps // 10, "precision": "bf16",
        "save_every": max(args.steps // 2, 1), "sample_every": 10 * args.steps, "sample_steps": 1, "log_every": 10,
        "ema": 0.99, "transformer.autoencoder": MINI / "vae", "transformer.text_encoder": MINI / "text_encoder",
        "transformer.flow_shift": 2.0, "transformer.compile": str(args.compile).lower(),
    }  # fmt: skip
    if not (out / f"{optimizer}-{seed}" / "export").exists():
        train(load_config(None, [f"{key}={value}" for key, value in options.items()]))


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def report(out: Path) -> str:
    """Markdown: final loss by seed, and the difference to fp32 CAME of the same seed against the spread over seeds."""
    final: dict[str, dict[int, float]] = {}
    for folder in sorted(out.glob("*-*")):
        if (folder / "export").exists():
            optimizer, _, seed = folder.name.rpartition("-")
            curve = losses(folder)
            last = [v for step, v in curve.items() if step > (1 - LAST) * max(curve)]
            final.setdefault(optimizer, {})[int(seed)] = statistics.fmean(last)
    lines = [
        "| optimizer | loss by seed | mean | standard deviation over seeds | minus fp32 CAME, by seed |",
        "|---" * 5 + "|",
    ]
    for optimizer, values in final.items():
        spread = statistics.stdev(values.values()) if len(values) > 1 else float("nan")
        cells = [
            ", ".join(f"{v:.4f}" for v in values.values()),
            f"{statistics.fmean(values.values()):.4f}",
            f"{spread:.4f}",
        ]
        base = final.get("came", {})
        cells.append(", ".join(f"{values[s] - base[s]:+.4f}" for s in values if s in base))
        lines.append(f"| {optimizer} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(out: Path, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for number, optimizer in enumerate(SETTINGS):
        for folder in sorted(out.glob(f"{optimizer}-*")):
            curve = losses(folder)
            label = optimizer if folder.name.endswith("-0") else None
            dashed = "--" if optimizer.endswith("8bit") else "-"
            axes.plot(list(curve), list(curve.values()), dashed, color=f"C{number}", linewidth=0.8, label=label)
    axes.set(xlabel="step", ylabel="flow loss, mean of 10 steps", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--optimizers", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, help="instead of each optimizer's own")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the model: pays from a few hundred steps on"
    )
    parser.add_argument("--plot", type=Path, help="a PNG of the loss curves")
    parser.add_argument("--smoke", action="store_true", help="two steps of one seed: that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.steps, args.batch_size, args.out = 1, 2, 2, Path(tempfile.mkdtemp())
    for seed in range(args.seeds):
        for optimizer in args.optimizers:
            run(args.out, optimizer, seed, args)
    print(report(args.out))
    if args.plot:
        plot(args.out, args.plot)


if __name__ == "__main__":
    main()
