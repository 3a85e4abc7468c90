"""`sana15 importance`: JSON, a figure, and a table by block."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ..device import resolved
from ..sampling.pipeline import Pipeline
from ..storage.concurrency import claiming
from ..storage.files import replacing
from .importance import BINS, Importance, block_importance
from .trajectory import calibration, calibration_prompts


def draw(found: Importance, path: Path) -> None:
    """A PNG: importance (and loss change) by block, and as a heat map over blocks and timesteps. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import SymLogNorm

    rows = [("1 - cosine(input, output)", found.cosine, found.cosine_by_bin)]
    if found.loss is not None:
        rows.append(("loss change without the block", found.loss_change, found.loss_change_by_bin))
    figure, axes = plt.subplots(len(rows), 2, figsize=(9, 3.1 * len(rows)), layout="constrained", squeeze=False)
    bins = len(found.samples)
    for (name, values, by_bin), (left, right) in zip(rows, axes):
        left.bar(range(found.layers), values, color="tab:blue" if values is found.cosine else "tab:orange")
        left.set(xlabel="block", ylabel=name)
        left.axhline(0, color="black", linewidth=0.6)
        # One block often does a hundred times as much as another: logarithmic, and linear near zero (and below it).
        near = max(sorted(map(abs, values))[len(values) // 4] / 2, 1e-9)
        left.set_yscale("symlog", linthresh=near)
        columns = list(zip(*by_bin))  # [bins][L]
        extent = (-0.5, found.layers - 0.5, 0, 1000)
        image = right.imshow(columns, norm=SymLogNorm(near), origin="lower", aspect="auto", extent=extent)
        right.set(xlabel="block", ylabel=f"timestep, {bins} bins")
        figure.colorbar(image, ax=right)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def table(found: Importance) -> str:
    """By block: importance and loss change, with the rank of each (1 is pruned first)."""
    titles = ["block", "1 - cosine", "rank"] + ["loss change", "rank"] * (found.loss is not None)
    columns = [found.cosine] + [found.loss_change] * (found.loss is not None)
    ranks = [[sorted(range(found.layers), key=lambda i: c[i]).index(b) + 1 for b in range(found.layers)] for c in columns]  # fmt: skip
    lines = ["  ".join(title.rjust(11) for title in titles)]
    for b in range(found.layers):
        cells = [str(b)] + [cell for c, r in zip(columns, ranks) for cell in (f"{c[b]:.5f}", str(r[b]))]
        lines.append("  ".join(cell.rjust(11) for cell in cells))
    return "\n".join(lines)


def measured(
    pipe: Pipeline, prompts: list[str], *, steps: int = 20, seed: int = 0, batch_size: int = 16, bins: int = BINS,
    loss: bool = True,
) -> Importance:  # fmt: skip
    """block_importance of a pipeline's transformer on a calibration run, with the settings written down."""
    batches = calibration(pipe, prompts, steps=steps, seed=seed, batch_size=batch_size)
    found = block_importance(pipe.transformer, batches, bins=bins, loss=loss)
    found.settings.update({"prompts": len(prompts), "steps": steps, "seed": seed} | {"model": pipe.identity()})
    return found


@claiming(lambda given: given["args"].out)
def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, not a folder")
    pipe = Pipeline.from_pretrained(args.source, device=resolved(args.device))
    prompts = calibration_prompts(pipe, args.prompts, args.count, args.seed)
    found = measured(
        pipe, prompts, steps=args.steps, seed=args.seed, batch_size=args.batch_size, bins=args.bins,
        loss=not args.no_loss,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / "importance.json")
    print(table(found))
    if found.loss is not None:
        print(f"loss of the whole model: {found.loss:.5f}")
    empty = sum(math.isnan(v) for v in found.cosine_by_bin[0])
    print(
        f"{len(prompts)} prompts, {args.steps} steps, {args.bins} bins" + (f", {empty} of them empty" if empty else "")
    )
    try:
        draw(found, out / "importance.png")
    except ModuleNotFoundError as error:
        print(f"{out}/importance.json is written; no figure without matplotlib ({error})")
    else:
        print(f"written: {out}/importance.json and {out}/importance.png")
