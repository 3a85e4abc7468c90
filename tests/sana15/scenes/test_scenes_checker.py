"""The pixel checker against the renderer, against wrong and damaged pictures, and against nonsense."""

import ast
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

import sana15.scenes
from sana15.experiments import agreement
from sana15.scenes import checker
from sana15.scenes.checker import check, check_batch, relations
from sana15.scenes.corrupt import KINDS, wrong_spec
from sana15.scenes.detect import detect_batch
from sana15.scenes.render import render, render_batch
from sana15.scenes.scene import Background, Object, Scene, sample_scene
from sana15.scenes.spec import Clause, Spec
from sana15.scenes.training import sample_spec
from sana15.scenes.vocabulary import CATEGORIES, COLOR_NAMES, COLORS, IMAGE_SIZE, RELATIONS, SHAPES

PLAIN = Background(grey=0.5, light=(0.05, 0.02), texture=0.02, seed=7)
CIRCLE = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}


def placed(shape, color, cx, cy, diameter=18.0):
    return Object(shape, color, cx, cy, diameter, COLORS[color])


def picture(*objects, background=PLAIN):
    return render(Scene(objects, background))


def test_the_checker_cannot_see_the_scene():
    folder, seen, todo = Path(sana15.scenes.__file__).parent, set(), ["checker", "__init__"]
    while todo:
        module = todo.pop()
        seen.add(module)
        for node in ast.walk(ast.parse((folder / f"{module}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                todo += [name for name in names if name not in seen]
            elif isinstance(node, ast.Import | ast.ImportFrom):
                assert "sana15" not in ast.unparse(node)
    assert "detect" in seen
    assert not seen & {"scene", "render", "training"}


def test_agreement_with_the_renderer():
    result = agreement.measure(1200, seed=21)
    assert result.pairs.total() == 1200
    assert result.agreement >= 0.995, agreement.table(result, "")


def test_agreement_behind_the_mini_autoencoder():
    result = agreement.measure(1200, seed=22, transform=agreement.through_autoencoder(agreement.MINI_AUTOENCODER))
    assert result.agreement >= 0.98, agreement.table(result, "")


def test_agreement_sees_a_transform_that_changes_the_pictures():
    exchanged = agreement.measure(240, transform=lambda pictures: pictures[..., ::-1])
    assert exchanged.agreement < 0.95
    assert exchanged.colors["red", "blue"] > 0.9 * sum(exchanged.colors["red", c] for c in (*COLOR_NAMES, "-"))
    empty = agreement.measure(240, transform=lambda pictures: np.full_like(pictures, 128))
    assert empty.agreement == 0.5  # every right pair is refused
    assert "| all | 120 / 120 | 0 / 120 |" in agreement.table(empty, "nothing")


@pytest.mark.parametrize(("category", "kind"), [(c, kind) for c, kinds in KINDS.items() for kind in kinds])
def test_every_single_corruption_is_detected(category, kind):
    rng = Random(f"{category} {kind}")
    specs = [sample_spec(category, rng) for _ in range(40)]
    right = render_batch([sample_scene(spec, rng) for spec in specs])
    wrong = render_batch([sample_scene(wrong_spec(spec, kind, rng), rng) for spec in specs])
    lines = [spec.metadata("") for spec in specs]
    assert [v.reason for v in check_batch(right, lines)] == [""] * 40
    verdicts = check_batch(wrong, lines)
    assert not any(verdict.correct for verdict in verdicts)
    assert all(verdict.reason for verdict in verdicts)


@pytest.mark.parametrize("kind", sorted({kind for kinds in KINDS.values() for kind in kinds}))
def test_a_wrong_spec_differs_in_one_thing(kind):
    rng = Random(kind)
    for category in (c for c in CATEGORIES if kind in KINDS[c]):
        for _ in range(50):
            spec = sample_spec(category, rng)
            assert wrong_spec(spec, kind, rng) != spec
    with pytest.raises(ValueError, match="unknown kind"):
        wrong_spec(Spec((Clause("circle"),)), "nothing", rng)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_colour_at_every_size(shape):
    pictures = [
        picture(placed(shape, color, 30.3, 33.8, diameter)) for color in COLORS for diameter in (14.0, 18.5, 26.0)
    ]
    for seen, color in zip(detect_batch(np.stack(pictures)), [c for c in COLORS for _ in range(3)]):
        (found,) = seen.objects
        assert (found.shape, found.color, found.problem) == (shape, color, None)
        assert found.score > 0.98
        assert abs((found.box[0] + found.box[2]) / 2 - 30.3) < 1.5
        assert abs((found.box[1] + found.box[3]) / 2 - 33.8) < 1.5


def test_damaged_objects_are_refused():
    for kind, rejected in agreement.malformed_rejected(200, seed=3).items():
        assert rejected >= 0.97, kind


def test_extra_objects_are_errors_by_the_strict_rule_only():
    pair = picture(placed("circle", "red", 18.0, 20.0), placed("star", "blue", 44.0, 40.0))
    assert check(pair, CIRCLE).reason == "expected 1 objects, found 2"
    assert check(pair, CIRCLE, rule="geneval").correct
    two = picture(placed("circle", "red", 18.0, 20.0), placed("circle", "blue", 44.0, 40.0))
    assert not check(two, CIRCLE).correct
    assert check(two, CIRCLE, rule="geneval").correct
    counting = {"include": [{"class": "circle", "count": 1}], "exclude": [{"class": "circle", "count": 2}]}
    for rule in checker.RULES:
        assert check(two, counting, rule).reason == "expected fewer than 2 circle, found 2"


def test_specks_are_ignored_and_malformed_objects_are_not():
    clean = picture(placed("circle", "red", 20.0, 20.0))
    assert check(clean, CIRCLE).correct
    speck, bar = clean.copy(), clean.copy()
    speck[50:53, 50:53] = 255
    bar[50:53, 20:60] = 255
    assert check(speck, CIRCLE).correct
    assert check(bar, CIRCLE).reason.startswith("malformed object (")
    assert check(bar, CIRCLE, rule="geneval").correct


def test_an_object_in_no_colour_of_the_palette_is_malformed():
    cyan = Scene((replace(placed("circle", "red", 30.0, 30.0), rgb=(0.0, 0.85, 0.85)),), PLAIN)
    assert "no colour of the palette" in check(render(cyan), CIRCLE).reason


def test_the_background_must_be_grey():
    plain = picture(placed("circle", "red", 30.0, 30.0))
    assert check(plain, CIRCLE).correct
    tinted = plain.copy()
    tinted[..., 2] = np.minimum(tinted[..., 2].astype(int) + 60, 255)
    assert check(tinted, CIRCLE).reason == "the background is not grey"


@pytest.mark.parametrize("value", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (224, 15, 26), (20, 56, 235)])
def test_empty_pictures_show_nothing(value):
    assert not check(np.full((IMAGE_SIZE, IMAGE_SIZE, 3), value, dtype=np.uint8), CIRCLE).correct


def test_noise_shows_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (20, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    assert not any(verdict.correct for verdict in check_batch(noise, [CIRCLE] * 20))
    blocks = noise[:, :8, :8].repeat(8, 1).repeat(8, 2)
    assert not any(verdict.correct for verdict in check_batch(blocks, [CIRCLE] * 20))


def test_a_verdict_does_not_depend_on_its_batch():
    rng = Random(8)
    specs = [sample_spec(CATEGORIES[i % 6], rng) for i in range(40)]
    pictures = render_batch([sample_scene(spec, rng) for spec in specs])
    lines = [spec.metadata("") for spec in specs]
    together = check_batch(pictures, lines)
    for i in (0, 13, 39):
        assert check(pictures[i], lines[i]) == together[i]
    assert check_batch(pictures[:0], []) == []


@pytest.mark.parametrize(
    ("box", "holds"),
    [
        ((0, 0, 10, 10), {"left of"}),
        ((60, 0, 70, 10), {"right of"}),
        ((30, -40, 40, -30), {"above"}),
        ((30, 40, 40, 50), {"below"}),
        ((60, 30, 70, 40), {"right of", "below"}),  # a diagonal is both
        ((30, 0, 40, 10), set()),  # the same place
        ((32, 0, 42, 10), set()),  # nearly: the offset is smaller than a tenth of the sizes
    ],
)
def test_genevals_relations(box, holds):
    assert relations(box, (30, 0, 40, 10)) == holds


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_position_is_judged_from_the_subject(relation):
    rng = Random(relation)
    spec = Spec((Clause("heart"), Clause("ring")), relation)
    shown = render(sample_scene(spec, rng))
    assert check(shown, spec.metadata("")).correct
    reverse = Spec((Clause("ring"), Clause("heart")), relation)
    assert check(shown, reverse.metadata("")).reason == f"expected heart {relation} ring"


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"include": [{"class": "dog", "count": 1}]},
        {"include": [{"class": "circle"}]},
        {"include": [{"class": "circle", "count": 0}]},
        {"include": [{"class": "circle", "count": 1, "color": "teal"}]},
        {"include": [{"class": "circle", "count": 1, "position": ["inside", 0]}]},
        {"include": [{"class": "circle", "count": 1, "position": ["above", 3]}]},
    ],
)
def test_bad_metadata(line):
    with pytest.raises(ValueError, match=r"unknown|metadata|count"):
        check(picture(), line)


def test_bad_pictures_and_rules():
    with pytest.raises(ValueError, match="uint8"):
        check(picture() / 255, CIRCLE)
    with pytest.raises(ValueError, match="pictures must be"):
        check(picture()[:32], CIRCLE)
    with pytest.raises(ValueError, match="1 pictures but 2"):
        check_batch(picture()[None], [CIRCLE, CIRCLE])
    with pytest.raises(ValueError, match="unknown rule"):
        check(picture(), CIRCLE, rule="kind")
