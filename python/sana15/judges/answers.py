"""Reading the answer of a server that speaks OpenAI's protocol, as it is spoken: a verdict, or one line that says why not.

What the first token might have been stands in two places, the sampled token and the list of alternatives, and neither is
complete: LMDeploy leaves the sampled token out of the list, others send an empty list, some the list alone. A list is OpenAI's
objects or the older completions' mapping from token to number. Tokens are text or a tokenizer's raw pieces. What cannot come is
-inf, null, -9999 or the smallest float. The sampled token is the likeliest one (the temperature is 0).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..storage.redaction import redacted
from .base import Verdict
from .question import LEAST, NO, YES, log_probability, plain, verdict, word_of

NO_LOGS = "the server's answer has no log-probabilities of its first token"
THINKS = "the server's model thinks before it answers, and its first token is not of the answer"
_NAMES = "think|thinking|thought|reasoning"
_OPENS = re.compile(rf"\s*(?:<(?:{_NAMES})>|\[THINK\]|◁think▷|<\|begin_of_thought\|>)", re.IGNORECASE)
_CLOSES = re.compile(rf"</(?:{_NAMES})>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>", re.IGNORECASE)
_SAME = 0.01  # two numbers of one token may differ by their rounding
_LOST = 1e-7  # a probability below this is lost when the listed ones are subtracted from 1


@dataclass(frozen=True)
class Token:
    """Its text, and its log-probability: -inf if it cannot come, None if it is not known."""

    text: str
    log: float | None

    @property
    def p(self) -> float:
        return 0.0 if self.log is None else math.exp(self.log)


@dataclass(frozen=True)
class Place:
    """One token of an answer, and the alternatives in its place."""

    sampled: Token | None
    listed: list[Token] = field(default_factory=list)


def read_answer(answer: Any) -> Verdict:
    """A server's answer as a verdict.

    Every spelling of yes and of no counts, from both places. A word that is not listed is at most as likely as the least
    likely token that is, and as what the listed ones leave.

    Raises:
        ValueError: no log-probabilities, neither yes nor no, a thought, or not enough to tell.
    """
    choice = _choice(answer)
    content, thought = _message(choice, answer)
    places = _places(choice, answer)
    if not places:
        raise ValueError(NO_LOGS + _instead(answer, content))
    place = _answered(places, content, thought)
    if len(places) == 1:
        place = _named(place, content)
    if not any(t.log is not None and t.log > LEAST for t in (*place.listed, *filter(None, [place.sampled]))):
        raise ValueError(NO_LOGS + _instead(answer, content))
    said, stands = word_of(content), word_of(place.sampled.text) if place.sampled else ""
    if {said, stands} == {YES, NO}:
        raise ValueError(f"the server answered {said}, but its log-probabilities are those of {stands}")
    return _judged(place)


@dataclass(frozen=True)
class _Word:
    """The log-probability of all spellings of a word: between low and high, where one of them has no number."""

    low: float
    high: float
    listed: bool

    @property
    def log(self) -> float:
        return self.high if self.low == -math.inf else self.low


def _judged(place: Place) -> Verdict:
    tokens, head = _union(place)
    left = math.log(max(1 - sum(t.p for t in tokens), _LOST))
    if not any(word_of(t.text) in (YES, NO) and t.log is not None for t in tokens):
        raise ValueError(_neither(tokens, head, left))
    yes, no = (_word(word, tokens, left) for word in (YES, NO))
    others = [t.log for t in tokens if word_of(t.text) not in (YES, NO) and t.log is not None]
    # A sampled token without a number has, at most, all that the listed ones leave; so has one that is not told at all.
    unknown = [left] if head is None or head.log is None else []
    try:
        found = verdict(yes.log, no.log, max(others + unknown, default=-math.inf))
    except ValueError:
        raise ValueError(_neither(tokens, head, left)) from None
    if np.logaddexp(yes.log, no.log) < max(unknown, default=-math.inf):
        raise ValueError(_neither(tokens, head, left))
    inexact = yes.low < yes.high or no.low < no.high
    if inexact and not (yes.low > no.high or no.low > yes.high):
        raise ValueError("the server's log-probabilities leave open whether yes or no is likelier")
    return found if yes.listed and no.listed else Verdict(found.score, yes.listed)


def _word(word: str, tokens: list[Token], left: float) -> _Word:
    logs = [t.log for t in tokens if word_of(t.text) == word]
    if not logs:
        most = min([left, *(t.log for t in tokens if t.log is not None)])
        return _Word(most, most, False)
    known = log_probability(log for log in logs if log is not None)
    return _Word(known, float(np.logaddexp(known, left)) if None in logs else known, True)


def _union(place: Place) -> tuple[list[Token], Token | None]:
    """Every token that is known of, once, and the sampled one, with its number where one of the two places tells it."""
    tokens, sampled = list(dict.fromkeys(place.listed)), place.sampled
    if sampled is None:
        return tokens, None
    left = 1 - sum(t.p for t in tokens)
    twins = [t for t in tokens if plain(t.text).strip() == plain(sampled.text).strip()]
    if sampled.log is None or sampled.log <= LEAST:  # the likeliest token cannot be one that cannot come
        twin = max(twins, key=lambda t: t.p, default=None)
        return (tokens, twin) if twin is not None and twin.p >= left else (tokens, Token(sampled.text, None))
    for t in twins:
        alike = t.log is not None and abs(t.log - sampled.log) < _SAME
        # Other numbers of the same text are another token's (" Yes" beside "Yes"), unless both together were more than 1.
        if alike or (t.p == max(u.p for u in tokens) and sampled.p > left + _SAME):
            return tokens, t
    return [*tokens, sampled], sampled


def _neither(tokens: list[Token], head: Token | None, left: float) -> str:
    said = max(tokens, key=lambda t: t.p, default=None)
    if head is not None and head.log is None and (said is None or said.p < math.exp(left)):
        if word_of(head.text) in (YES, NO):
            return f"the server gives no log-probability of what it answered, {_shown(head.text)}"
        said = head
    return f"the server answered neither yes nor no but {_shown(said.text) if said else repr('nothing')}"


def _shown(text: str) -> str:
    shown = redacted(plain(text))  # before it is in small letters: a key would not be known in them
    return repr((shown.strip().lower() or shown)[:40])


# Which token is the answer's first


def _answered(places: list[Place], content: str, thought: str) -> Place:
    """The place of the first token that says something, behind a thought that is over. ValueError: it is not over."""
    texts = [plain(place.sampled.text) if place.sampled else "" for place in places]
    starts = [0, *itertools.accumulate(map(len, texts))]
    said, begin = "".join(texts), 0
    if closed := list(_CLOSES.finditer(said)):
        begin = closed[-1].end()
    elif found := _OPENS.match(said):
        raise ValueError(f"{THINKS} ({found[0].strip()})")
    elif thought.strip():
        begin = _behind(said, content, thought)
    first = next((i for i in range(len(places)) if starts[i] >= begin), None)
    if first is None:
        raise ValueError(THINKS)
    while first < len(places) - 1 and not word_of(texts[first]) and not _answers(places[first]):
        first += 1  # a blank, a line end, a quote or Markdown's stars before the word
    return places[first]


def _behind(said: str, content: str, thought: str) -> int:
    """Finds where `content` begins in what the tokens say, of a server that tells its model's thought apart."""
    tokens, answer, reasons = ("".join(text.split()) for text in (said, content, thought))
    if answer and tokens != answer and tokens.endswith(reasons[-20:] + answer):
        letters = [i for i, letter in enumerate(said) if not letter.isspace()]
        return letters[-len(answer) - 1] + 1
    if answer and tokens and answer.startswith(tokens) and not reasons.startswith(tokens):
        return 0
    raise ValueError(THINKS)


def _answers(place: Place) -> bool:
    """Tells whether the likeliest alternative is yes or no: then a sampled token without a text is that."""
    likeliest = max(place.listed, key=lambda t: t.p, default=None)
    return likeliest is not None and likeliest.p > 0 and word_of(likeliest.text) in (YES, NO)


def _named(place: Place, content: str) -> Place:
    """The only place of an answer, its token named by the answer where the server does not name it."""
    sampled, word = place.sampled, next(iter(content.split()), "")
    if not word or (sampled is not None and sampled.text and not re.fullmatch(r"token_id:\d+", sampled.text)):
        return place
    if sampled is None:
        return Place(Token(word, None), place.listed)
    twins = [t for t in place.listed if t.text == sampled.text and None not in (t.log, sampled.log)]
    same = [t for t in twins if abs((t.log or 0.0) - (sampled.log or 0.0)) < _SAME]
    return Place(Token(word, sampled.log), [t for t in place.listed if t not in same])


# The shapes of answers


def _choice(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    choice = choices[0] if isinstance(choices, list) and choices else answer
    return choice if isinstance(choice, Mapping) else {}


def _message(choice: Mapping[str, Any], answer: Any) -> tuple[str, str]:
    """The text that was answered, and the thought before it."""
    message = choice.get("message")
    if not isinstance(message, Mapping):
        message = {"content": choice.get("text")}
    texts: list[Any] = []
    thoughts = [message.get(name) for name in ("reasoning_content", "reasoning", "thinking")]
    content = message.get("content")
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping):
            plain_text = part.get("type") in (None, "text", "output_text")
            (texts if plain_text else thoughts).append(part.get("text") or part.get("thinking"))
    text = "".join(t for t in texts if isinstance(t, str))
    thought = " ".join(t if isinstance(t, str) else "..." for t in thoughts if t)
    if closed := list(_CLOSES.finditer(text)):
        return text[closed[-1].end() :], thought + text[: closed[-1].end()]
    if _OPENS.match(text):
        return "", thought + text
    if not text.strip() and not thought and _count_of_thoughts(answer):
        thought = "..."
    return text, thought


def _count_of_thoughts(answer: Any) -> Any:
    """OpenAI's count of the tokens that went into a thought which is not shown."""
    for name in ("usage", "completion_tokens_details", "reasoning_tokens"):
        answer = answer.get(name) if isinstance(answer, Mapping) else None
    return answer


def _instead(answer: Any, content: str) -> str:
    """Returns what the server says where it has no log-probabilities: an error, or an answer without them."""
    error = answer.get("error") if isinstance(answer, Mapping) else None
    error = error.get("message") if isinstance(error, Mapping) else error
    if isinstance(error, str) and error:
        return f": {' '.join(redacted(error).split())[:200]}"
    return f", it only says {_shown(content)}" if content.strip() else ""


def _places(choice: Mapping[str, Any], answer: Any) -> list[Place]:
    """OpenAI's choices[0].logprobs, of chats or of completions, or llama.cpp's completion_probabilities."""
    told = [choice.get("logprobs"), choice.get("completion_probabilities")]
    told += [answer.get("completion_probabilities")] if isinstance(answer, Mapping) else []
    return next(filter(None, map(_read_places, told)), [])


def _read_places(told: Any) -> list[Place]:
    if isinstance(told, Mapping):
        if isinstance(told.get("content"), list) and told["content"]:
            told = told["content"]
        else:
            columns = [told.get(name) for name in ("tokens", "token_logprobs", "top_logprobs")]
            rows = itertools.zip_longest(*(c if isinstance(c, list) else [] for c in columns))
            return [Place(_sampled(token, log), list(_listed(top))) for token, log, top in rows]
    return [_place(item) for item in told if isinstance(item, Mapping)] if isinstance(told, list) else []


def _place(item: Mapping[str, Any]) -> Place:
    names = ("top_logprobs", "top_probs", "probs")
    return Place(
        _sampled(_text(item), _log(item)),
        list(_listed(next((item[n] for n in names if item.get(n)), None))),
    )


def _sampled(text: Any, log: Any) -> Token | None:
    """A null is no number here: the sampled token is the likeliest."""
    return Token(text, None if log is None else _number(log)) if isinstance(text, str) else None


def _listed(told: Any) -> Iterator[Token]:
    if isinstance(told, Mapping):
        if isinstance(text := _text(told), str):
            yield Token(text, _number(_log(told)))
            return
        for token, log in told.items():
            if isinstance(log, Mapping):  # vLLM's, by token id
                yield Token(str(log.get("decoded_token", token)), _number(_log(log)))
            else:
                yield Token(str(token), _number(log))
    elif isinstance(told, list):
        if len(told) == 2 and isinstance(told[0], str):  # a pair
            yield Token(told[0], _number(told[1]))
        else:
            for item in told:
                yield from _listed(item)


def _text(item: Mapping[str, Any]) -> Any:
    text = next((item[n] for n in ("token", "tok_str", "text", "content") if isinstance(item.get(n), str)), None)
    if text is None and isinstance(item.get("bytes"), list):
        with contextlib.suppress(ValueError, TypeError):
            return bytes(item["bytes"]).decode()
    return text


def _log(item: Mapping[str, Any]) -> Any:
    """The number of a token's object; not-a-number where it has none."""
    for name in ("logprob", "log_prob"):
        if name in item:
            return item[name]
    p = _number(item.get("prob", math.nan), most=1.0)
    return math.nan if p is None or p < 0 else math.log(p) if p else -math.inf


def _number(value: Any, most: float = 0.0) -> float | None:
    """null, in a list of alternatives, is -inf; what is no log-probability is not known."""
    if value is None:
        return -math.inf
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(number) or number > most + _SAME else min(number, most)
