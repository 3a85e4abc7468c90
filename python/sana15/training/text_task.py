"""The task that the mini text encoder learns before the transformer sees it: to say at every noun what the prompt says of it.

SANA's text encoder comes with a knowledge of language and stays as it is. Ours gets the little that scenes need from the
grammar alone: at the word for a shape, its features tell how many there are, in which colour, and on which side of the
other one. Left to the flow loss, this is learned very late: a relation is decided by two words' order, and shows in the
loss at the highest noise only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..model.text import MiniTextEncoder
from ..scenes.prompts import parse, word_list
from ..scenes.spec import Spec
from ..scenes.testset import load as test_set
from ..scenes.vocabulary import COLOR_NAMES, MAX_COUNT, OPPOSITE, PLURALS, RELATIONS, SHAPES
from .config import TrainConfig
from .data import Batch

#: What is told at a noun, and the number of answers: its shape, count - 1, colour (the last: open), side (the last: none).
QUESTIONS = {"shape": len(SHAPES), "count": MAX_COUNT, "color": len(COLOR_NAMES) + 1, "side": len(RELATIONS) + 1}


class TextTask:
    """Trains a `MiniTextEncoder` with one linear layer on its features; the layer is not kept."""

    def __init__(self, config: TrainConfig, device: str) -> None:
        self.config, self.device = config.text, device
        encoder = MiniTextEncoder(list(word_list()), self.config.width, self.config.heads, self.config.passes)
        self.module: Any = nn.ModuleDict(
            {"text": encoder, "answers": nn.Linear(self.config.width, sum(QUESTIONS.values()))}
        ).to(device)
        self._nouns = {word: shape for shape in SHAPES for word in (shape, *_plural_of(shape))}

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters())}]

    def loss(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        answers, truth = self._answers(batch.prompts)
        return sum(
            (F.cross_entropy(given, truth[:, i]) for i, given in enumerate(answers)),
            torch.zeros((), device=self.device),
        )

    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """The part of the test set's nouns, prompts never trained on, at which each question is answered rightly."""
        answers, truth = self._answers([entry["prompt"] for entry in test_set()])
        right = {name: given.argmax(1) == truth[:, i] for i, (name, given) in enumerate(zip(QUESTIONS, answers))}
        related = truth[:, -1] < len(RELATIONS)
        return {f"accuracy_{name}": hits.float().mean().item() for name, hits in right.items()} | {
            "accuracy_relation": right["side"][related].float().mean().item()
        }

    def export(self, folder: Path) -> None:
        self.module["text"].save(folder)

    def _answers(self, prompts: list[str]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Logits of each question at every noun [N, answers], and the right answers [N, questions]."""
        rows, columns, truth = [], [], []
        for row, prompt in enumerate(prompts):
            spec = parse(prompt)
            for column, word in enumerate(prompt.lower().split()):
                shape = self._nouns.get(word.strip(".,"))
                if shape is not None:
                    rows.append(row)
                    columns.append(column)
                    truth.append(described(spec, shape))
        features, _ = self.module["text"].encode(prompts)
        logits = self.module["answers"](features[rows, columns])
        return logits.split(tuple(QUESTIONS.values()), 1), torch.tensor(truth, device=self.device)


def described(spec: Spec, shape: str) -> tuple[int, int, int, int]:
    """The answers for the clause of `shape`, in the order of QUESTIONS."""
    at = [clause.shape for clause in spec.clauses].index(shape)
    clause = spec.clauses[at]
    side = None if spec.relation is None else spec.relation if at == 1 else OPPOSITE[spec.relation]
    return (
        SHAPES.index(shape),
        clause.count - 1,
        len(COLOR_NAMES) if clause.color is None else COLOR_NAMES.index(clause.color),
        len(RELATIONS) if side is None else RELATIONS.index(side),
    )


def _plural_of(shape: str) -> list[str]:
    return [word for word, singular in PLURALS.items() if singular == shape]
