"""sana15 demo on a tiny model: the sheet, its verdicts, the table, and the comparison with stock diffusers."""

import json

import numpy as np
import pytest
import tiny_pipeline
import torch
from PIL import Image

from sana15.cli import main
from sana15.evaluation.demo import SCALE, Stock, Tile, chosen_prompts, contact_sheet, timing_table
from sana15.evaluation.layout import judge_folder
from sana15.sampling.pipeline import Pipeline
from sana15.sampling.settings import Sampling
from sana15.scenes.spec import spec_from_metadata
from sana15.scenes.testset import is_held_out
from sana15.scenes.vocabulary import CATEGORIES


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_pipeline.make(tmp_path_factory.mktemp("tiny"))


def test_demo(model, tmp_path, capsys):
    arguments = ["demo", "--model", str(model), "--steps", "2", "--per-category", "2", "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for expected in (*CATEGORIES, "mean of categories", "diffusers, eager", "compiled kernels: ", "sheet.png"):
        assert expected in printed
    assert "no times" not in printed

    sheet = Image.open(tmp_path / "sheet.png")
    described = json.loads(sheet.info["sana15"])
    judged, _ = judge_folder(tmp_path / "pictures")
    assert len(judged) == 12
    assert [(t["prompt"], t["wrong"]) for t in described["tiles"]] == [(j.prompt, j.reasons[0]) for j in judged]
    assert "Steps: 2, Sampler: flow_dpm" in sheet.info["parameters"]
    first = np.asarray(Image.open(tmp_path / "pictures" / "00000" / "samples" / "0000.png"))
    enlarged = first.repeat(SCALE, 0).repeat(SCALE, 1)
    assert np.array_equal(np.asarray(sheet)[10 : 10 + 64 * SCALE, 10 : 10 + 64 * SCALE], enlarged)

    assert main(["eval", str(tmp_path / "pictures")]) == 0  # GenEval's layout
    capsys.readouterr()
    assert main([*arguments, "--seed", "1", "--no-timing"]) == 0  # a second run replaces the first
    assert "diffusers, eager" not in capsys.readouterr().out
    assert json.loads(Image.open(tmp_path / "sheet.png").info["sana15"])["seed"] == 1


def test_prompts_of_every_category_seen_and_held_out():
    lines = chosen_prompts(8)
    assert [line["tag"] for line in lines] == [c for c in CATEGORIES for _ in range(8)]
    assert len({line["prompt"] for line in lines}) == 48
    held_out = [is_held_out(spec_from_metadata(line)) for line in lines]
    assert [sum(held_out[i : i + 8]) for i in range(0, 48, 8)] == [0, 4, 4, 4, 4, 4]


def test_verdicts_are_coloured():
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    for wrong, strong in (("", 1), ("expected 1 star, found 0", 0)):  # green and red
        sheet = np.asarray(contact_sheet([Tile(grey, "a star", 0, wrong)], 1)).astype(int)
        colored = sheet[sheet.max(-1) - sheet.min(-1) > 60]
        assert len(colored) > 20
        assert (colored.argmax(-1) == strong).mean() > 0.9


def test_stock_is_the_same_model(model):
    ours = Pipeline.from_pretrained(model)
    text, mask = ours.text.encode(["a red circle", "two stars left"])
    latents, t = torch.randn(2, 16, 8, 8), torch.tensor([900.0, 20.0])
    with torch.no_grad():
        one = ours.transformer(latents, text, t, mask)
        two = Stock(model / "transformer")(latents, text, t, mask)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_no_times_for_another_model(model):
    ours = Pipeline.from_pretrained(model)
    with torch.no_grad():
        ours.transformer.proj_out.weight.add_(0.1)
    table = timing_table(ours, Sampling(steps=2), [{"prompt": "a ring"}] * 8)
    assert table.count("no times: ") == 2
    assert " s  " not in table


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--per-category", "0"], 2, "--per-category must be at least 1"),
        (["--per-category", "500"], 2, "--per-category is too large"),
        (["--steps", "0"], 2, "steps must be a positive integer"),
        (["--model", "{tmp}/none"], 3, "is not a pipeline folder"),
    ],
)
def test_mistakes(model, arguments, code, message, tmp_path, capsys):
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    assert main(["demo", "--model", str(model), "--out", str(tmp_path / "out"), *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pictures_that_the_checker_cannot_judge(tmp_path, capsys):
    small = tiny_pipeline.make(tmp_path / "small", sample_size=4)
    assert main(["demo", "--model", str(small), "--out", str(tmp_path / "out")]) == 2
    assert "does not make 64x64 pictures" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
