"""Specs -> prompts in many wordings, and prompts -> specs.

    prompt = frame(phrase) [on a grey background] [.]
    phrase = noun | noun and noun | noun RELATION noun | noun with noun RELATION it
    noun   = [number] [colour] shape [that is colour]

The parser knows every word that the wordings use. Words that carry nothing (a, photo, showing, ...) may stand anywhere;
a word that it does not know is an error, never ignored.
"""

from collections.abc import Sequence
from functools import cache
from random import Random

from .scene import pick
from .spec import Clause, Spec
from .vocabulary import COLOR_NAMES, MAX_COUNT, NUMBER_WORDS, NUMBERS, PLURALS, SHAPES, plural, with_article

MAX_WORDS = 32
MAX_CHARACTERS = 240

FRAMES = (
    *("{}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}", "a rendering of {}"),
    *("a photo showing {}", "a picture showing {}", "an image showing {}", "a photo with {}", "a picture with {}"),
    *("an image with {}", "a scene with {}", "a scene showing {}", "a simple picture of {}", "a simple image of {}"),
    *("here is {}", "show {}", "draw {}", "this is a photo of {}", "this is a picture of {}"),
)
BACKGROUNDS = ("on a grey background", "on a gray background", "on a plain background", "against a grey background")
AND = ("and", "with", "together with", "as well as", "plus", "and also")
SUBJECT_LINKS = ("", "", "", "placed", "located", "that is", "which is")
DIRECT = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath", "underneath", "lower than"),
}
INVERSE = {
    "left of": ("to the left of it", "on its left", "to its left", "on its left side"),
    "right of": ("to the right of it", "on its right", "to its right", "on its right side"),
    "above": ("above it", "over it"),
    "below": ("below it", "under it", "beneath it", "underneath it"),
}
_EMPTY = "a an the photo picture image drawing rendering scene of showing simple here there is are this show draw"
_EMPTY += " single exactly separate group set both placed located that which in coloured colored"
_OTHER_NUMBERS = ("zero", "no", "five", "six", "seven", "eight", "nine", "ten", "many", "several")


def geneval_wording(spec: Spec) -> str:
    """The prompt as GenEval words it: a photo of three stars; a photo of a ring above a heart."""
    nouns = [_plain_noun(clause) for clause in spec.clauses]
    if spec.relation is not None:
        return f"a photo of {nouns[1]} {spec.relation} {nouns[0]}"
    return "a photo of " + " and ".join(nouns)


def wording(spec: Spec, rng: Random) -> str:
    """One of the many prompts that mean `spec`; the same one for the same state of `rng`."""
    nouns = [_noun(clause, rng) for clause in spec.clauses]
    if spec.relation is None:
        phrase = f" {pick(rng, AND)} ".join(nouns) if len(nouns) == 2 else nouns[0]
        if len(nouns) == 2 and " and " in phrase and rng.random() < 0.1:
            phrase = "both " + phrase
    elif rng.random() < 0.25:
        phrase = f"{nouns[0]} with {nouns[1]} {pick(rng, INVERSE[spec.relation])}"
    else:
        link, relation = pick(rng, SUBJECT_LINKS), pick(rng, DIRECT[spec.relation])
        phrase = " ".join(filter(None, (nouns[1], link, relation, nouns[0])))
    # GenEval's own frame is the one that most prompts in the world have.
    prompt = (FRAMES[1] if rng.random() < 0.2 else pick(rng, FRAMES)).format(phrase)
    if rng.random() < 0.2:
        prompt += " " + pick(rng, BACKGROUNDS)
    if rng.random() < 0.2:
        prompt = prompt[0].upper() + prompt[1:]
    return prompt + ("." if rng.random() < 0.2 else "")


def _plain_noun(clause: Clause) -> str:
    words = clause.shape if clause.count == 1 else plural(clause.shape)
    words = f"{clause.color} {words}" if clause.color else words
    return with_article(words) if clause.count == 1 else f"{NUMBER_WORDS[clause.count]} {words}"


def _noun(clause: Clause, rng: Random) -> str:
    behind = ""
    color = clause.color
    if color and rng.random() < 0.25:
        be = "is" if clause.count == 1 else "are"
        behind = pick(rng, (f" that {be} {color}", f" which {be} {color}", f" in {color}", f" coloured {color}"))
        color = None
    words = (f"{color} " if color else "") + (clause.shape if clause.count == 1 else plural(clause.shape))
    ways: tuple[str, ...]
    if clause.count == 1:
        ways = (with_article(words),) * 4 + (f"one {words}", f"a single {words}")
    else:
        number = NUMBER_WORDS[clause.count]
        ways = (f"{number} {words}",) * 3 + (
            *(f"{clause.count} {words}", f"exactly {number} {words}", f"{number} separate {words}"),
            *(f"a group of {number} {words}", f"a set of {number} {words}"),
        )
    return pick(rng, ways) + behind


@cache
def _phrases() -> dict[tuple[str, ...], tuple[str, object]]:
    """Word sequences and what they mean: (kind, value). Longer sequences are looked for first."""
    table: dict[str, tuple[str, object]] = dict.fromkeys(_EMPTY.split(), ("empty", None))
    table |= dict.fromkeys(BACKGROUNDS, ("empty", None))
    table |= dict.fromkeys(AND, ("and", None))
    table |= {phrase: ("relation", relation) for relation, phrases in DIRECT.items() for phrase in phrases}
    table |= {phrase: ("inverse", relation) for relation, phrases in INVERSE.items() for phrase in phrases}
    table |= {word: ("number", n) for n, word in NUMBER_WORDS.items()} | {str(n): ("number", n) for n in NUMBER_WORDS}
    table |= {color: ("color", color) for color in COLOR_NAMES}
    table |= {shape: ("shape", shape) for shape in SHAPES}
    table |= {word: ("shapes", shape) for word, shape in PLURALS.items()}
    return {tuple(phrase.split()): meaning for phrase, meaning in table.items()}


@cache
def word_list() -> tuple[str, ...]:
    """Every word that a prompt may contain, sorted."""
    return tuple(sorted({word for phrase in _phrases() for word in phrase}))


def normalized(prompt: str) -> list[str]:
    """The prompt's words in lower case, without the punctuation around them."""
    return [word for word in (raw.strip(".,;:!?\"'()").lower() for raw in prompt.split()) if word]


def parse(prompt: str) -> Spec:
    """Parses what a prompt asks for.

    Raises:
        ValueError: the prompt is empty or too long, has a word (a colour, a shape) that is not in the vocabulary, asks
            for more than two kinds or four objects, or does not fit the grammar. The message names the culprit.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt must be a string, got {type(prompt).__name__}")
    words = normalized(prompt[: 4 * MAX_CHARACTERS])
    if len(prompt) > MAX_CHARACTERS or len(words) > MAX_WORDS:
        raise ValueError(f"the prompt is too long: at most {MAX_WORDS} words and {MAX_CHARACTERS} characters")
    if not words:
        raise ValueError("the prompt is empty; try: a red circle")
    clauses, relation = _clauses(_meanings(words), prompt)
    if relation is not None and relation[0] == "relation":
        clauses.reverse()  # the reference first, as in GenEval's include
    spec = Spec(tuple(clauses), str(relation[1]) if relation else None)
    if spec.total() > MAX_COUNT:
        raise ValueError(f"the prompt asks for {spec.total()} objects; at most {MAX_COUNT} fit")
    return spec


def _meanings(words: Sequence[str]) -> list[tuple[str, object]]:
    table, found = _phrases(), []
    longest = max(len(phrase) for phrase in table)
    at = 0
    while at < len(words):
        for length in range(min(longest, len(words) - at), 0, -1):
            meaning = table.get(tuple(words[at : at + length]))
            if meaning is not None:
                found.append(meaning)
                at += length
                break
        else:
            raise ValueError(_unknown(words, at))
    return [meaning for meaning in found if meaning[0] != "empty"]


def _unknown(words: Sequence[str], at: int) -> str:
    word = words[at][:40]
    after = words[at + 1] if at + 1 < len(words) else ""
    before = words[at - 1] if at else ""
    if word.lstrip("-").isdigit() or word in _OTHER_NUMBERS:
        return f"cannot draw {word!r} objects; the counts are 1 to {MAX_COUNT}"
    if after in SHAPES or after in PLURALS:
        return f"unknown colour {word!r}; the colours are {', '.join(COLOR_NAMES)}"
    if before in COLOR_NAMES or before in NUMBERS or before in ("a", "an", "single") or len(words) == 1:
        return f"unknown shape {word!r}; the shapes are {', '.join(SHAPES)}"
    return f"unknown word {word!r}; write for example: a red circle left of a blue square"


def _clauses(meanings: Sequence[tuple[str, object]], prompt: str) -> tuple[list[Clause], tuple[str, object] | None]:
    """The clauses in the prompt's order, and the relation with its form ("relation" or "inverse")."""
    clauses: list[Clause] = []
    relation: tuple[str, object] | None = None
    number, color, joined = None, None, True
    for kind, value in meanings:
        if kind == "number" and number is None:
            number = value
        elif kind == "color" and color is None and joined:
            color = value
        elif kind == "color" and not joined and color is None and number is None and clauses[-1].color is None:
            clauses[-1] = Clause(clauses[-1].shape, clauses[-1].count, str(value))
        elif kind in ("shape", "shapes") and joined and len(clauses) < 2:
            if kind == "shapes" and number is None:
                raise ValueError(f"how many {plural(str(value))}? Write for example: two {plural(str(value))}")
            clauses.append(Clause(str(value), int(str(number or 1)), str(color) if color else None))
            number, color, joined = None, None, False
        elif kind == "and" and not clauses:
            continue  # "a scene with ..."
        elif kind in ("and", "relation") and not joined and len(clauses) == 1:
            joined = True
            relation = (kind, value) if kind == "relation" else None
        elif kind == "inverse" and relation is None and len(clauses) == 2 and not joined:
            relation = (kind, value)
        else:
            raise ValueError(f"cannot read {prompt!r}; write for example: a red circle left of a blue square")
    if not clauses or joined or number is not None or color is not None:
        missing = "the prompt names no shape" if not clauses else f"a shape is missing in {prompt!r}"
        raise ValueError(f"{missing}; the shapes are {', '.join(SHAPES)}")
    return clauses, relation
