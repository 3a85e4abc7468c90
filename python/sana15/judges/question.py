"""What a vision-language model is asked, and how its answer becomes a score.

As VILA-Judge is asked (SANA-1.5, arXiv:2501.18427, section 2.4): each picture alone, the picture first, yes or no; pictures
answered yes come before those answered no, the surer yes first and the surer no last. The score is log p(yes) - log p(no) of
the first answered token, which is that order with one number.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .base import Verdict

ROLE = "You judge how well pictures match a text, so that the best of several can be chosen."
YES, NO = "yes", "no"


def question(prompt: str) -> str:
    return (
        f"{ROLE} The text is: {prompt}\nDoes this picture show exactly what the text says: every object, its number, its "
        "colour and its place? Answer directly with yes or no."
    )


def verdict(log_yes: float, log_no: float) -> Verdict:
    score = log_yes - log_no
    return Verdict(score, score > 0)


def log_probability(logs: Iterable[float]) -> float:
    """Of any of several tokens."""
    return float(np.logaddexp.reduce(list(logs)))
