"""Greedy search for the blocks to leave out: at each depth the block without which the model is best after a short healing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..model.depth import chosen_blocks
from ..model.transformer import SanaTransformer
from .choice import Choice, split
from .healing import flow_steps, trainable_copy
from .importance import batch_loss
from .trajectory import CalibrationBatch

Score = Callable[[list[int]], float]
TRIAL_LR = 5e-4  # of AdamW on the flow loss


def greedy(layers: int, keep: int, candidates: int, quick: Score, slow: Score) -> tuple[list[int], list[int]]:
    """Removes one block after the other until `keep` are left; what is left, and what was removed, in this order.

    Args:
        candidates: at each depth so many removals with the lowest quick score get the slow one, and the lowest of those
            wins; of equal ones the later block goes.
        quick, slow: a score of kept blocks; lower is better, and one that is not finite loses.

    Raises:
        ValueError: no removal has a finite score.
    """

    def ranked(choices: list[list[int]], score: Score) -> list[list[int]]:
        scored = [(score(kept), i) for i, kept in enumerate(choices)]
        return [choices[i] for value, i in sorted(pair for pair in scored if math.isfinite(pair[0]))]

    kept, removed = list(range(layers)), []
    while len(kept) > keep:
        removals = [[*kept[:i], *kept[i + 1 :]] for i in range(len(kept))]
        removals.reverse()  # of equal ones the later block goes
        best = ranked(removals, quick)[:candidates]
        if len(best) > 1:
            best = ranked(best, slow)
        if not best:
            raise ValueError(f"without any one of the {len(kept)} blocks left the loss is not finite")
        left = best[0]
        removed += [i for i in kept if i not in left]
        kept = left
    return kept, removed


def search(
    model: SanaTransformer,
    batches: Sequence[CalibrationBatch],
    keep: int,
    *,
    seed: int = 0,
    candidates: int = 4,
    trial_steps: int = 20,
    lr: float = TRIAL_LR,
    flow_shift: float = 3.0,
) -> Choice:
    """Greedy choice of blocks by the flow loss after `trial_steps` of healing.

    One third of the batches' chunks is for the loss, the others for healing (all for both where there are fewer than three).
    Healing always starts from the source's weights. The result's `removed` holds a search to every smaller loss of
    depth: one to 4 of 12 blocks begins with those to 11 to 5.

    Args:
        candidates: removals healed at each depth, those with the lowest loss unhealed.
        trial_steps, lr, flow_shift: of each of these healings; flow_shift as in the pipeline.
    """
    if candidates < 1 or trial_steps < 0:
        raise ValueError(f"candidates must be at least 1 and trial_steps 0, got {candidates} and {trial_steps}")
    judged, healing = split(batches)
    spent = {"healing steps": 0, "losses": 0}

    def loss(small: SanaTransformer) -> float:
        spent["losses"] += 1
        total = sum(batch_loss(small, batch).double().sum().item() for batch in judged)
        return total / sum(map(len, judged))

    def healed(kept: list[int]) -> float:
        small = trainable_copy(chosen_blocks(model, kept))
        groups = [{"params": list(small.parameters()), "lr": lr}]
        scale = model.config.timestep_scale
        flow_steps(small, groups, healing, trial_steps, seed=seed, flow_shift=flow_shift, timestep_scale=scale)
        spent["healing steps"] += trial_steps
        return loss(small.eval())

    kept, removed = greedy(model.config.num_layers, keep, candidates, lambda k: loss(chosen_blocks(model, k)), healed)
    return Choice(kept, "search", spent, removed)
