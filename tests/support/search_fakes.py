"""A generator of grey pictures whose quality is known, and judges that read it: what searches are tested with."""

import math
import threading

from PIL import Image

from sana15.judges import Verdict
from sana15.sampling.settings import Seed


class Grey:
    """A generator whose pictures are one grey, their quality; a preview's is between it and a random one's."""

    steps, can_pause = 8, True

    def __init__(self):
        self.started, self.finished, self.evaluated = [], [], 0

    def check(self, prompts):
        pass

    def identity(self):
        return {"model": "grey"}

    def describe(self, item):
        names = ("negative_prompt", "steps", "sampler", "guidance", "model", "version")
        return dict.fromkeys(names, "") | {"prompt": item.prompt, "model_sha256": "", "candidate": item.candidate}

    def evaluations(self, first, last):
        return 2 * (last - first)

    def start(self, prompts, seeds):
        self.started.append([s.candidate for s in seeds])
        return [(seed, 0) for seed in seeds]

    def advance(self, state, to_step):
        self.evaluated += sum(self.evaluations(step, to_step) for _, step in state)
        return [(seed, to_step) for seed, _ in state]

    def preview(self, state):
        return [grey(0.5 * quality(s) + 0.5 * quality(Seed(*s[:2], s.candidate + 1000))) for s, _ in state]

    def select(self, state, indices):
        return [state[i] for i in indices]

    def finish(self, state):
        state = self.advance(state, self.steps)
        self.finished += [seed for seed, _ in state]
        return [grey(quality(seed)) for seed, _ in state]


def quality(seed):
    return (seed.number() >> 30) % 250 / 250


def grey(value):
    return Image.new("RGB", (8, 8), (round(value * 250),) * 3)


class Meter:
    """Reads the grey; optionally compares, with a bias to what it sees first."""

    name = "meter"

    def __init__(self, sign=1):
        self.sign, self.calls = sign, 0

    def identity(self):
        return {"judge": self.name, "sign": self.sign}

    def judge(self, pictures, line):
        self.calls += len(pictures)
        values = [p.getpixel((0, 0))[0] / 250 for p in pictures]
        return [Verdict(self.sign * v, v > 0.5, "seen") for v in values]


class Comparing(Meter):
    def __init__(self, bias=0.0):
        super().__init__()
        self.bias = bias

    def prefer(self, a, b, line):
        self.calls += 1
        return a.getpixel((0, 0))[0] / 250 + self.bias > b.getpixel((0, 0))[0] / 250


class Moody(Meter):
    """Fails on one prompt for as long as it is in the mood."""

    def __init__(self, mood):
        super().__init__()
        self.mood = mood

    def judge(self, pictures, line):
        if line["prompt"] == "two" and self.mood:
            if self.mood == "nonsense":
                return [Verdict(math.nan)] * len(pictures)
            if self.mood == "slow":
                threading.Event().wait(0.5)
            raise RuntimeError("no connection")
        return super().judge(pictures, line)


PROMPTS = ["one", "two", "three"]


def qualities(prompt, n=16):
    return [quality(Seed(0, prompt, c)) for c in range(n)]


def best(prompt, n, pick):
    return sorted(range(n), key=lambda c: -qualities(prompt, n)[c])[:pick]
