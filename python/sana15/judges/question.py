"""Words the question for a vision-language model, and turns its answer into a score.

As VILA-Judge is asked (SANA-1.5, arXiv:2501.18427, section 2.4): each picture alone, the picture first, yes or no; pictures
answered yes come before those answered no, the surer yes first and the surer no last. The score is log p(yes) - log p(no) of
the first answered token, which is that order with one number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np

from .base import Verdict

ROLE = "You judge how well pictures match a text, so that the best of several can be chosen."
YES, NO = "yes", "no"
LEAST_MASS = 0.05  # of yes and no together, where another token is likelier than both
LEAST = -100.0  # log-probability of what cannot come: servers say -inf, null, -9999 or the smallest float

#: Blanks and line ends as byte-level BPE, SentencePiece and their byte tokens write them.
_BLANKS = str.maketrans(dict.fromkeys("ĠĊĉč▁\u200b\ufeff", " "))
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: What may stand around a word: blanks, quotes, Markdown and punctuation, also the typographic ones.
_AROUND = " \t\r\n\v\f\xa0\"'`*_~.,:;!?()[]{}|\\/->\u00ab\u00bb\u00b4\u2013\u2014\u2018\u2019\u201c\u201d\u201e\u3002"


def question(prompt: str) -> str:
    return (
        f"{ROLE} The text is: {prompt}\nDoes this picture show exactly what the text says: every object, its number, its "
        "colour and its place? Answer directly with yes or no."
    )


def plain(token: str) -> str:
    """The text of a token, without the marks of tokenizers: "Ġ" and "▁" are blanks, "<0x0A>" is the byte."""
    return _BYTE.sub(lambda found: chr(int(found[1], 16)), token.translate(_BLANKS))


def word_of(token: str) -> str:
    """The word that a token or a text spells, in small letters: "ĠYes", "▁YES", '"yes' and "**Yes" are yes."""
    return plain(token).strip(_AROUND).lower()


def verdict(log_yes: float, log_no: float, log_other: float = -math.inf, other: str = "") -> Verdict:
    """From the log-probabilities of yes and of no, each over all its spellings, and of the likeliest other token, `other`.

    -inf, what cannot come, counts as LEAST: scores are finite. A model that would rather begin with "The" still weighs yes
    against no behind it; one that gives them next to nothing was about to say something else, such as a thought.

    Raises:
        ValueError: one is NaN, or yes and no together are less than LEAST_MASS and than another token: this was no answer.
    """
    if any(math.isnan(log) for log in (log_yes, log_no, log_other)):
        raise ValueError("the log-probabilities of the first token are not numbers")
    if np.logaddexp(log_yes, log_no) < min(log_other, math.log(LEAST_MASS)):
        raise ValueError(f"the model answered neither yes nor no but {other!r}")
    score = max(log_yes, LEAST) - max(log_no, LEAST)
    return Verdict(score, score > 0)


def log_probability(logs: Iterable[float]) -> float:
    """The log-probability of any of several tokens; -inf of none."""
    return float(np.logaddexp.reduce(list(logs), initial=-math.inf))
