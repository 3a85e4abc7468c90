"""sana15 eval: GenEval's folders judged by the exact checker, scores and their intervals, and damaged folders."""

import json
from random import Random

import numpy as np
import pytest
from PIL import Image

from sana15.cli import main
from sana15.evaluation.layout import Judged, judge_folder, metadata_path, picture_path, write_metadata
from sana15.evaluation.scores import score_table
from sana15.scenes.render import render
from sana15.scenes.scene import sample_scene
from sana15.scenes.spec import spec_from_metadata
from sana15.scenes.testset import load


@pytest.fixture(scope="module")
def lines():
    """Two seen and two held-out prompts of two categories."""
    every = load()
    return [*every[56:58], *every[58 + 38 : 58 + 40], *[line for line in every if line["tag"] == "colors"][-4:]]


@pytest.fixture
def folder(lines, tmp_path):
    """Right pictures for every prompt, then candidate 1 of the first prompt and all of the last exchanged for wrong ones."""
    write_metadata(tmp_path, lines)
    for index, line in enumerate(lines):
        for candidate in range(2):
            wrong = (index, candidate) == (0, 1) or index == len(lines) - 1
            spec = spec_from_metadata(lines[3] if wrong else line)
            picture = render(sample_scene(spec, Random(f"{index}/{candidate}")))
            Image.fromarray(picture).save(picture_path(tmp_path, index, candidate))
    return tmp_path


def test_scores_of_a_folder(folder, lines, capsys, tmp_path):
    assert main(["eval", str(folder), "--json", str(tmp_path / "scores.json")]) == 0
    printed = capsys.readouterr().out
    assert "8 prompts, 2 pictures each" in printed
    result = json.loads((tmp_path / "scores.json").read_text())
    scores = {row: cells["all"]["value"] for row, cells in result["scores"].items()}
    assert scores["two_object"] == pytest.approx(7 / 8)
    assert scores["colors"] == pytest.approx(3 / 4)
    assert scores["mean of categories"] == pytest.approx(13 / 16)
    assert result["scores"]["two_object"]["any"]["value"] == 1.0
    assert result["prompts"][0]["correct"] == [True, False]
    assert result["prompts"][0]["reasons"][1]
    assert [p["held_out"] for p in result["prompts"]].count(True) == sum(
        cells["held out"]["prompts"]
        for row, cells in result["scores"].items()
        if "mean" not in row and "held out" in cells
    )
    assert f"{13 / 16:.3f}" in printed
    assert main(["eval", str(folder), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == result  # the same bootstrap every time


def test_two_runs_are_compared_prompt_by_prompt(folder, lines, capsys, tmp_path):
    other = tmp_path / "other"
    write_metadata(other, lines)
    for index, line in enumerate(lines):
        right = render(sample_scene(spec_from_metadata(line), Random(f"other {index}")))
        Image.fromarray(right).save(picture_path(other, index, 0))  # all right, one picture each
    scores = tmp_path / "scores.json"
    assert main(["eval", str(folder), "--against", str(other), "--json", str(scores)]) == 0
    printed = capsys.readouterr().out
    assert "8 prompts, 2 pictures each" in printed
    assert "8 prompts, 1 pictures each" in printed
    result = json.loads(scores.read_text())["scores"]
    two = result["two_object"]
    assert [two[c]["value"] for c in ("first", "second", "difference")] == pytest.approx([7 / 8, 1.0, -1 / 8])
    assert result["mean of categories"]["difference"]["value"] == pytest.approx(-3 / 16)
    assert two["difference"]["low"] < -1 / 8 < two["difference"]["high"] == 0.0
    assert f"{-3 / 16:+.3f}" in printed
    assert main(["eval", str(folder), "--against", str(folder), "--json", "-"]) == 0
    same = json.loads(capsys.readouterr().out)["scores"]["mean of prompts"]["difference"]
    assert (same["low"], same["value"], same["high"]) == (0.0, 0.0, 0.0)  # whatever the prompts' own spread
    metadata_path(other, 3).write_text(json.dumps(lines[0]) + "\n")
    assert main(["eval", str(folder), "--against", str(other)]) == 2
    assert "prompt 3 differs" in capsys.readouterr().err


def judged(tag, correct, held_out=False):
    return Judged(0, "", tag, held_out, tuple(correct), ("",) * len(correct))


def test_both_overall_means_and_seen_against_held_out():
    prompts = [judged("colors", [1, 1])] * 2 + [judged("colors", [0, 0], True)] * 4 + [judged("position", [1, 0])] * 2
    table = score_table(prompts, resamples=200)
    assert table["colors"]["all"].value == pytest.approx(1 / 3)
    assert table["mean of categories"]["all"].value == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert table["mean of prompts"]["all"].value == pytest.approx(3 / 8)
    assert table["colors"]["seen"].value == 1.0
    assert table["colors"]["held out"].value == 0.0
    assert "held out" not in table["position"]
    assert table["position"]["any"].value == 1.0
    assert list(table) == ["colors", "position", "mean of categories", "mean of prompts"]


def test_the_interval_is_that_of_prompts_not_of_pictures():
    """Four equal pictures of a prompt tell no more than one: the interval is the binomial's with 200 draws, not 800."""
    rng = np.random.default_rng(0)
    outcomes = rng.random(200) < 0.4
    same = score_table([judged("colors", [bool(o)] * 4) for o in outcomes])["colors"]["all"]
    apart = score_table([judged("colors", rng.random(4) < 0.4) for _ in range(200)])["colors"]["all"]
    p = outcomes.mean()
    expected = 1.96 * np.sqrt(p * (1 - p) / 200)
    assert (same.high - same.low) / 2 == pytest.approx(expected, rel=0.05)
    assert (apart.high - apart.low) / 2 == pytest.approx(expected / 2, rel=0.2)


def test_coverage_of_the_interval():
    """Over 400 test sets of 150 prompts drawn from a known truth, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        chances = rng.beta(2, 2, 150)  # each prompt has its own difficulty; the truth is the mean, 1/2
        prompts = [judged("colors", rng.random(4) < chance) for chance in chances]
        score = score_table(prompts, resamples=500)["mean of categories"]["all"]
        held += score.low <= 0.5 <= score.high
    assert 0.92 <= held / 400 <= 0.975


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: picture_path(f, 3, 1).unlink(), "1 pictures are missing, the first is {f}/00003/samples/0001.png"),
        (lambda f: picture_path(f, 3, 0).unlink(), "00003/samples/0000.png is missing, later ones are there"),
        (
            lambda f: picture_path(f, 2, 1).write_bytes(b"no picture"),
            "00002/samples/0001.png is damaged: not a picture",
        ),
        (lambda f: _cut(picture_path(f, 2, 1)), "00002/samples/0001.png is damaged"),
        (lambda f: Image.new("RGB", (32, 64)).save(picture_path(f, 0, 0)), "is 32x64 pixels; the checker judges 64x64"),
        (  # which of the two was judged used to be up to the file system
            lambda f: picture_path(f, 2, 1).rename(f / "00002/samples/0.png"),
            "00002/samples/0.png and 0000.png are the same candidate",
        ),
        (lambda f: (f / "00001" / "metadata.jsonl").unlink(), "00001/metadata.jsonl is missing"),
        (lambda f: (f / "00001" / "metadata.jsonl").write_text("{"), "00001/metadata.jsonl: "),
        (lambda f: (f / "00001").rename(f / "x"), "1 prompts are missing, the first is {f}/00001"),
        (lambda f: _edit(f / "00004" / "metadata.jsonl", "bench"), "00004/metadata.jsonl: unknown shape 'bench'"),
        (lambda f: [p.rename(f / f"x{p.name}") for p in f.glob("0*")], "not GenEval's layout"),
    ],
)
def test_damaged_folders_are_named_in_one_line(folder, damage, message, capsys):
    damage(folder)
    assert main(["eval", str(folder), "--json", str(folder / "scores.json")]) == 3
    error = capsys.readouterr().err
    assert message.format(f=folder) in error
    assert error.count("\n") == 1
    assert not (folder / "scores.json").exists()


def _cut(path):
    path.write_bytes(path.read_bytes()[:-300])


def _edit(path, name):
    line = json.loads(path.read_text())
    line["include"][0]["class"] = name
    path.write_text(json.dumps(line))


def test_wrong_usage(tmp_path, capsys):
    assert main(["eval", str(tmp_path / "none")]) == 3
    assert "is no folder" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), "--resamples", "0"]) == 2
    assert "--resamples must be at least 1" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), "--json", str(tmp_path / "none" / "scores.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_file_names_with_more_digits(folder):
    before = judge_folder(folder)[0]
    for path in sorted(folder.glob("*/samples/*.png")):
        path.rename(path.with_name(f"0{path.name}"))
    assert judge_folder(folder)[0] == before
