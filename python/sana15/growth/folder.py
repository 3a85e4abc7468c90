"""`sana15 grow`: depth growth from folder to folder, one tensor in memory at a time, and the proof that the start is exact."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..model.config import SanaConfig
from ..model.folder import ModelFolder, reopening
from ..model.release import parameter_shapes
from ..model.transformer import SanaTransformer
from ..storage.concurrency import claiming
from ..storage.files import DataError
from ..storage.values import parse_bytes
from ..storage.weights import Weights, require_fit
from .growing import BLOCKS, GrowthMap, block_of, grown_config, grown_weights, growth_map


@dataclass(frozen=True)
class Difference:
    """Outputs of two models on the same input, in fp32."""

    equal: bool  # torch.equal
    largest: float  # absolute difference
    scale: float  # largest absolute output of the first

    def __str__(self) -> str:
        return "torch.equal" if self.equal else f"off by up to {self.largest:.3g} (outputs up to {self.scale:.3g})"


@dataclass(frozen=True)
class Growth:
    """The result of grow_folder."""

    config: SanaConfig
    depth: int  # blocks of the source
    keep: int
    strategy: str
    seed: int
    blocks: GrowthMap
    added_norms: bool

    @property
    def exact(self) -> bool:
        """Tells whether the grown model must begin as the function of the kept blocks."""
        return [b for b in self.blocks if b is not None] == [*range(self.keep)] and not self.added_norms


@claiming(lambda given: given["target"], new=True)
def grow_folder(
    source: str | Path,
    target: str | Path,
    *,
    layers: int,
    keep: int | None = None,
    strategy: str = "partial_preservation",
    seed: int = 0,
    add_qk_norm: bool = False,
    shard_bytes: int | None = None,
    check: bool = False,
) -> tuple[Growth, list[str]]:
    """A grown model from a transformer folder or a whole pipeline folder in diffusers' layout.

    Other parts of a pipeline are copied. The growth is recorded under `growth` in the target's sana15.json.

    Args:
        source: a folder; or "mini".
        target: must not exist; it appears when everything is written (and checked).
        layers, keep, strategy, seed, add_qk_norm: as in sana15.grow.
        shard_bytes: the most that a weights file may hold. Default: as the source's largest file, at least 5 GB.
        check: read everything back and compare functions, see check_growth.

    Returns:
        What was done, and the lines of the check.

    Raises:
        ValueError: arguments that cannot be. FileNotFoundError, DataError: the source is bad, or the check failed. In
        every case the source is untouched and the target is not there.
    """
    origin, target = ModelFolder(source), Path(target)
    origin.check_target(target)
    old = origin.config
    blocks, keep = growth_map(old.num_layers, layers, keep, strategy)
    config = grown_config(old, layers, add_qk_norm)
    growth = Growth(config, old.num_layers, keep, strategy, seed, blocks, config.qk_norm != old.qk_norm)
    weights, settings = origin.weights(), origin.settings()
    settings.pop("pruning", None)  # it tells of blocks that are not in this order any more
    settings["growth"] = {
        "strategy": strategy, "source_layers": old.num_layers, "keep": keep, "seed": seed, "map": blocks,
        "added_qk_norm": growth.added_norms,
    }  # fmt: skip
    lines: list[str] = []

    def checked(whole: Path, made: Path) -> Path:
        lines.extend(check_growth(origin.transformer, made, growth) if check else [])
        return whole

    grown = grown_weights(weights, config, blocks, seed)
    origin.rewrite(target, config, grown, settings, shard_bytes=shard_bytes, finish=checked)
    return growth, lines


def check_growth(source: Path, grown: Path, growth: Growth) -> list[str]:
    """Reads a grown transformer folder back: every tensor must be the documented one, and the function is compared.

    Where the growth must be exact, the grown model's output has to be torch.equal to that of the source without its
    dropped blocks. Both run in fp32 on a random input, one block in memory at a time.

    Returns:
        What was found, line by line.

    Raises:
        DataError: a tensor, or a function that must be kept, is not as it should be.
    """
    old_config = SanaConfig.load(source)
    old, new = reopening(source), reopening(grown)
    expected = grown_weights(old, growth.config, growth.blocks, growth.seed)
    require_fit(new, {name: w.shape for name, w in expected.items()}, str(grown))
    for name, weight in expected.items():
        if not _same_bits(weight.load(), new[name].load()):
            raise DataError(f"{grown}: {name} is not what {growth.strategy} makes of the source")
    lines = [f"{len(expected)} tensors read back: the source's, or the documented start of a new block, bit for bit"]

    kept = dataclasses.replace(old_config, num_layers=growth.keep)
    dropped = growth.depth - growth.keep
    reference = f"the source without its last {dropped} blocks" if dropped else "the source"
    output = streamed_output(new, growth.config)
    found = difference(streamed_output(old, kept), output)
    if growth.exact and not found.equal:
        raise DataError(f"{grown}: the grown model must equal {reference}, but it is {found}")
    lines.append(f"against {reference}: {found}")
    if dropped:
        lines.append(f"against the whole source: {difference(streamed_output(old, old_config), output)}")
    if not growth.exact:
        why = "qk-norm was added" if growth.added_norms else f"{growth.strategy} repeats trained blocks"
        lines.append(f"the start does not preserve the function: {why}")
    return lines


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    def bits(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def difference(expected: torch.Tensor, found: torch.Tensor) -> Difference:
    """DataError where the expected output is not finite: nothing can be compared."""
    if not expected.isfinite().all():
        raise DataError("the source's output is not finite on the random input of the check")
    return Difference(torch.equal(expected, found), (expected - found).abs().max().item(), expected.abs().max().item())


@torch.no_grad()
def streamed_output(weights: Weights, config: SanaConfig) -> torch.Tensor:
    """The output of a model's first config.num_layers blocks on a fixed random input, with one block's weights in memory."""
    with torch.device("meta"):
        model = SanaTransformer(config).eval()

    def loaded(names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: weights[name].load().float() for name in names}

    always = [n for n in parameter_shapes(config) if block_of(n)[0] is None]
    model.load_state_dict(loaded(always), strict=False, assign=True)
    blocks: list[torch.nn.Module] = list(model.transformer_blocks)
    # The blocks run one after the other, in the same memory.
    shared = {name: torch.empty(p.shape) for name, p in blocks[0].named_parameters()}

    def fill(index: int) -> None:
        for name, tensor in shared.items():
            tensor.copy_(weights[f"{BLOCKS}{index}.{name}"].load())

    for index, block in enumerate(blocks):
        block.load_state_dict(shared, strict=False, assign=True)
        block.register_forward_pre_hook(lambda module, _, i=index: fill(i))
    generator = torch.Generator().manual_seed(0)
    side = 4 * config.patch_size
    mask = torch.ones(2, 6)
    mask[1, 3:] = 0
    return model(
        torch.randn(2, config.in_channels, side, side, generator=generator),
        torch.randn(2, 6, config.caption_channels, generator=generator),
        torch.tensor([900.0, 250.0]),
        mask,
        torch.tensor([0.45, 0.2]) if config.guidance_embeds else None,
    )


def run(args: argparse.Namespace) -> None:
    """`sana15 grow`."""
    growth, lines = grow_folder(
        args.source, args.target, layers=args.layers, keep=args.keep, strategy=args.strategy, seed=args.seed,
        add_qk_norm=args.add_qk_norm, check=args.check,
        shard_bytes=parse_bytes(args.shard_size) if args.shard_size else None,
    )  # fmt: skip
    new = growth.blocks.count(None)
    total = sum(torch.Size(shape).numel() for shape in parameter_shapes(growth.config).values())
    print(
        f"{args.target}: {total:,} parameters, {growth.depth} -> {len(growth.blocks)} blocks by {growth.strategy}: the "
        f"first {growth.keep} kept, {len(growth.blocks) - new} copied, {new} new"
        f"{', qk-norm added' if growth.added_norms else ''}"
    )
    for line in lines:
        print(f"check: {line}")
