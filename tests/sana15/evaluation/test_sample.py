"""sana15 sample: files, metadata, resuming, the same pictures for the same seed, and one clear line for every mistake."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import tiny_pipeline
from PIL import Image

import sana_ext
from sana15.cli import main
from sana15.sampling.pipeline import Pipeline
from sana15.storage.png import read_png


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_pipeline.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def sample(model, tmp_path, capsys):
    def call(*arguments, out="out"):
        code = main(["sample", *arguments, "--model", str(model), "--out", str(tmp_path / out), "--steps", "2"])
        return code, capsys.readouterr()

    return call


def pixels(folder):
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)).astype(int) for p in sorted(folder.rglob("*.png"))}


def test_pictures_say_how_they_were_made(sample, model, tmp_path):
    code, printed = sample(
        "a red circle",
        "two stars",
        "--n",
        "2",
        "--seed",
        "5",
        "--guidance-interval",
        "0.2",
        "0.9",
        "--negative",
        "blue",
    )
    assert code == 0
    assert printed.out.startswith("4 pictures written to ")
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["00000-000.png", "00000-001.png", "00001-000.png", "00001-001.png"]
    picture = Image.open(tmp_path / "out" / "00001-000.png")
    assert picture.size == (64, 64)
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert json.loads(picture.info["sana15"]) == {
        "prompt": "two stars", "negative_prompt": "blue", "seed": 5, "prompt_index": 1, "candidate": 0, "steps": 2,
        "sampler": "flow_dpm", "guidance": 4.5, "guidance_interval": [0.2, 0.9], "flow_shift": 1.0, "width": 64,
        "height": 64, "model": model.name, "model_sha256": sha256, "version": sana_ext.__version__,
    }  # fmt: skip
    assert picture.info["parameters"] == (
        "two stars\nNegative prompt: blue\nSteps: 2, Sampler: flow_dpm, CFG scale: 4.5, Seed: 5, Size: 64x64, "
        f"Model hash: {sha256[:10]}, Model: {model.name}, Version: sana15 {sana_ext.__version__}"
    )


def test_same_seed_same_pictures_whatever_the_batch_and_the_other_prompts(sample, tmp_path):
    prompts = ["a red circle", "two stars", "a blue ring above a heart"]
    sample(*prompts, "--n", "3", "--seed", "2", out="a")
    sample(*prompts, "--n", "3", "--seed", "2", out="b")
    sample(*prompts, "--n", "3", "--seed", "2", "--batch-size", "2", out="c")
    sample("three hearts", "two stars", "--n", "2", "--seed", "2", out="d")
    sample(*prompts, "--seed", "3", out="e")
    a, b, c, d, e = (pixels(tmp_path / name) for name in "abcde")
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert len(a) == 9
    assert all(np.abs(a[k] - c[k]).max() <= 1 and (a[k] != c[k]).mean() < 1e-3 for k in a)
    assert np.abs(a["00001-001.png"] - d["00001-001.png"]).max() <= 1
    assert np.abs(a["00000-001.png"] - d["00000-001.png"]).max() > 1
    assert np.abs(a["00001-000.png"] - e["00001-000.png"]).max() > 1


def test_a_prompt_file_makes_genevals_folders_and_resumes(sample, tmp_path):
    lines = [{"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}], "prompt": "a red ring"}]
    lines.append({"tag": "counting", "include": [{"class": "star", "count": 2}], "prompt": "two stars"})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    arguments = ("--prompts", str(tmp_path / "p.jsonl"), "--n", "2")
    assert sample(*arguments)[0] == 0
    out = tmp_path / "out"
    before = pixels(out)
    assert list(before) == [f"0000{p}/samples/000{c}.png" for p in range(2) for c in range(2)]
    assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == lines[1]

    kept, gone, cut = (out / "00000/samples/0000.png", out / "00000/samples/0001.png", out / "00001/samples/0000.png")
    stamp = kept.stat().st_mtime_ns
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:400])
    code, printed = sample(*arguments)
    assert code == 0
    assert printed.out.startswith("2 pictures written to ")
    assert "2 were there" in printed.out
    assert kept.stat().st_mtime_ns == stamp
    after = pixels(out)
    assert all(np.abs(after[name] - before[name]).max() <= 1 for name in before)

    code, printed = sample(*arguments, "--seed", "1")
    assert code == 2
    assert "has seed 0, now it is 1; choose another --out" in printed.err
    (tmp_path / "p.jsonl").write_text(json.dumps(lines[1]) + "\n")
    code, printed = sample(*arguments)
    assert code == 2
    assert "choose another --out" in printed.err


def test_text_files_and_the_shipped_test_set(sample, tmp_path):
    from sana15.evaluation.layout import read_prompts

    (tmp_path / "p.txt").write_text("a red ring\n\n two stars \n")
    assert sample("--prompts", str(tmp_path / "p.txt"))[0] == 0
    stored = json.loads((tmp_path / "out" / "00001" / "metadata.jsonl").read_text())
    assert stored["include"] == [{"class": "star", "count": 2}]
    assert stored["prompt"] == "two stars"
    assert len(read_prompts("test")) == 488


def test_published_parts_take_any_text(tmp_path, capsys):
    """Gemma, DC-AE with 32 pixels per latent, bf16; GenEval's own classes; a prompt longer than 300 tokens is cut off."""
    folder = tiny_pipeline.make_published(tmp_path / "model")
    lines = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}]
    lines.append({"prompt": "a very long story " * 200})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--model", str(folder), "--steps", "1", "--out", str(tmp_path / "out")]
    assert main(["sample", "--prompts", str(tmp_path / "p.jsonl"), *options]) == 0
    assert [p.shape for p in pixels(tmp_path / "out").values()] == [(64, 64, 3)] * 2
    assert main(["eval", str(tmp_path / "out")]) == 3
    assert "00000/metadata.jsonl: unknown shape 'bench'" in capsys.readouterr().err
    assert main(["sample", "", *options]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    assert main(["sample", "a cat", *options, "--height", "48"]) == 2
    assert "height must be a multiple of 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a red pentagon"], 2, "unknown shape 'pentagon'; the shapes are circle"),
        (["a magenta circle"], 2, "unknown colour 'magenta'; the colours are red"),
        ([""], 2, "the prompt is empty"),
        (["a red circle " * 40], 2, "the prompt is too long"),
        (["a red circle", "--negative", "pentagon"], 2, "does not know 'pentagon'"),
        (["a red circle", "--height", "63"], 2, "height must be a multiple of 8 from 8 to 256 pixels, got 63"),
        (["a red circle", "--width", "1000000"], 2, "width must be a multiple of 8"),
        (["a red circle", "--n", "0"], 2, "--n must be at least 1"),
        (["a red circle", "--seed", "-1"], 2, "seed must be an integer from 0 on"),
        (["a red circle", "--batch-size", "0"], 2, "batch_size must be a positive integer"),
        (["a red circle", "--steps", "0"], 2, "steps must be a positive integer"),
        (["a red circle", "--sampler", "ddim"], 2, "unknown sampler 'ddim'"),
        (["a red circle", "--guidance-interval", "0.9", "0.1"], 2, "guidance_interval must be"),
        ([], 2, "give prompts or --prompts FILE"),
        (["a red circle", "--prompts", "test"], 2, "give prompts or --prompts FILE"),
        (["--prompts", "{tmp}/missing.jsonl"], 3, "missing.jsonl is no file of prompts"),
        (["--prompts", "{tmp}/bad.jsonl"], 3, "bad.jsonl:2: "),
        (["--prompts", "{tmp}/shape.txt"], 3, "prompt 1: unknown shape 'pentagon'"),
        (["--prompts", "{tmp}/empty.txt"], 3, "holds no prompts"),
        (["a red circle", "--model", "{tmp}/none"], 3, "is not a pipeline folder"),
        (["a red circle", "--out", "{tmp}/empty.txt"], 2, "is a file, not a folder"),
    ],
)
def test_mistakes_are_named_in_one_line_and_nothing_is_written(model, arguments, code, message, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a ring"}\n{"prompt": \n')
    (tmp_path / "shape.txt").write_text("a ring\na red pentagon\n")
    (tmp_path / "empty.txt").write_text("\n")
    there = sorted(tmp_path.rglob("*"))
    options = ["--model", str(model), "--out", str(tmp_path / "out"), "--steps", "2"]
    assert main(["sample", *options, *(a.format(tmp=tmp_path) for a in arguments)]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == there


def test_a_failing_write_leaves_no_part_of_a_picture(sample, tmp_path, monkeypatch):
    def full(_self, path, **_options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    code, printed = sample("a red circle")
    assert code == 3
    assert "No space left on device" in printed.err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_run_keeps_what_is_done_and_resumes(sample, tmp_path, monkeypatch):
    decode, done = Pipeline.decode, []

    def interrupted(self, latents):
        done.append(len(latents))
        if len(done) == 2:
            raise KeyboardInterrupt
        return decode(self, latents)

    arguments = ("--prompts", str(tmp_path / "p.txt"), "--n", "2", "--batch-size", "2")
    (tmp_path / "p.txt").write_text("a ring\ntwo stars\n")
    monkeypatch.setattr(Pipeline, "decode", interrupted)
    code, printed = sample(*arguments)
    assert code == 130
    assert printed.err == "sana15 sample: interrupted\n"
    assert [str(p.relative_to(tmp_path / "out")) for p in sorted((tmp_path / "out").rglob("*.*"))] == [
        "00000/metadata.jsonl", "00000/samples/0000.png", "00000/samples/0001.png", "00001/metadata.jsonl",
    ]  # fmt: skip
    monkeypatch.undo()
    assert sample(*arguments)[1].out.startswith("2 pictures written to ")
    assert sample(*arguments)[1].out.startswith("0 pictures written to ")


def test_foreign_pictures_are_never_replaced(sample, tmp_path):
    (tmp_path / "out").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "out" / "00000-000.png")
    code, printed = sample("a red circle")
    assert code == 2
    assert "was not made by sana15 sample" in printed.err
    assert read_png(tmp_path / "out" / "00000-000.png")[1] is None


def test_a_damaged_checkpoint(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "model")
    weights = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert main(["sample", "a red circle", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err
    assert f"{weights} is damaged" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_the_mini_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sana15.model.folder.MINI", tmp_path / "assets" / "mini")
    assert main(["sample", "a red circle", "--out", str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err
    assert "the mini model is not in this installation" in error
    assert error.count("\n") == 1
