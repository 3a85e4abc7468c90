"""The scenes: vocabulary, prompts and their parser, sampling, rendering, and the split into training and test."""

import json
from itertools import combinations
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana15.scenes.prompts import FRAMES, MAX_WORDS, geneval_wording, parse, word_list, wording
from sana15.scenes.render import contact_sheet, render, render_batch
from sana15.scenes.scene import Background, Object, Scene, sample_scene
from sana15.scenes.shapes import coverage, silhouette
from sana15.scenes.spec import Clause, Spec, spec_from_metadata
from sana15.scenes.testset import (
    HELD_OUT_COUNTS,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    HELD_OUT_SHAPE_PAIRS,
    forbidden_prompts,
    generate,
    held_out_reason,
    is_held_out,
    load,
    prompt_key,
)
from sana15.scenes.training import sample_spec, sample_training, training_batch
from sana15.scenes.vocabulary import (
    CATEGORIES,
    COLOR_NAMES,
    COLORS,
    IMAGE_SIZE,
    MAX_DIAMETER,
    MIN_DIAMETER,
    OPPOSITE,
    RELATIONS,
    SHAPES,
)


def random_specs(count, seed=0):
    rng = Random(seed)
    return [sample_spec(CATEGORIES[i % len(CATEGORIES)], rng) for i in range(count)]


def random_scenes(count, seed=0):
    rng = Random(seed)
    return [sample_scene(spec, rng) for spec in random_specs(count, seed)]


def test_colours_are_far_apart_and_far_from_every_background():
    for a, b in combinations(COLORS.values(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 0.38
    for grey in (0.42, 0.60):
        for color in COLORS.values():
            assert np.linalg.norm(np.subtract(color, grey)) > 0.40


# ---- shapes


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_the_silhouettes_area_wherever_it_lies(shape):
    points = (np.arange(1000) + 0.5) / 500 - 1
    area = silhouette(shape, points[None, :], points[:, None]).mean() * 4  # of the square of side 2
    diameter = np.array([14.0, 17.3, 26.0])
    covered = coverage(np.full(3, SHAPES.index(shape)), np.array([20.0, 31.7, 40.2]), np.full(3, 30.4), diameter)
    assert covered.min() >= 0
    assert covered.max() == 1
    np.testing.assert_allclose(covered.sum((1, 2)), area * diameter**2 / 4, rtol=0.01)


def test_coverage_moves_with_the_centre_and_stays_within_the_diameter():
    index = np.arange(len(SHAPES))
    at = np.full(len(SHAPES), 30.25)
    diameter = np.full(len(SHAPES), 20.0)
    here, moved = coverage(index, at, at, diameter), coverage(index, at + 5, at - 3, diameter)
    np.testing.assert_array_equal(np.roll(here, (-3, 5), (1, 2)), moved)
    rows, columns = np.nonzero(here.max(0))
    for edge in (rows, columns):
        assert edge.min() >= 20
        assert edge.max() < 41


# ---- sampling and rendering


def test_scenes_show_their_spec_with_margins_and_gaps():
    for spec, scene in zip(random_specs(1200, 3), random_scenes(1200, 3)):
        expected = [clause.shape for clause in spec.clauses for _ in range(clause.count)]
        assert [o.shape for o in scene.objects] == expected
        for clause, o in zip(spec.clauses, scene.objects):
            assert clause.color in (None, o.color)
        for o in scene.objects:
            assert MIN_DIAMETER <= o.diameter <= MAX_DIAMETER
            assert min(o.cx, o.cy) - o.diameter / 2 >= 2
            assert max(o.cx, o.cy) + o.diameter / 2 <= IMAGE_SIZE - 2
            assert np.abs(np.subtract(o.rgb, COLORS[o.color])).max() < 0.04
        for a, b in combinations(scene.objects, 2):
            assert max(abs(a.cx - b.cx), abs(a.cy - b.cy)) >= (a.diameter + b.diameter) / 2 + 4
        if spec.relation is not None:
            reference, subject = scene.objects
            dx, dy = subject.cx - reference.cx, subject.cy - reference.cy
            along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[spec.relation]
            assert along > 2 * min(abs(dx), abs(dy))


def test_a_seed_gives_the_same_scenes_and_pictures():
    assert random_scenes(60, 1) == random_scenes(60, 1)
    assert random_scenes(60, 1) != random_scenes(60, 2)
    pictures = render_batch(random_scenes(60, 1))
    np.testing.assert_array_equal(pictures, render_batch(random_scenes(60, 1)))


def test_a_picture_does_not_depend_on_its_batch():
    scenes = random_scenes(40)
    pictures = render_batch(scenes)
    assert pictures.dtype == np.uint8
    assert pictures.shape == (40, IMAGE_SIZE, IMAGE_SIZE, 3)
    for i in (0, 7, 39):
        np.testing.assert_array_equal(pictures[i], render(scenes[i]))
    np.testing.assert_array_equal(render_batch(scenes[::-1]), pictures[::-1])
    assert render_batch([]).shape == (0, IMAGE_SIZE, IMAGE_SIZE, 3)


def test_the_picture_has_the_colours_where_the_scene_says():
    background = Background(grey=0.5, light=(0.0, 0.0), texture=0.0, seed=1)
    objects = (
        Object("square", "red", 16.0, 20.0, 16.0, COLORS["red"]),
        Object("ring", "blue", 44.0, 40.0, 20.0, COLORS["blue"]),
    )
    picture = render(Scene(objects, background)) / 255
    np.testing.assert_allclose(picture[20, 16], COLORS["red"], atol=0.003)
    np.testing.assert_allclose(picture[40, 36], COLORS["blue"], atol=0.003)  # the ring's left side
    np.testing.assert_allclose(picture[40, 44], 0.5, atol=0.003)  # its hole
    np.testing.assert_allclose(picture[2, 2], 0.5, atol=0.003)


def test_light_and_texture_vary_the_background():
    flat = Background(grey=0.5, light=(0.0, 0.0), texture=0.0, seed=1)
    assert render(Scene((), flat)).std() == 0
    lit = render(Scene((), Background(0.5, (0.1, 0.0), 0.0, 1))).astype(int)
    assert lit[:, -1].mean() - lit[:, 0].mean() > 20
    textures = [render(Scene((), Background(0.5, (0.0, 0.0), 0.03, seed))) for seed in (1, 2)]
    assert 1 < textures[0].std() < 8
    assert (textures[0] != textures[1]).any()


# ---- prompts


@pytest.mark.parametrize(
    ("spec", "prompt"),
    [
        (Spec((Clause("circle"),)), "a photo of a circle"),
        (Spec((Clause("star"), Clause("heart"))), "a photo of a star and a heart"),
        (Spec((Clause("cross", 3),)), "a photo of three crosses"),
        (Spec((Clause("ring", 1, "orange"),)), "a photo of an orange ring"),
        (Spec((Clause("square"), Clause("diamond")), "left of"), "a photo of a diamond left of a square"),
        (
            Spec((Clause("circle", 1, "red"), Clause("heart", 1, "blue"))),
            "a photo of a red circle and a blue heart",
        ),
    ],
)
def test_genevals_wording(spec, prompt):
    assert geneval_wording(spec) == prompt
    assert parse(prompt) == spec


def test_every_wording_parses_back_and_wordings_vary():
    rng = Random(5)
    prompts = []
    for spec in random_specs(6000, 5):
        prompt = wording(spec, rng)
        assert parse(prompt) == spec, prompt
        assert len(prompt.split()) <= MAX_WORDS
        prompts.append(prompt)
    assert len(set(prompts)) > 0.8 * len(prompts)
    words = {word for prompt in prompts for word in prompt_key(prompt).split()}
    assert words <= set(word_list())
    one = Spec((Clause("circle", 1, "red"),))
    assert len({wording(one, rng) for _ in range(400)}) > 150
    assert wording(one, Random(9)) == wording(one, Random(9))
    assert len(set(FRAMES)) == len(FRAMES)


@pytest.mark.parametrize(
    ("prompt", "spec"),
    [
        ("red circle", Spec((Clause("circle", 1, "red"),))),
        ("RED CIRCLE!", Spec((Clause("circle", 1, "red"),))),
        ("a ring in blue", Spec((Clause("ring", 1, "blue"),))),
        ("a scene with a cross with a ring on its left", Spec((Clause("cross"), Clause("ring")), "left of")),
        ("a ring to the left of a cross", Spec((Clause("cross"), Clause("ring")), "left of")),
        ("two red stars and a blue square", Spec((Clause("star", 2, "red"), Clause("square", 1, "blue")))),
    ],
)
def test_prompts_that_people_type(prompt, spec):
    assert parse(prompt) == spec


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        (" \n ", "the prompt is empty"),
        ("...", "the prompt is empty"),
        ("a teal circle", "unknown colour 'teal'; the colours are red, orange"),
        ("a grey circle", "unknown colour 'grey'"),
        ("a red hexagon", "unknown shape 'hexagon'; the shapes are circle, square"),
        ("hexagon", "unknown shape 'hexagon'"),
        ("a circle beside a square", "unknown word 'beside'|unknown colour"),
        ("five circles", "cannot draw 'five' objects; the counts are 1 to 4"),
        ("0 circles", "cannot draw '0' objects"),
        ("three circles and two squares", "asks for 5 objects"),
        ("circles", "how many circles"),
        ("a photo of", "names no shape"),
        ("a red", "names no shape"),
        ("a circle and", "a shape is missing"),
        ("a circle left of", "a shape is missing"),
        ("a circle and a circle", "the two shapes must differ"),
        ("two circles left of a square", "relates two single objects"),
        ("a circle a square", "cannot read"),
        ("a red blue circle", "cannot read"),
        ("a circle and a square and a ring", "cannot read"),
        ("a circle " * 20, "too long"),
        ("x" * 100_000, "too long"),
        (None, "must be a string"),
    ],
)
def test_bad_prompts(prompt, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(prompt)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=80), st.lists(st.sampled_from(word_list()), max_size=12).map(" ".join)))
def test_any_text_is_a_spec_or_a_value_error(text):
    try:
        spec = parse(text)
    except ValueError:
        return
    assert parse(geneval_wording(spec)).total() == spec.total() <= 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: Clause("hexagon"),
        lambda: Clause("circle", 1, "teal"),
        lambda: Clause("circle", 0),
        lambda: Spec(()),
        lambda: Spec((Clause("circle"), Clause("circle"))),
        lambda: Spec((Clause("circle"),), "left of"),
        lambda: Spec((Clause("circle"), Clause("ring")), "inside"),
        lambda: spec_from_metadata({"include": [{"class": "circle", "count": 5}]}),
        lambda: spec_from_metadata({"include": [{"count": 1}]}),
        lambda: spec_from_metadata({"tag": "nothing", "include": [{"class": "circle", "count": 1}]}),
        lambda: sample_scene(Spec((Clause("circle", 6),)), Random(0)),
        lambda: sample_spec("nothing", Random(0)),
    ],
)
def test_impossible_specs(make):
    with pytest.raises(ValueError, match=r"\w"):
        make()


# ---- the test set, and what training sees


def test_the_committed_test_set_is_what_the_generator_makes():
    assert load() == json.loads(json.dumps(generate()))


def test_the_test_set_is_genevals_format():
    lines = load()
    assert len(lines) >= 300
    assert [line["tag"] for line in lines] == sorted((line["tag"] for line in lines), key=CATEGORIES.index)
    for category in CATEGORIES:
        assert sum(line["tag"] == category for line in lines) >= 50
    assert len({prompt_key(line["prompt"]) for line in lines}) == len(lines)
    for line in lines:
        expected = {"tag", "include", "prompt"} | ({"exclude"} if line["tag"] == "counting" else set())
        assert set(line) == expected
        spec = spec_from_metadata(line)
        assert parse(line["prompt"]) == spec
        assert spec.metadata(line["prompt"]) == line
        if line["tag"] == "counting":
            (included,), (excluded,) = line["include"], line["exclude"]
            assert excluded == {"class": included["class"], "count": included["count"] + 1}
        if line["tag"] == "position":
            relation, target = line["include"][1]["position"]
            assert relation in RELATIONS
            assert target == 0


def test_every_category_with_combinations_has_seen_and_held_out_prompts():
    for category in CATEGORIES[1:]:
        held_out = [is_held_out(spec_from_metadata(line)) for line in load() if line["tag"] == category]
        assert sum(held_out) >= 16
        assert len(held_out) - sum(held_out) >= 30


def test_held_out_sets_are_balanced():
    assert {sum(shape == s for s, _ in HELD_OUT_PAIRS) for shape in SHAPES} == {2}
    assert {sum(color == c for _, c in HELD_OUT_PAIRS) for color in COLOR_NAMES} <= {1, 2}
    assert {sum(shape in pair for pair in HELD_OUT_SHAPE_PAIRS) for shape in SHAPES} == {2}
    assert {sum(relation == r for _, r, _ in HELD_OUT_RELATIONS) for relation in RELATIONS} == {5}
    assert {sum(count == n for _, n in HELD_OUT_COUNTS) for count in (2, 3, 4)} == {2}


def test_a_relation_is_held_out_from_both_sides():
    assert held_out_reason(Spec((Clause("square"), Clause("circle")), "left of")) == "relation"
    assert held_out_reason(Spec((Clause("circle"), Clause("square")), "right of")) == "relation"
    assert held_out_reason(Spec((Clause("circle"), Clause("square")), "left of")) is None
    for spec in random_specs(2000):
        swapped = Spec(spec.clauses[::-1], spec.relation and OPPOSITE[spec.relation])
        assert is_held_out(spec) == is_held_out(swapped)


def test_training_never_shows_what_is_held_out():
    rng = Random(11)
    seen_pairs, seen_specs, prompts = set(), set(), []
    for _ in range(12_000):
        prompt, scene = sample_training(rng)
        spec = parse(prompt)
        prompts.append(prompt)
        assert not is_held_out(spec), prompt
        assert prompt_key(prompt) not in forbidden_prompts()
        for o in scene.objects:
            assert (o.shape, o.color) not in HELD_OUT_PAIRS
            seen_pairs.add((o.shape, o.color))
        assert frozenset(o.shape for o in scene.objects) not in HELD_OUT_SHAPE_PAIRS
        if spec.tag in ("counting", "position"):
            seen_specs.add(spec)
    # Everything else does come: nothing is held out by accident.
    assert len(seen_pairs) == len(SHAPES) * len(COLOR_NAMES) - len(HELD_OUT_PAIRS)
    assert sum(spec.tag == "counting" for spec in seen_specs) == 24 - len(HELD_OUT_COUNTS)
    assert sum(spec.tag == "position" for spec in seen_specs) == 2 * 3 * 20
    assert len(set(prompts)) > 0.75 * len(prompts)


def test_training_weights_choose_the_categories():
    rng = Random(0)
    tags = {parse(sample_training(rng, {"position": 1, "counting": 2})[0]).tag for _ in range(60)}
    assert tags == {"position", "counting"}
    with pytest.raises(ValueError, match="unknown category"):
        sample_training(rng, {"nothing": 1})


def test_training_batches_are_reproducible():
    prompts, pictures = training_batch(Random(4), 20)
    again, same = training_batch(Random(4), 20)
    assert prompts == again
    np.testing.assert_array_equal(pictures, same)


def test_contact_sheet(tmp_path):
    path = tmp_path / "sheet.png"
    contact_sheet(render_batch(random_scenes(5)), 3, path, ["a caption"] * 5)
    assert path.read_bytes().startswith(b"\x89PNG")
