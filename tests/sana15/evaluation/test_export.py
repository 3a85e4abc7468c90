"""sana15 export: file for file what the benchmarks' programs read; sana15 eval of GenEval's results.jsonl."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana15.cli import main
from sana15.evaluation.export import FORMATS, export, results_line
from sana15.evaluation.layout import picture_path, write_metadata
from sana15.scenes.testset import load


def colored(k):
    return (40 * k % 256, 90, 255 - 10 * k)


def make(root, lines, n, size=(8, 8)):
    """Candidate c of prompt p is of the colour p * n + c."""
    write_metadata(root, [line if isinstance(line, dict) else {"prompt": line} for line in lines])
    for p in range(len(lines)):
        for c in range(n):
            Image.new("RGB", size, colored(p * n + c)).save(picture_path(root, p, c))
    return root


def files(root):
    return sorted(str(p.relative_to(root)) for p in Path(root).rglob("*") if p.is_file())


def color(path):
    with Image.open(path) as picture:
        return picture.convert("RGB").getpixel((1, 1))


def test_geneval(tmp_path, capsys):
    lines = [load()[0], load()[150]]
    source = make(tmp_path / "in", lines, 2, (64, 64))
    assert main(["export", "geneval", str(source), str(tmp_path / "out")]) == 0
    assert "2 prompts, 4 pictures; results.jsonl by the exact checker" in capsys.readouterr().out
    out = tmp_path / "out"
    names = [
        f"{p:05d}/{name}" for p in range(2) for name in ("metadata.jsonl", "samples/00000.png", "samples/00001.png")
    ]
    assert files(out) == [*names, "results.jsonl"]
    assert (out / "00001/metadata.jsonl").read_text() == json.dumps(lines[1])
    assert (out / "00001/samples/00001.png").read_bytes() == picture_path(source, 1, 1).read_bytes()
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [
        ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    ] * 4
    assert [row["filename"] for row in rows[:2]] == [str(out / f"00000/samples/0000{k}.png") for k in range(2)]
    assert json.loads(rows[2]["metadata"]) == lines[1]
    assert json.loads(rows[2]["details"]) == {}
    assert rows[2]["correct"] is False
    assert rows[2]["reason"]
    assert main(["eval", str(out)]) == 0


def test_rows_have_the_bytes_of_geneval_s_own_file():
    """As pandas.DataFrame([row]).to_json(orient="records", lines=True) writes it."""
    row = {"filename": "out/00000/samples/0000.png", "tag": "colors", "prompt": 'a "b" é', "correct": True}
    row |= {"reason": "", "metadata": '{"tag": "colors"}', "details": '{"ring": [[1.5, 2.0, 3.0, 4.0, 0.99]]}'}
    expected = (
        r'{"filename":"out\/00000\/samples\/0000.png","tag":"colors","prompt":"a \"b\" \u00e9","correct":true,"reason":"",'
        r'"metadata":"{\"tag\": \"colors\"}","details":"{\"ring\": [[1.5, 2.0, 3.0, 4.0, 0.99]]}"}'
    )
    assert results_line(row) == expected + "\n"


def test_details_are_boxes_by_class(tmp_path):
    from random import Random

    from sana15.scenes.render import render
    from sana15.scenes.scene import sample_scene
    from sana15.scenes.spec import spec_from_metadata

    line = load()[60]  # two objects
    write_metadata(tmp_path / "in", [line])
    scene = sample_scene(spec_from_metadata(line), Random(0))
    Image.fromarray(render(scene)).save(picture_path(tmp_path / "in", 0, 0))
    export("geneval", tmp_path / "in", tmp_path / "out")
    row = json.loads((tmp_path / "out/results.jsonl").read_text())
    assert row["correct"] is True
    details = json.loads(row["details"])
    assert sorted(details) == sorted(entry["class"] for entry in line["include"])
    for (box,) in details.values():
        assert len(box) == 5
        assert 0 <= box[0] < box[2] <= 64
        assert 0.9 < box[4] <= 1


def test_geneval_without_scenes_has_no_results(tmp_path):
    line = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    words = export("geneval", make(tmp_path / "in", [line], 1), tmp_path / "out")
    assert "no results.jsonl" in words
    assert files(tmp_path / "out") == ["00000/metadata.jsonl", "00000/samples/00000.png"]


def test_geneval2(tmp_path):
    source = make(tmp_path / "in", ["one cat", "two dogs"], 2)
    export("geneval2", source, tmp_path / "out")
    assert files(tmp_path / "out") == ["images.json", "images/00000.png", "images/00001.png"]
    expected = {"one cat": f"{tmp_path}/out/images/00000.png", "two dogs": f"{tmp_path}/out/images/00001.png"}
    assert (tmp_path / "out/images.json").read_text() == json.dumps(expected)
    assert color(tmp_path / "out/images/00001.png") == colored(2)


def test_geneval2_takes_the_first_of_a_prompt_that_is_listed_twice(tmp_path):
    source = make(tmp_path / "in", ["one cat", "two dogs", "one cat"], 1)
    assert export("geneval2", source, tmp_path / "out") == "2 prompts, one picture each"
    assert json.loads((tmp_path / "out/images.json").read_text())["one cat"].endswith("/00000.png")
    assert color(tmp_path / "out/images/00000.png") == colored(0)


def test_hpsv2_knows_prompts_whatever_their_spaces(tmp_path):
    """Files of prompts lose spaces at the ends of lines; of a prompt listed twice the first picture counts."""
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "anime.json").write_text(json.dumps(["x ", " y  z"]))
    source = make(tmp_path / "in", ["x", "y z", "x"], 1)
    assert export("hpsv2", source, tmp_path / "out", prompts=prompts) == "anime 2"
    assert np.abs(np.subtract(color(tmp_path / "out/anime/00000.jpg"), colored(0))).max() <= 3


def test_dpg(tmp_path, capsys):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name, text in {
        "partiprompts5": "a long  text\nof two lines\n",
        "COCOval2014000": "another",
        "x": "third",
    }.items():
        (prompts / f"{name}.txt").write_text(text)
    source = make(tmp_path / "in", ["another", "a long text of two lines"], 5)
    assert main(["export", "dpg", str(source), str(tmp_path / "out"), "--prompts", str(prompts)]) == 0
    assert "2 of 3 prompts; --resolution 8 --pic-num 4" in capsys.readouterr().out
    assert files(tmp_path / "out") == ["COCOval2014000.png", "partiprompts5.png"]
    with Image.open(tmp_path / "out/partiprompts5.png") as sheet:
        assert sheet.size == (16, 16)
        tiles = [sheet.crop((x, y, x + 8, y + 8)) for y in (0, 8) for x in (0, 8)]
    for k, tile in enumerate(tiles):
        assert np.array_equal(np.asarray(tile), np.full((8, 8, 3), colored(5 + k), np.uint8))


def test_t2icompbench(tmp_path):
    source = make(tmp_path / "in", ["a red book", "a blue vase."], 2)
    export("t2icompbench", source, tmp_path / "out")
    names = ["a blue vase._000002", "a blue vase._000003", "a red book_000000", "a red book_000001"]
    assert files(tmp_path / "out") == [f"samples/{name}.png" for name in names]
    assert color(tmp_path / "out/samples/a blue vase._000003.png") == colored(3)


def test_hpsv2(tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for style, texts in {"anime": ["x", "y"], "photo": ["z", "x"], "paintings": ["never"]}.items():
        (prompts / f"{style}.json").write_text(json.dumps(texts))
    source = make(tmp_path / "in", ["z", "y", "x"], 1)
    assert export("hpsv2", source, tmp_path / "out", prompts=prompts) == "anime 2, photo 2"
    assert files(tmp_path / "out") == ["anime/00000.jpg", "anime/00001.jpg", "photo/00000.jpg", "photo/00001.jpg"]
    for name, k in {"anime/00000": 2, "anime/00001": 1, "photo/00000": 0, "photo/00001": 2}.items():
        with Image.open(tmp_path / f"out/{name}.jpg") as picture:
            assert picture.format == "JPEG"
        assert np.abs(np.subtract(color(tmp_path / f"out/{name}.jpg"), colored(k))).max() <= 3


@pytest.mark.parametrize(
    ("name", "lines", "n", "message", "code"),
    [
        ("t2icompbench", ["a_b"], 1, "prompt 0 cannot be a file name of T2I-CompBench", 2),
        ("t2icompbench", ["x" * 250], 1, "cannot be a file name", 2),
        ("dpg", ["a"], 4, "--prompts must be DPG-Bench's folder", 2),
        ("dpg", ["a"], 3, "prompt 0 has 3 pictures, 4 are needed", 3),
        ("hpsv2", ["a"], 1, "--prompts must be HPSv2's folder", 2),
        ("geneval", ["a"], 0, "prompt 0 has 0 pictures, 1 are needed", 3),
    ],
)
def test_what_does_not_fit_leaves_nothing(tmp_path, capsys, name, lines, n, message, code):
    source = make(tmp_path / "in", lines, n)
    assert main(["export", name, str(source), str(tmp_path / "out")]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_incomplete_styles_and_foreign_prompts(tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "anime.json").write_text(json.dumps(["x", "y"]))
    with pytest.raises(FileNotFoundError, match="1 pictures of style anime are missing, the first is 1"):
        export("hpsv2", make(tmp_path / "a", ["x"], 1), tmp_path / "out", prompts=prompts)
    with pytest.raises(ValueError, match="1 prompts are none of"):
        export("hpsv2", make(tmp_path / "b", ["x", "y", "z"], 1), tmp_path / "out", prompts=prompts)
    (prompts / "anime.json").write_text("{")
    with pytest.raises(ValueError, match=r"anime.json is damaged"):
        export("hpsv2", tmp_path / "b", tmp_path / "out", prompts=prompts)
    with pytest.raises(ValueError, match="prompt 0 is none of"):
        export("dpg", make(tmp_path / "c", ["x"], 4), tmp_path / "out", prompts=prompts)
    (tmp_path / "out").mkdir()
    for name in FORMATS:
        with pytest.raises(ValueError, match="is there already"):
            export(name, tmp_path / "b", tmp_path / "out")


def results(path, verdicts):
    """GenEval's file with a prompt for each item (tag, prompt, verdicts)."""
    rows = [
        {"filename": f"{p}/{k}.png", "tag": tag, "prompt": prompt, "correct": v, "reason": "", "metadata": f"{p}", "details": ""}
        for p, (tag, prompt, found) in enumerate(verdicts) for k, v in enumerate(found)
    ]  # fmt: skip
    path.write_text("".join(results_line(row) for row in rows))
    return path


def test_eval_of_geneval_s_results(tmp_path, capsys):
    first = [("colors", "a", [True, True]), ("colors", "b", [True, False]), ("position", "c", [False, False])]
    a = results(tmp_path / "a.jsonl", first)
    b = results(tmp_path / "b.jsonl", [(tag, prompt, [False, False]) for tag, prompt, _ in first])
    assert main(["eval", str(a), "--json", str(tmp_path / "scores.json")]) == 0
    printed = capsys.readouterr().out
    assert "3 prompts, 2 pictures each, verdicts of the file" in printed
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert {row: cells["all"]["value"] for row, cells in scores.items()} == {
        "colors": 0.75, "position": 0.0, "mean of categories": 0.375, "mean of prompts": 0.5,
    }  # fmt: skip
    assert "seen" not in scores["colors"]
    assert scores["mean of prompts"]["any"]["value"] == pytest.approx(2 / 3)
    assert main(["eval", str(a), "--against", str(b)]) == 0
    assert "+0.375" in capsys.readouterr().out
    for text, message in (("", "holds no results"), ('{"prompt": "x"}\n', "a.jsonl:1: no row"), ("{", "a.jsonl:1: ")):
        a.write_text(text)
        assert main(["eval", str(a)]) == 3
        assert message in capsys.readouterr().err
