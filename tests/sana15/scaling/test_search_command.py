"""sana15 search and sana15 curve on the command line, with our pipeline."""

import json

import numpy as np
import pytest
from kill_search import digest
from PIL import Image
from tiny_pipeline import make

from sana15.cli import main
from sana15.sampling.pipeline import Pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tiny"))


def test_the_command(model, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a ring\ntwo stars\n")
    command = ["search", "--prompts", str(tmp_path / "p.txt"), "--model", str(model), "--out", str(tmp_path / "out")]
    command += ["--n", "4", "--pick", "2", "--judge", "scenes", "--steps", "2", "--guidance", "3", "--budget", "50"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "2 prompts, 8 pictures, 4 picked" in printed
    assert "spent 40 of 50 units: 32 transformer evaluations, 8 judge calls" in printed
    assert Image.open(tmp_path / "out/grid-000-of-001.png").width > 4 * 128
    before = digest(tmp_path / "out")
    assert main(command) == 0
    assert digest(tmp_path / "out") == before
    assert main(["eval", str(tmp_path / "out/picks")]) == 0
    assert main([*command, "--seed", "1"]) == 2
    assert "is another run: its seed differs" in capsys.readouterr().err
    made = Pipeline.from_pretrained(model)(["a ring", "two stars"], n=4, steps=2, guidance=3.0, batch_size=4)
    with Image.open(tmp_path / "out/candidates/00001/samples/0003.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(made[1][3]))
        assert json.loads(picture.info["sana15"])["candidate"] == 3


def test_a_curve_from_the_folder(model, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a ring\ntwo stars\na red circle\n")
    out = tmp_path / "out"
    command = ["search", "--prompts", str(tmp_path / "p.txt"), "--model", str(model), "--out", str(out), "--pick", "1"]
    assert main([*command, "--n", "4", "--judge", "learned", "--steps", "1"]) == 0
    capsys.readouterr()
    assert main(["curve", str(out), "--resamples", "50"]) == 0
    printed = capsys.readouterr().out
    assert "| picked by | | 1 | 2 | 4 |" in printed
    assert "| learned | counting | 0.000 | 0.000 | 0.000 |" in printed  # one step of a random model
    assert "| oracle | mean of prompts | 0.000 (0.000 - 0.000)" in printed
    assert Image.open(out / "curve.png").width > 300
    assert main(["curve", str(out), "--out", str(tmp_path / "none/curve.png")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    (out / "ledger-000-of-001.jsonl").write_text("")
    assert main(["curve", str(out)]) == 2
    assert "12 of 12 candidates were not finished and judged" in capsys.readouterr().err


def test_the_command_says_that_prompts_are_unjudged(model, tmp_path, capsys, monkeypatch):
    from sana15.judges.scene import SceneJudge

    (tmp_path / "p.txt").write_text("a ring\n")
    command = ["search", "--prompts", str(tmp_path / "p.txt"), "--model", str(model), "--out", str(tmp_path / "out")]
    command += ["--n", "2", "--pick", "1", "--judge", "scenes", "--steps", "1", "--attempts", "1"]
    monkeypatch.setattr(SceneJudge, "judge", lambda *_: [])
    assert main(command) == 4
    assert "prompt 0 is unjudged: judge scenes failed 1 times" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--shard", "1"], 2, "--shard must be I/N"),
        (["--judge", "oracle"], 2, "unknown judge 'oracle'"),
        (["--judge", "learned:nowhere"], 3, "holds no learned judge"),
        (["--policy", "luck"], 2, "unknown policy"),
        (["--steps", "0"], 2, "steps must be a positive integer"),
    ],
)
def test_the_commands_mistakes(model, tmp_path, capsys, arguments, code, message):
    (tmp_path / "p.txt").write_text("a ring\n")
    command = ["search", "--prompts", str(tmp_path / "p.txt"), "--model", str(model), "--out", str(tmp_path / "out")]
    assert (
        main([*command, "--judge", "scenes", *arguments] if "--judge" not in arguments else [*command, *arguments])
        == code
    )
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
