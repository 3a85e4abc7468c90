"""The words of the scenes: shapes, colours, relations, numbers, and how the prompts spell them.

The ten colour names are GenEval's. Their RGB values lie far apart from each other and from every background grey
(at least 0.40 in the unit cube), so that a colour survives an autoencoder, jitter and light.
"""

IMAGE_SIZE = 64
MAX_COUNT = 4
MIN_DIAMETER, MAX_DIAMETER = 14.0, 26.0  # pixels; below 14 a star is no star behind an 8x autoencoder

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "heart")

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.06, 0.10),
    "orange": (1.00, 0.52, 0.02),
    "yellow": (0.99, 0.93, 0.12),
    "green": (0.08, 0.62, 0.14),
    "blue": (0.08, 0.22, 0.92),
    "purple": (0.52, 0.08, 0.72),
    "pink": (1.00, 0.46, 0.74),
    "brown": (0.40, 0.20, 0.05),
    "black": (0.03, 0.03, 0.04),
    "white": (0.97, 0.97, 0.96),
}
COLOR_NAMES = tuple(COLORS)

# "subject RELATION reference": the first object is on that side of the second.
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
NUMBER_WORDS = {number: word for word, number in NUMBERS.items()}

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def plural(shape: str) -> str:
    """The plural by the s/es rule: circles, crosses."""
    return shape + ("es" if shape.endswith("s") else "s")


PLURALS = {plural(shape): shape for shape in SHAPES}


def with_article(words: str) -> str:
    """`words` behind "a" or "an": an orange circle."""
    return ("an " if words[0] in "aeiou" else "a ") + words
