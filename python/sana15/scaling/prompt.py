"""One prompt's candidates: made, judged, paid for, and noted in the ledger, or taken from there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..evaluation.layout import picture_path
from ..judges import Patient, Verdict, mean_ranks
from ..sampling.generator import Generator
from ..sampling.settings import Item, Seed
from ..storage.files import DataError, write_durably
from ..storage.png import encode_png
from .ledger import Ledger


@dataclass
class Spent:
    """The budget's one unit: a transformer evaluation of one picture, or one judge looking at one picture once."""

    evaluations: int = 0
    judge_calls: int = 0

    @property
    def total(self) -> int:
        return self.evaluations + self.judge_calls


class PromptSearch:
    """The candidates of a prompt as a policy sees them: it asks for candidates 0, 1, ... and sees their scores.

    Every answer that the ledger holds is taken from there, at the same price: a policy that is run again after a kill does
    the same, and only what is missing is computed. Batches are chunks of what is asked for, so they are the same again.

    Args:
        n, pick, budget: of this prompt; budget None is no limit.
        done: this prompt's records.

    Raises (all methods):
        JudgeFailed: this prompt cannot be judged. DataError: a picture that was made again has other bytes.
    """

    def __init__(
        self, generator: Generator, judges: Sequence[Patient], ledger: Ledger, root: Path, index: int,
        line: Mapping[str, Any], *, seed: int, n: int, pick: int, budget: int | None, batch_size: int,
        done: Iterable[Mapping[str, Any]] = (),
    ) -> None:  # fmt: skip
        self.generator, self.judges, self.ledger, self.root = generator, judges, ledger, root
        self.index, self.line, self.seed = index, line, seed
        self.n, self.pick, self.budget, self.batch_size = n, pick, budget, batch_size
        self.spent = Spent()
        self.made: list[int] = []  # finished candidates, in the order in which they were asked for
        self.verdicts: dict[int, list[Verdict]] = {}  # finished candidate -> by judge
        self._images: dict[int, dict[str, Any]] = {}
        self._known: dict[tuple[int, int, int], Verdict] = {}  # (judge, step, candidate)
        self._preferred: dict[tuple[int, int], bool] = {}
        for record in done:
            self._recall(record)

    def _recall(self, record: Mapping[str, Any]) -> None:
        try:
            if record["kind"] == "image":
                self._images[record["candidate"]] = dict(record)
            elif record["kind"] == "verdicts":
                for c, values in zip(record["candidates"], record["verdicts"], strict=True):
                    self._known[record["judge"], record["step"], c] = Verdict(*values)
            elif record["kind"] == "prefer":
                self._preferred[record["first"], record["second"]] = record["prefers_first"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.ledger.path}: a record of prompt {self.index} is damaged: {error!r}") from None

    # Prices

    def affords(self, price: int) -> bool:
        return self.budget is None or self.spent.total + price <= self.budget

    @property
    def price(self) -> int:
        """The price of a finished image with every judge's verdict."""
        return self.generator.evaluations(0, self.generator.steps) + len(self.judges)

    def affordable(self, price_of: Any, most: int) -> int:
        """The largest count up to `most` whose price price_of(count) is left in the budget."""
        return next((count for count in range(most, 0, -1) if self.affords(price_of(count))), 0)

    # What a policy asks for

    def make(self, candidates: Sequence[int], judged: bool = True) -> None:
        """Finished pictures of these candidates, with verdicts."""
        for chunk in self._chunks(candidates):
            self._finish_chunk(chunk, lambda chunk=chunk: self._start(chunk))
            if judged:
                self.judge(chunk)

    def judge(self, candidates: Sequence[int]) -> None:
        """Every judge's verdict on finished candidates."""
        steps = self.generator.steps
        verdicts = [
            self._verdicts(j, steps, candidates, lambda: self._open(candidates)) for j in range(len(self.judges))
        ]
        for i, c in enumerate(candidates):
            self.verdicts[c] = [by_judge[i] for by_judge in verdicts]

    def race(self, candidates: Sequence[int], rounds: Sequence[tuple[int, int]]) -> None:
        """Candidates that are thinned out on the way: at each (step, keep) the best previews go on, the last are finished.

        A chunk that loses all its candidates is given up.
        """
        chunks = self._chunks(candidates)
        # A state is made when it is needed and then kept: after a kill, chunks that the ledger knows to the end never are.
        states: list[Any] = [None] * len(chunks)
        history: list[list[tuple[int, list[int]]]] = [[] for _ in chunks]  # (step, positions kept) of each chunk

        def state(k: int) -> Any:
            if states[k] is None:
                states[k] = self._start(first[k])
                for step, kept in history[k]:
                    states[k] = self.generator.select(self.generator.advance(states[k], step), kept)
            return states[k]

        first, done = [list(chunk) for chunk in chunks], 0
        try:
            for step, keep in rounds:
                seen: dict[int, list[Verdict]] = {}
                for k, chunk in enumerate(chunks):
                    if not chunk:
                        continue
                    self.spent.evaluations += len(chunk) * self.generator.evaluations(done, step)

                    def previews(k: int = k, step: int = step) -> list[Image.Image]:
                        states[k] = self.generator.advance(state(k), step)
                        return self.generator.preview(states[k])

                    by_judge = [self._verdicts(j, step, chunk, previews) for j in range(len(self.judges))]
                    seen |= {c: [verdicts[i] for verdicts in by_judge] for i, c in enumerate(chunk)}
                best = set(self.ranked(list(seen), seen)[:keep])
                for k, chunk in enumerate(chunks):
                    kept = [i for i, c in enumerate(chunk) if c in best]
                    history[k].append((step, kept))
                    if states[k] is not None:
                        states[k] = self.generator.select(self.generator.advance(states[k], step), kept)
                    chunks[k] = [chunk[i] for i in kept]
                done = step
            for k, chunk in enumerate(chunks):
                if chunk:
                    self._finish_chunk(chunk, lambda k=k: state(k), done)
                    self.judge(chunk)
        finally:
            for left in states:  # pictures of a foreign pipeline that wait in their threads
                if left is not None:
                    self.generator.select(left, [])

    def prefers(self, a: int, b: int) -> int:
        """1, -1 or 0: a is better, b is better, or the judge says otherwise when it sees them in the other order."""
        first, second = self._prefer(a, b), self._prefer(b, a)
        return 0 if first == second else 1 if first else -1

    def scores(self, candidates: Sequence[int], verdicts: Mapping[int, Sequence[Verdict]]) -> NDArray[np.float64]:
        """One judge's scores; the mean of the ranks among these candidates where there are several."""
        table = (
            np.array([[v.score for v in verdicts[c]] for c in candidates], dtype=np.float64)
            .reshape(len(candidates), -1)
            .T
        )
        return table[0] if len(table) == 1 else mean_ranks(table)

    def ranked(self, candidates: Sequence[int], verdicts: Mapping[int, Sequence[Verdict]] | None = None) -> list[int]:
        """The best first; equal scores in the order of the candidates."""
        if not candidates:
            return []
        scores = self.scores(candidates, self.verdicts if verdicts is None else verdicts)
        return [c for _, c in sorted(zip(-scores, candidates))]

    def path(self, candidate: int) -> Path:
        return picture_path(self.root, self.index, candidate)

    # Doing it, or finding it done

    def _chunks(self, candidates: Sequence[int]) -> list[list[int]]:
        return [list(candidates[i : i + self.batch_size]) for i in range(0, len(candidates), self.batch_size)]

    def _start(self, chunk: Sequence[int]) -> Any:
        seeds = [Seed(self.seed, self.index, c) for c in chunk]
        return self.generator.start([self.line["prompt"]] * len(chunk), seeds)

    def _finish_chunk(self, chunk: Sequence[int], state: Any, done: int = 0) -> None:
        self.spent.evaluations += len(chunk) * self.generator.evaluations(done, self.generator.steps)
        if not all(self._is_there(c, chunk) for c in chunk):
            for c, picture in zip(chunk, self.generator.finish(state()), strict=True):
                self._save(c, picture, chunk)
        self.made += chunk

    def _is_there(self, c: int, chunk: Sequence[int]) -> bool:
        record = self._images.get(c)
        if record is None:
            return False
        if record["batch"] != list(chunk):
            raise DataError(f"{self.ledger.path}: candidate {c} of prompt {self.index} was made in another batch")
        try:
            return hashlib.sha256(self.path(c).read_bytes()).hexdigest() == record["sha256"]
        except FileNotFoundError:
            return False

    def _save(self, c: int, picture: Image.Image, chunk: Sequence[int]) -> None:
        item = Item(self.line["prompt"], self.index, c)
        size = {"width": picture.width, "height": picture.height}
        data = encode_png(picture, {"seed": self.seed} | self.generator.describe(item) | size)
        digest = hashlib.sha256(data).hexdigest()
        record = self._images.get(c)
        if record is not None and record["sha256"] != digest:
            raise DataError(
                f"{self.path(c)} was lost or damaged and comes out differently now: not the machine, the threads or the "
                "libraries that this run was made with"
            )
        write_durably(data, self.path(c))
        if record is None:
            self._images[c] = self._note("image", candidate=c, batch=list(chunk), sha256=digest)

    def _open(self, candidates: Sequence[int]) -> list[Image.Image]:
        pictures = []
        for c in candidates:
            with Image.open(self.path(c)) as picture:
                pictures.append(picture.convert("RGB"))
        return pictures

    def _verdicts(self, j: int, step: int, candidates: Sequence[int], pictures: Any) -> list[Verdict]:
        self.spent.judge_calls += len(candidates)
        if any((j, step, c) not in self._known for c in candidates):
            made = self.judges[j].judge(pictures(), self.line)
            values = [[v.score, v.correct, v.reason] for v in made]
            self._recall(self._note("verdicts", judge=j, step=step, candidates=list(candidates), verdicts=values))
        return [self._known[j, step, c] for c in candidates]

    def _prefer(self, a: int, b: int) -> bool:
        self.spent.judge_calls += 1
        if (a, b) not in self._preferred:
            first, second = self._open([a, b])
            answer = self.judges[0].prefer(first, second, self.line)
            self._recall(self._note("prefer", first=a, second=b, prefers_first=answer))
        return self._preferred[a, b]

    def _note(self, kind: str, **values: Any) -> dict[str, Any]:
        record = {"kind": kind, "prompt": self.index} | values
        self.ledger.append(record)
        return record
