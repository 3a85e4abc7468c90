"""Depth growth (arXiv:2501.18427, section 2.2): a deeper model from a trained one.

A growth map says for every block of the grown model which block of the source it is a copy of; None is a new block. A new
block's three output projections are zero, so it passes its input on and a model grown with new blocks alone starts as the
function that it was. Everything else of a new block is drawn as SANA draws it for training from scratch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from functools import partial

import torch

from ..model.config import SanaConfig
from ..model.release import parameter_shapes, source_of
from ..model.transformer import SanaTransformer
from ..storage.weights import Weight, Weights

GrowthMap = list[int | None]

STRATEGIES = ("partial_preservation", "interleave", "cyclic", "block_replication", "stack")
#: The output projections of self-attention, cross-attention and Mix-FFN: zero in a new block, weights and biases.
OUTPUTS = ("attn1.to_out.0.", "attn2.to_out.0.", "ff.conv_point.")
BLOCKS = "transformer_blocks."
#: Blocks that partial preservation drops by default: the paper keeps 18 of 20.
DROPPED = 2
MOST_LAYERS = 10_000  # more is a slip of the keyboard


def growth_map(
    depth: int, layers: int, keep: int | None = None, strategy: str = "partial_preservation"
) -> tuple[GrowthMap, int]:
    """For every block of the grown model the source's block that it copies, or None; and the number of blocks kept.

    Args:
        depth: blocks of the source.
        layers: blocks of the grown model.
        keep: the first `keep` blocks of the source are used, the others dropped. Default: all; with
            partial_preservation all but the last two, as in the paper.
        strategy: partial_preservation (kept blocks, then new ones), interleave (new blocks spread evenly between the kept
            ones), cyclic (block i copies i mod keep), block_replication (neighbours copy the same block), or stack (whole
            copies of the kept stack; where they do not fit evenly, the first one is cut at its end).

    Raises:
        ValueError: numbers that do not fit, or an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    if keep is None:
        keep = max(1, depth - DROPPED) if strategy == "partial_preservation" else depth
    for name, value in (("layers", layers), ("keep", keep)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    if layers > MOST_LAYERS:
        raise ValueError(f"layers must be at most {MOST_LAYERS}, got {layers}")
    if not 1 <= keep <= depth:
        raise ValueError(f"keep must be 1 to {depth}, the blocks of the source; got {keep}")
    if layers < keep:
        raise ValueError(f"layers must be at least the {keep} blocks that are kept, got {layers}")
    if strategy == "partial_preservation":
        return [*range(keep), *[None] * (layers - keep)], keep
    if strategy == "interleave":
        spread: GrowthMap = [None] * layers
        for i in range(keep):  # the first stays first and the last stays last
            spread[i * (layers - 1) // max(1, keep - 1)] = i
        return spread, keep
    if strategy == "block_replication":
        return [i * keep // layers for i in range(layers)], keep
    first = layers % keep if strategy == "stack" else 0
    return [*range(first), *((i - first) % keep for i in range(first, layers))], keep


def grown_config(config: SanaConfig, layers: int, add_qk_norm: bool = False) -> SanaConfig:
    """The source's configuration with another depth, and with qk-norm where it is to be added."""
    qk_norm = SanaConfig.named("1600M").qk_norm if add_qk_norm else config.qk_norm
    return dataclasses.replace(config, num_layers=layers, qk_norm=qk_norm)


def grown_weights(weights: Weights, config: SanaConfig, blocks: Sequence[int | None], seed: int) -> dict[str, Weight]:
    """Every tensor of the grown model of configuration `config`, from the source's tensors; each is made when it is asked for.

    A new tensor depends on (seed, its name, its shape) alone, and has the dtype of its like in the source.
    """
    grown = {}
    for name, shape in parameter_shapes(config).items():
        index, inner = block_of(name)
        source = None if index is None else blocks[index]
        old = name if index is None else f"{BLOCKS}{source}.{inner}"
        if old in weights:
            grown[name] = weights[old]
        else:
            like = weights.get(f"{BLOCKS}0.{inner}", weights[f"{BLOCKS}0.attn1.to_q.weight"])
            make = partial(_new_in, like.dtype, name, shape, seed, config.width)
            grown[name] = Weight(shape, like.dtype, make)
    return grown


def block_of(name: str) -> tuple[int | None, str]:
    """(3, "attn1.to_q.weight") of "transformer_blocks.3.attn1.to_q.weight"; (None, name) outside the blocks."""
    if not name.startswith(BLOCKS):
        return None, name
    _, index, inner = name.split(".", 2)
    return int(index), inner


def _new_in(dtype: torch.dtype, name: str, shape: tuple[int, ...], seed: int, width: int) -> torch.Tensor:
    return new_tensor(name, shape, seed, width).to(dtype)


def new_tensor(name: str, shape: tuple[int, ...], seed: int, width: int) -> torch.Tensor:
    """A tensor of a new block of this width, fp32: zero in an output projection, else as in SANA's training from scratch."""
    inner = block_of(name)[1]
    if inner.startswith(OUTPUTS):
        return torch.zeros(shape)
    if ".norm_" in inner:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    if inner == "scale_shift_table":
        return torch.randn(shape, generator=generator) / shape[1] ** 0.5
    if inner.startswith("ff."):  # convolutions keep PyTorch's own: uniform within 1 / sqrt(inputs of an output)
        bound = (9 if inner.startswith("ff.conv_depth.") else width) ** -0.5
    elif inner.endswith(".bias"):
        return torch.zeros(shape)
    else:  # Xavier; SANA draws q, k, v as one layer, whose outputs count together
        outputs = shape[0] * source_of(name)[2]
        bound = math.sqrt(6 / (outputs + shape[1]))
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


def grow(
    model: SanaTransformer,
    layers: int,
    keep: int | None = None,
    strategy: str = "partial_preservation",
    seed: int = 0,
    *,
    add_qk_norm: bool = False,
) -> SanaTransformer:
    """A model with `layers` blocks from a trained one, which stays as it is.

    Args:
        layers, keep, strategy: see growth_map.
        seed: of the new blocks.
        add_qk_norm: give a model without qk-norm (SANA-1.0) the norms of SANA-1.5, with weights of 1, in every block. Its
            function changes; it learns to live with them.

    Returns:
        The grown model, with `growth_map`: for every block the source's block that it copies, or None.

    Raises:
        ValueError: numbers that do not fit the model, or an unknown strategy.
    """
    blocks, _ = growth_map(model.config.num_layers, layers, keep, strategy)
    config = grown_config(model.config, layers, add_qk_norm)
    state = model.state_dict()
    weights = {name: Weight.of(t) for name, t in state.items()}
    with torch.device("meta"):
        grown = SanaTransformer(config)
    device = model.proj_out.weight.device
    made = {  # cloned: copies of one block must not share memory
        name: w.load().detach().to(device, copy=True)
        for name, w in grown_weights(weights, config, blocks, seed).items()
    }
    grown.load_state_dict(made, strict=True, assign=True)
    grown.gradient_checkpointing = model.gradient_checkpointing
    grown.growth_map = blocks
    return grown.train(model.training)
