"""Depth pruning (arXiv:2501.18427, section 2.3): a shallower model from a trained one, its least needed blocks left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch

from ..growth.growing import grown_weights
from ..model.config import SanaConfig
from ..model.transformer import SanaTransformer
from ..sampling.settings import check_training_seed
from ..storage.values import is_whole
from ..storage.weights import Weight
from .choice import Choice
from .importance import Importance, block_importance
from .trajectory import CalibrationBatch

STRATEGIES = ("importance", "loss", "search", "learned", "indices")


def check_keep(keep: int, layers: int) -> None:
    """ValueError unless a model of `layers` blocks can keep this many."""
    if not is_whole(keep) or not 1 <= keep <= layers:
        raise ValueError(f"keep must be 1 to {layers}, the blocks of the source; got {keep}")


def check_indices(indices: Sequence[int], layers: int, keep: int | None = None) -> list[int]:
    """The indices; ValueError unless they are ascending block numbers, `keep` of them."""
    kept = list(indices)
    if not kept or not all(map(is_whole, kept)):
        raise ValueError(f"indices must be one or more block numbers, got {kept}")
    kept = [int(i) for i in kept]
    outside = [i for i in kept if not 0 <= i < layers]
    if outside:
        raise ValueError(f"the source has blocks 0 to {layers - 1}, but the indices name {outside[0]}")
    if any(a >= b for a, b in pairwise(kept)):
        raise ValueError(f"indices must be ascending, each block once, got {kept}")
    if keep is not None and keep != len(kept):
        raise ValueError(f"keep is {keep}, but there are {len(kept)} indices")
    return kept


def highest(scores: Sequence[float], keep: int) -> list[int]:
    """The blocks with the `keep` highest scores, in order; of equal ones the earlier stays."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep])


def strategy(by: str | None, indices: bool, importance: bool) -> str:
    """The strategy's name: `by`, or for None what the given arguments suggest.

    Args:
        indices, importance: whether there are some.

    Raises:
        ValueError: an unknown strategy, or arguments that do not go with it.
    """
    if by is None:
        by = "indices" if indices else "importance"
    if by not in STRATEGIES:
        raise ValueError(f"unknown strategy {by!r}; choose one of {', '.join(STRATEGIES)}")
    if (by == "indices") != indices:
        raise ValueError("by='indices' needs indices, and nothing else takes them")
    if importance and by not in ("importance", "loss"):
        raise ValueError(f"by={by!r} does not use an importance")
    return by


def choose(
    model: SanaTransformer | None,
    layers: int,
    keep: int | None,
    by: str | None = None,
    *,
    importance: Importance | None = None,
    batches: Iterable[CalibrationBatch] | None = None,
    indices: Sequence[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> Choice:
    """Chooses the blocks that stay; see prune for the arguments. `model` is not needed where `importance` or `indices` say it all."""
    by = strategy(by, indices is not None, importance is not None)
    if options and by not in ("search", "learned"):
        raise ValueError(f"by={by!r} takes no {', '.join(options)}")
    if indices is not None:
        return Choice(check_indices(indices, layers, keep), by)
    if keep is None:
        raise ValueError("keep must say how many blocks stay")
    check_keep(keep, layers)
    if by in ("importance", "loss"):
        if importance is None:
            if batches is None or model is None:
                raise ValueError(f"by={by!r} needs importance or batches")
            importance = block_importance(model, batches, loss=by == "loss")
        if importance.layers != layers:
            raise ValueError(f"the importance is that of {importance.layers} blocks, the model has {layers}")
        if by == "loss" and importance.loss is None:
            raise ValueError("the importance was measured without the loss; by='loss' needs it")
        return Choice(highest(importance.loss_change if by == "loss" else importance.cosine, keep), by)
    if batches is None or model is None:
        raise ValueError(f"by={by!r} needs batches")
    check_training_seed(seed)
    if by == "search":
        from .search import search

        return search(model, list(batches), keep, seed=seed, **options)
    from .learned import learned

    return learned(model, list(batches), keep, seed=seed, **options)


def prune(
    model: SanaTransformer,
    keep: int | None = None,
    by: str | None = None,
    *,
    importance: Importance | None = None,
    batches: Iterable[CalibrationBatch] | None = None,
    indices: Sequence[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> SanaTransformer:
    """A model of `keep` of another's blocks, which stays as it is.

    Args:
        keep: blocks that stay.
        by: importance (the highest 1 - cosine(input, output); the paper's rule), loss (the highest loss change), search
            (greedy, by the loss after a short healing; sana15.pruning.search), learned (N of M blocks in each group, learned
            together with low-rank changes of the weights; sana15.pruning.learned) or indices. Default: indices where there
            are some, else importance.
        importance: sana15.block_importance of the model, for `importance` and `loss`; else it is measured on `batches`.
        batches: sana15.calibration of the model; search and learned keep them in memory.
        indices: the blocks that stay, ascending, for `indices`.
        seed: of search and learned; same seed, same choice.
        options: of search: candidates, trial_steps, lr; of learned: learning_steps, group, rank, lr, odds_lr; of both:
            flow_shift (the pipeline's). As in the command, and see there.

    Returns:
        The pruned model, with `kept_blocks`, ascending numbers.

    Raises:
        ValueError: numbers that do not fit the model, something missing, or an unknown strategy.
    """
    layers = model.config.num_layers
    choice = choose(
        model, layers, keep, by, importance=importance, batches=batches, indices=indices, seed=seed, **options
    )
    config = pruned_config(model.config, choice.kept)
    weights = {name: Weight.of(t) for name, t in model.state_dict().items()}
    with torch.device("meta"):
        pruned = SanaTransformer(config)
    state = {n: w.load().detach().clone() for n, w in grown_weights(weights, config, choice.kept, seed=0).items()}
    pruned.load_state_dict(state, strict=True, assign=True)
    pruned.gradient_checkpointing = model.gradient_checkpointing
    pruned.kept_blocks = choice.kept
    if model.growth_map is not None:
        pruned.growth_map = [model.growth_map[i] for i in choice.kept]
    return pruned.train(model.training)


def pruned_config(config: SanaConfig, kept: Sequence[int]) -> SanaConfig:
    return dataclasses.replace(config, num_layers=len(kept))
