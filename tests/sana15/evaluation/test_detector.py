"""GenEval's rules on photos: a detector with random weights, its boxes, the rules on boxes, and the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sana15.cli import main
from sana15.evaluation.detector import Box, ClipColors, PhotoDetector, judge, kept
from sana15.evaluation.layout import picture_path, write_metadata
from sana15.scenes.vocabulary import COLOR_NAMES

NAMES = ["person", "bench", "mouse"]


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    """A Mask2Former with one-layer parts and random weights."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6,
        id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("detector")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 64, "longest_edge": 90}}))
    return folder


class Fixed(torch.nn.Module):
    """What a model would say of an 80x60 picture scaled by one half: two masks, one of them sure to be a bench."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"id2label": dict(enumerate(NAMES))})

    def forward(self, pixel_values, pixel_mask):
        assert pixel_values.shape == (1, 3, 32, 64)  # 40x30, filled up to multiples of 32
        assert torch.equal(pixel_values[..., 30:, :], torch.zeros(1, 3, 2, 64))
        masks = torch.full((1, 2, 8, 16), -20.0)
        masks[0, 0, 2:5, 1:4] = 20.0
        masks[0, 1, :, 12:] = 20.0  # in the padding alone: no object
        classes = torch.tensor([[[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0]]])
        return type("Out", (), {"masks_queries_logits": masks, "class_queries_logits": classes})


def test_boxes_are_in_the_picture_s_pixels():
    found = PhotoDetector(Fixed(), size=(30, 1000)).detect(Image.new("RGB", (80, 60)))
    assert list(found) == ["bench"]
    (best, *_) = found["bench"]
    # Cells are 4 pixels of the scaled picture, 8 of ours; a bilinear border lies half way between two cells' centres.
    assert best.box == pytest.approx((8, 16, 32, 40), abs=1)
    assert best.mask.shape == (60, 80)
    assert best.mask[20:36, 12:28].all()
    assert 0.9 < best.score < torch.tensor([0.0, 9, 0, 0]).softmax(0)[1]  # times the mask's own certainty


def test_a_random_detector_loads_and_answers(detector_folder):
    detector = PhotoDetector.load(str(detector_folder))
    assert detector.size == (64, 90)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    found = detector.detect(picture)
    assert found
    assert sum(map(len, found.values())) <= 6
    for name, boxes in found.items():
        assert name in NAMES
        assert [b.score for b in boxes] == sorted((b.score for b in boxes), reverse=True)
        for b in boxes:
            ys, xs = b.mask.nonzero()
            assert b.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert 0 < b.score < 1
    again = detector.detect(picture)
    assert {k: [b.box for b in v] for k, v in again.items()} == {k: [b.box for b in v] for k, v in found.items()}


def box(x, y, score=0.95, side=10):
    return Box((x, y, x + side, y + side), score, np.ones((1, 1), bool))


def test_what_is_kept():
    found = {"bench": [box(0, 0, s) for s in (0.95, 0.5, 0.3)], "person": [box(0, 0, 0.2)], "mouse": [box(0, 0)] * 20}
    assert {name: len(boxes) for name, boxes in kept(found, "colors").items()} == {"bench": 2, "mouse": 16}
    assert {name: len(boxes) for name, boxes in kept(found, "counting").items()} == {"bench": 1, "mouse": 16}


@pytest.mark.parametrize(
    ("include", "exclude", "reason"),
    [
        ([{"class": "bench", "count": 2}], [], ""),
        ([{"class": "bench", "count": 3}], [], "expected bench>=3, found 2"),
        ([{"class": "bench", "count": 2}], [{"class": "bench", "count": 2}], "expected bench<2, found 2"),
        ([{"class": "dog", "count": 1}, {"class": "bench", "count": 3}], [], "expected dog>=1, found 0\nexpected bench>=3, found 2"),
        ([{"class": "bench", "count": 1, "color": "red"}], [], ""),
        ([{"class": "bench", "count": 2, "color": "red"}], [], "expected red bench>=2, found 1"),
        ([{"class": "cat", "count": 1}, {"class": "bench", "count": 1, "position": ["left of", 0]}], [], ""),
        ([{"class": "cat", "count": 1}, {"class": "bench", "count": 1, "position": ["above", 0]}], [], "expected bench above target"),
        (
            [{"class": "cat", "count": 1}, {"class": "bench", "count": 2, "position": ["left of", 0]}], [],
            "expected bench left of target",
        ),
        (
            [{"class": "dog", "count": 1}, {"class": "bench", "count": 1, "position": ["left of", 0]}], [],
            "expected dog>=1, found 0\nno target for bench to be left of",
        ),
    ],
)  # fmt: skip
def test_the_rules(include, exclude, reason):
    """Two benches, the surer one red and on the left of a cat, the other on its right."""
    found = {"bench": [box(0, 0), box(90, 0, 0.8)], "cat": [box(50, 0)]}
    colors = {0: "red", 90: "blue"}
    line = {"include": include, "exclude": exclude}
    assert judge(found, line, lambda boxes, name: [colors[b.box[0]] for b in boxes]) == reason


def test_colours_are_read_from_the_object_alone():
    """A CLIP whose vectors are mean colours; the object is a blue disc on red."""
    table = torch.eye(len(COLOR_NAMES))
    crops = []

    def pictures(given):
        crops.extend(given)
        vectors = torch.zeros(len(given), len(COLOR_NAMES))
        for i, crop in enumerate(given):
            r, _, b = crop.getpixel((crop.width // 2, crop.height // 2))
            vectors[i, COLOR_NAMES.index("blue" if b > r else "red")] = 1
        return vectors

    texts = []

    def words(given):
        texts.extend(given)
        return torch.stack([table[next(i for i, c in enumerate(COLOR_NAMES) if c in text)] for text in given])

    picture = Image.new("RGB", (40, 40), (255, 0, 0))
    picture.paste((0, 0, 255), (10, 10, 20, 20))
    mask = np.zeros((40, 40), bool)
    mask[10:20, 10:18] = True
    reader = ClipColors(pictures, words)
    assert reader(picture, [Box((9.0, 10.0, 20.0, 20.0), 1.0, mask)], "bench") == ["blue"]
    assert crops[0].size == (11, 10)
    assert crops[0].getpixel((0, 0)) == (0x99, 0x99, 0x99)
    assert crops[0].getpixel((10, 5)) == (0x99, 0x99, 0x99)  # blue, but not of the mask
    assert texts[:3] == [f"a photo of a {c} bench" for c in COLOR_NAMES[:1]] + [
        f"a photo of a {COLOR_NAMES[0]}-colored bench", f"a photo of a {COLOR_NAMES[0]} object",
    ]  # fmt: skip
    assert len(texts) == 30
    reader(picture, [Box((0.0, 0.0, 5.0, 5.0), 1.0, mask)], "bench")
    assert len(texts) == 30  # known by now


def test_open_clip_tells_colours():
    open_clip = pytest.importorskip("open_clip")
    assert open_clip
    picture = Image.new("RGB", (40, 40), (255, 0, 0))
    found = ClipColors.load("open_clip:RN50-quickgelu")(
        picture, [Box((0.0, 0.0, 40.0, 40.0), 1.0, np.ones((40, 40), bool))], "x"
    )
    assert found[0] in COLOR_NAMES


@pytest.fixture
def photos(tmp_path):
    lines = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "single_object", "include": [{"class": "computer mouse", "count": 1}], "prompt": "a photo of a computer mouse"},
    ]  # fmt: skip
    write_metadata(tmp_path / "photos", lines)
    for i in range(2):
        Image.new("RGB", (48, 40), (200, 90, i)).save(picture_path(tmp_path / "photos", i, 0))
    return tmp_path / "photos"


def test_the_command(photos, detector_folder, capsys):
    assert main(["eval", str(photos), "--detector", str(detector_folder)]) == 0
    assert "2 prompts, 1 pictures each, verdicts of the file" in capsys.readouterr().out
    rows = [json.loads(line) for line in (photos / "results.jsonl").read_text().splitlines()]
    assert [row["filename"] for row in rows] == [str(picture_path(photos, i, 0)) for i in range(2)]
    for row in rows:
        details = json.loads(row["details"])
        assert set(details) <= {*NAMES, "computer mouse"}
        wanted = json.loads(row["metadata"])["include"][0]["class"]
        assert row["correct"] == (wanted in details)
        assert row["correct"] or row["reason"] == f"expected {wanted}>=1, found 0"


@pytest.mark.parametrize(
    ("change", "message", "code"),
    [
        ({"class": "zebra", "count": 1}, "the detector knows no 'zebra'", 2),
        ({"class": "bench", "count": 1, "color": "red"}, "asks for a colour", 2),
        ({"count": 1}, "no GenEval metadata", 3),
    ],
)
def test_photos_that_cannot_be_judged(photos, detector_folder, capsys, change, message, code):
    path = photos / "00001/metadata.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"include": [change]}))
    assert main(["eval", str(photos), "--detector", str(detector_folder)]) == code
    assert message in capsys.readouterr().err.splitlines()[-1]  # above it, transformers tells of its loading
    assert not (photos / "results.jsonl").exists()
    assert main(["eval", str(photos), "--detector", str(photos)]) == 3
    assert "is no Mask2Former" in capsys.readouterr().err
