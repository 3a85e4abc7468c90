"""The text encoder's own training: right answers for hand-made prompts, learning, and staying as it is afterwards."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sana15.model.autoencoder import MINI_SIZES, Autoencoder
from sana15.model.text import MiniTextEncoder
from sana15.scenes.prompts import parse
from sana15.scenes.vocabulary import COLOR_NAMES, RELATIONS, SHAPES
from sana15.storage.files import DataError
from sana15.training.config import load_config
from sana15.training.run import train
from sana15.training.text_task import QUESTIONS, TextTask, described

SMALL = ["task=text", "device=cpu", "batch_size=64", "text.width=32", "text.heads=2", "warmup=10"]


@pytest.mark.parametrize(
    ("prompt", "noun", "answers"),
    [
        ("a star", "star", ("star", 1, None, None)),
        ("three red rings", "ring", ("ring", 3, "red", None)),
        ("a circle that is blue and a white heart", "circle", ("circle", 1, "blue", None)),
        ("a circle that is blue and a white heart", "heart", ("heart", 1, "white", None)),
        ("a star left of a cross", "star", ("star", 1, None, "left of")),
        ("a star left of a cross", "cross", ("cross", 1, None, "right of")),
        ("a star with a cross above it", "star", ("star", 1, None, "below")),
        ("a star with a cross above it", "cross", ("cross", 1, None, "above")),
    ],
)
def test_answers(prompt, noun, answers):
    shape, count, color, side = answers
    expected = (
        SHAPES.index(shape),
        count - 1,
        len(COLOR_NAMES) if color is None else COLOR_NAMES.index(color),
        len(RELATIONS) if side is None else RELATIONS.index(side),
    )
    assert described(parse(prompt), noun) == expected
    assert all(0 <= answer < count for answer, count in zip(expected, QUESTIONS.values()))


def test_every_noun_is_asked_once(tmp_path):
    task = TextTask(load_config(None, SMALL), "cpu")
    logits, truth = task._answers(["Two stars plus a ring.", "a photo of a red cross, below a heart"])
    assert truth[:, 0].tolist() == [SHAPES.index(s) for s in ("star", "ring", "cross", "heart")]
    assert [tuple(x.shape) for x in logits] == [(4, n) for n in QUESTIONS.values()]


def test_it_learns_and_is_loaded(tmp_path):
    folder = train(
        load_config(
            None, [*SMALL, "lr=4e-3", "ema=0.9", "text.width=64", "steps=250", "sample_every=250", f"out={tmp_path}"]
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = next(line for line in lines if "accuracy_shape" in line)
    assert scores["accuracy_shape"] > 0.95
    assert scores["accuracy_count"] > 0.9
    assert scores["accuracy_relation"] > 0.5
    assert MiniTextEncoder.load(folder).passes == 2


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ae")
    Autoencoder.build(MINI_SIZES).model.half().save_pretrained(folder)
    return folder


def test_a_trained_encoder_stays_as_it_is(autoencoder, tmp_path):
    text = train(load_config(None, [*SMALL, "steps=1", f"out={tmp_path / 'text'}"]))
    options = ["steps=2", "save_every=2", "sample_steps=2", "device=cpu", "batch_size=4", f"out={tmp_path / 'mini'}"]
    options += [f"transformer.autoencoder={autoencoder}", f"transformer.text_encoder={text}"]
    exported = train(load_config(None, options))
    before, after = (load_file(f / "model.safetensors") for f in (text, exported / "text_encoder"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    weights = load_file(exported / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights["caption_projection.linear_1.weight"].shape[1] == 32


def test_a_missing_encoder_is_one_clear_error(autoencoder, tmp_path):
    options = [f"transformer.autoencoder={autoencoder}", f"transformer.text_encoder={tmp_path / 'none'}"]
    with pytest.raises((DataError, FileNotFoundError), match="none"):
        train(load_config(None, [*options, "device=cpu", f"out={tmp_path / 'run'}"]))
