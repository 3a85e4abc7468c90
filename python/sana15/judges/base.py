"""The protocol of a judge, and the patience that a failing one needs."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..storage.redaction import redacted_values, said


@dataclass(frozen=True)
class Verdict:
    """The verdict on one image: score, the higher the better (comparable within a prompt); what the judge thinks; and why."""

    score: float
    correct: bool | None = None  # None: this judge only ranks
    reason: str = ""


class Judge(Protocol):
    """Asked about pictures of one prompt; one call is one picture looked at.

    A judge may also have `prefer(a, b, line) -> bool`, whether the first of two pictures is the better one: then a
    tournament asks that, in both orders.
    """

    name: str

    def judge(self, pictures: Sequence[Image.Image], line: Mapping[str, Any]) -> list[Verdict]:
        """One verdict for each picture; `line` has "prompt" and, for scenes, GenEval's "include"."""
        ...

    def identity(self) -> dict[str, Any]:
        """Returns what the verdicts follow from; a resumed run must have the same. JSON."""
        ...


class JudgeFailed(Exception):
    """A judge gave no usable verdict, however often it was asked."""


def check_patience(attempts: int, timeout: float, backoff: float = 1.0) -> None:
    """Raises ValueError for numbers that a Patient cannot have."""
    if attempts < 1 or not timeout > 0 or not backoff >= 0:
        raise ValueError(f"attempts, timeout and backoff must be positive, got {attempts}, {timeout}, {backoff}")


class Patient:
    """Asks a judge again, with growing pauses, when it fails, takes too long or returns nonsense.

    Args:
        attempts: how often in all. timeout: seconds for one call on one batch of pictures; the call that hangs is left
            alone. backoff: seconds before the second attempt; they double.

    Attributes:
        retries: how often a judge had to be asked again.
    """

    def __init__(self, judge: Judge, *, attempts: int = 3, timeout: float = 120.0, backoff: float = 1.0) -> None:
        check_patience(attempts, timeout, backoff)
        self.inner, self.attempts, self.timeout, self.backoff = judge, attempts, timeout, backoff
        self.name, self.retries = judge.name, 0

    def identity(self) -> dict[str, Any]:
        """The judge's own, without secrets: it is written into the run's folder."""
        return redacted_values(self.inner.identity())

    def judge(self, pictures: Sequence[Image.Image], line: Mapping[str, Any]) -> list[Verdict]:
        """Raises JudgeFailed after the last attempt."""
        return self._ask(lambda: _sensible(self.inner.judge(pictures, line), len(pictures)))

    def prefer(self, a: Image.Image, b: Image.Image, line: Mapping[str, Any]) -> bool:
        return self._ask(lambda: _boolean(self.inner.prefer(a, b, line)))  # type: ignore[attr-defined]

    @property
    def compares(self) -> bool:
        return hasattr(self.inner, "prefer")

    def _ask(self, question: Any) -> Any:
        for attempt in range(self.attempts):
            if attempt:
                self.retries += 1
                time.sleep(self.backoff * 2 ** (attempt - 1))
            answer: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
            threading.Thread(target=_answer, args=(question, answer), daemon=True).start()
            try:
                value, error = answer.get(timeout=self.timeout)
            except queue.Empty:
                value, error = None, TimeoutError(f"no answer in {self.timeout:g} s")
            if error is None:
                return value
        assert error is not None
        raise JudgeFailed(f"judge {self.name} failed {self.attempts} times: {said(error)}")


def _answer(question: Any, answer: queue.SimpleQueue[tuple[Any, Exception | None]]) -> None:
    try:
        answer.put((question(), None))
    except Exception as error:
        answer.put((None, error))


def _sensible(verdicts: Any, count: int) -> list[Verdict]:
    if not isinstance(verdicts, list) or len(verdicts) != count:
        raise ValueError(f"{count} pictures, but not as many verdicts")
    for v in verdicts:
        if not isinstance(v, Verdict) or isinstance(v.score, bool) or not math.isfinite(v.score):
            raise ValueError(f"no verdict with a finite score: {v!r}")
    return [replace(v, reason=redacted_values(v.reason)) if v.reason else v for v in verdicts]


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"a preference must be true or false, got {value!r}")
    return value


def mean_ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] the mean over the judges of each picture's rank, 0 for the worst; equal scores share their ranks' mean.

    Ranks rather than scores, because scales differ from judge to judge. scores: [judges, N].
    """
    below = (scores[:, None, :] < scores[:, :, None]).sum(-1)
    equal = (scores[:, None, :] == scores[:, :, None]).sum(-1)
    return (below + (equal - 1) / 2).mean(0)
