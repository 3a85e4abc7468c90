"""How a grown mini model trains on: every strategy's loss at the start and after some steps, beside two controls.

    python benchmarks/growth_training.py --out out/growth

12 blocks to 18; `source` trains on with its 12, `scratch` starts with 18 blocks of random weights (autoencoder and text
encoder are the mini model's everywhere). All arms of a seed see the same pictures, prompts, noise and noise levels. The
optimizer is AdamW, as in configs/mini.yaml: the first some hundred steps of CAME are many times its rate, which would
spoil a model that is trained already. Rates are constant and not tuned by arm, so that arms compare by their starts. The
loss is the flow loss of rendered scenes that no run trains on, with the averaged weights. A cell (arm, seed) is one JSON
file in OUT with its options; what is there is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from sana15 import flow
from sana15.checkpoint import save_transformer
from sana15.config import SanaConfig
from sana15.data import SceneBatches
from sana15.device import DEVICES, resolved
from sana15.files import replacing
from sana15.growth_files import grow_folder
from sana15.model import SanaTransformer
from sana15.pipeline import MINI, Pipeline
from sana15.train import train
from sana15.train_config import TrainConfig, TransformerConfig
from sana15.train_tasks import initialise

#: Arm -> arguments of growth; None: no growth.
ARMS: dict[str, dict[str, object] | None] = {
    "source": None,
    "partial_preservation, keep 12": {"strategy": "partial_preservation", "keep": 12},
    "partial_preservation, keep 10": {"strategy": "partial_preservation", "keep": 10},  # the paper drops the last two
    "interleave": {"strategy": "interleave"},
    "cyclic": {"strategy": "cyclic"},
    "block_replication": {"strategy": "block_replication"},
    "stack": {"strategy": "stack"},
    "scratch": None,
}
HELD_OUT = 987_654_321  # seed of the pictures and noise that judge
SCRATCH_LR = 1.5e-3  # of configs/mini.yaml
#: What cells of one report have in common.
COMMON = ("layers", "at", "batch", "warmup", "lr", "judged")


@torch.no_grad()
def held_out_loss(folder: Path, args: argparse.Namespace) -> float:
    """Mean flow loss with text of the model in a pipeline folder."""
    pipe = Pipeline.from_pretrained(folder, device=args.device)
    batches = SceneBatches(HELD_OUT, 64, args.judged // 64)
    losses = []
    for batch in (batches[i] for i in range(len(batches))):
        generator = torch.Generator().manual_seed(HELD_OUT + batch.step)
        x0 = pipe.autoencoder.encode(batch.pictures.to(pipe.device))
        text, mask = pipe.text.encode(batch.prompts)
        noise = torch.randn(x0.shape, generator=generator).to(pipe.device)
        sigma = flow.sample_sigmas(len(x0), generator, flow_shift=pipe.flow_shift, stratified=True).to(pipe.device)

        def velocity(
            x: torch.Tensor, t: torch.Tensor, text: torch.Tensor = text, mask: torch.Tensor = mask
        ) -> torch.Tensor:
            return pipe.transformer(x, text, t, mask)

        losses.append(flow.loss(velocity, x0, noise, sigma))
    return torch.cat(losses).mean().item()


def start(folder: Path, arm: str, layers: int, seed: int) -> None:
    """The pipeline folder that an arm's training starts from."""
    growth = ARMS[arm]
    if growth is not None:
        grow_folder("mini", folder, layers=layers, seed=seed, **growth)  # type: ignore[arg-type]
        return
    shutil.copytree(MINI, folder)
    if arm == "scratch":
        torch.manual_seed(seed)
        model = SanaTransformer(dataclasses.replace(SanaConfig.load(MINI / "transformer"), num_layers=layers))
        initialise(model)
        shutil.rmtree(folder / "transformer")
        save_transformer(model, folder / "transformer")


def cell(out: Path, arm: str, seed: int, args: argparse.Namespace) -> None:
    path = out / f"{arm.replace(', ', '-').replace(' ', '')}-{seed}.json"
    options = {name: getattr(args, name) for name in COMMON}
    if path.exists():
        if json.loads(path.read_text())["options"] != options:
            raise SystemExit(f"{path} was made with other options; another --out")
        return
    losses = {}
    with tempfile.TemporaryDirectory(dir=out) as work:
        folder = Path(work, "start")
        start(folder, arm, args.layers, seed)
        losses[0] = held_out_loss(folder, args)
        transformer = TransformerConfig(
            autoencoder=str(folder / "vae"), text_encoder=str(folder / "text_encoder"), start=str(folder),
            flow_shift=Pipeline.from_pretrained(folder).flow_shift, export="fp32",
        )  # fmt: skip
        for steps in args.at:  # each resumes the one before
            made = train(TrainConfig(
                out=f"{work}/run", seed=seed, steps=steps, batch_size=args.batch, warmup=args.warmup, ema=0.95,
                lr=rate(arm, args), precision="bf16", device=args.device, save_every=steps, keep=1, sample_every=10**9, sample_steps=1,
                transformer=transformer,
            ))  # fmt: skip
            losses[steps] = held_out_loss(made, args)
    with replacing(path) as partial:
        partial.write_text(json.dumps({"arm": arm, "seed": seed, "options": options, "losses": losses}) + "\n")
    print(f"{path.name}: {losses}", flush=True)


def rate(arm: str, args: argparse.Namespace) -> float:
    return SCRATCH_LR if arm == "scratch" else args.lr


def report(out: Path, args: argparse.Namespace) -> str:
    """Means over seeds, and the largest distance of a seed from its mean."""
    cells = [json.loads(p.read_text()) for p in sorted(out.glob("*.json"))]
    marks = [0, *args.at]
    lines = [
        f"Flow loss of {args.judged} held-out scenes; AdamW, batch {args.batch}.",
        "",
        "| start | blocks | rate | seeds | " + " | ".join(f"{m} steps" for m in marks) + " |",
        "|---" * (4 + len(marks)) + "|",
    ]
    for arm in args.arms:
        runs = [c["losses"] for c in cells if c["arm"] == arm]
        if runs:
            columns = [[run[str(m)] for run in runs] for m in marks]
            means = [statistics.mean(c) for c in columns]
            shown = [f"{m:.4f} ± {max(abs(v - m) for v in c):.4f}" for m, c in zip(means, columns)]
            blocks = SanaConfig.load(MINI / "transformer").num_layers if arm == "source" else args.layers
            lines.append(f"| {arm} | {blocks} | {rate(arm, args):g} | {len(runs)} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/growth"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--at", nargs="+", type=int, default=[50, 100, 200], help="steps at which the loss is taken")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-4, help=f"of all arms but scratch, which takes {SCRATCH_LR:g}")
    parser.add_argument("--judged", type=int, default=512, help="held-out scenes, a multiple of 64")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--smoke", action="store_true", help="two arms, little of everything: does it run?")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.out, args.arms, args.seeds = Path(tempfile.mkdtemp()), ["interleave", "scratch"], [0]
        args.at, args.batch, args.judged = [1, 2], 2, 64
    args.at = sorted(set(args.at))
    if args.judged < 64 or args.judged % 64 or args.at[0] < 1:
        parser.error("--judged must be a multiple of 64 and --at steps above 0")
    args.device = resolved(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for arm in args.arms:
            cell(args.out, arm, seed, args)
    print(report(args.out, args))


if __name__ == "__main__":
    main()
