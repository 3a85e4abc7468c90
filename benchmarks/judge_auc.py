"""How well the learned judge tells right pictures of the mini model from wrong ones: its AUC, the exact checker as truth.

    python benchmarks/judge_auc.py              # every fourth prompt of the test set, 8 pictures each
    python benchmarks/judge_auc.py --smoke

Intervals are by bootstrap over prompts, whose pictures are alike.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sana15.judges.learned import LearnedJudge
from sana15.judges.scene import SceneJudge
from sana15.pipeline import Pipeline
from sana15.scenes.testset import load


def auc(scores: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """The part of the pairs (right picture, wrong picture) that the scores put in order; ties count half."""
    right, wrong = scores[correct], np.sort(scores[~correct])
    if not len(right) or not len(wrong):
        return float("nan")
    below, upto = np.searchsorted(wrong, right, "left"), np.searchsorted(wrong, right, "right")
    return float((below + upto).mean() / 2 / len(wrong))


def interval(scores: NDArray[np.float64], correct: NDArray[np.bool_], draws: int = 1000) -> tuple[float, float]:
    """95 % over prompts; scores and correct [prompts, pictures]."""
    rng = np.random.default_rng(0)
    rows = rng.integers(len(scores), size=(draws, len(scores)))
    values = np.array([auc(scores[r].ravel(), correct[r].ravel()) for r in rows])
    defined = values[np.isfinite(values)]  # of draws with pictures of both kinds
    low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (np.nan, np.nan)
    return float(low), float(high)


def line(name: str, scores: NDArray[np.float64], correct: NDArray[np.bool_]) -> str:
    low, high = interval(scores, correct)
    rows = np.arange(len(scores))
    picked, oracle = correct[rows, scores.argmax(1)].mean(), correct.any(1).mean()
    return (
        f"| {name} | {len(scores)} | {auc(scores.ravel(), correct.ravel()):.3f} | {low:.3f} - {high:.3f} "
        f"| {correct.mean():.3f} | {picked:.3f} | {oracle:.3f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--judge", default="", help="folder of a learned judge; default: the one in the package")
    parser.add_argument("--every", type=int, default=4, help="every Nth prompt of the test set")
    parser.add_argument("--n", type=int, default=8, help="pictures per prompt")
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--smoke", action="store_true", help="few pictures of two steps: that it runs")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.every, args.n = 60, 2
    entries = load()[:: args.every]
    pipe = Pipeline.from_pretrained(args.model)
    steps = 2 if args.smoke else 20
    made = pipe([e["prompt"] for e in entries], n=args.n, seed=args.seed, steps=steps, batch_size=64)
    learned, exact = LearnedJudge.load(args.judge) if args.judge else LearnedJudge.load(), SceneJudge()
    pairs = list(zip(entries, made))
    scores = np.array([[v.score for v in learned.judge(pictures, entry)] for entry, pictures in pairs])
    correct = np.array([[bool(v.correct) for v in exact.judge(pictures, entry)] for entry, pictures in pairs])
    tags = np.array([entry["tag"] for entry in entries])
    print(f"| category | prompts | AUC | 95 % | score | picked 1 of {args.n} | any of {args.n} |")
    print("|---" * 7 + "|")
    for tag in dict.fromkeys(tags.tolist()):
        print(line(tag, scores[tags == tag], correct[tags == tag]))
    print(line("all", scores, correct))


if __name__ == "__main__":
    main()
