"""What commands say beside their result goes through the loggers of sana15: it can be collected and silenced."""

import logging
import re
from pathlib import Path

from tiny_pipeline import make

import sana15
from sana15.cli import main


def sampled(folder, out):
    return main(["sample", "a red circle", "--model", str(folder), "--out", str(out), "--steps", "1"])


def test_a_command_says_it_on_stderr(tmp_path, capsys, caplog):
    """The result alone is on standard output; the message is a record of the module's logger, too."""
    folder, out = make(tmp_path / "model"), tmp_path / "out"
    assert sampled(folder, out) == 0
    first = capsys.readouterr()
    assert first.out == f"1 pictures written to {out}/\n"
    assert not first.err
    picture = next(out.glob("*.png"))
    picture.write_bytes(picture.read_bytes()[:100])
    assert sampled(folder, out) == 0
    shown = capsys.readouterr()
    assert shown.out == first.out
    assert shown.err.startswith(f"{picture} is made again: ")
    assert shown.err.count("\n") == 1
    (record,) = (r for r in caplog.records if r.name.startswith("sana15"))
    assert (record.name, record.levelno) == ("sana15.evaluation.sample", logging.INFO)


def test_main_leaves_logging_as_it_was(tmp_path):
    logger = logging.getLogger("sana15")
    before = logger.level, list(logger.handlers)
    assert main(["sample", "a red circle", "--out", str(tmp_path / "out"), "--n", "0"]) == 2
    assert (logger.level, logger.handlers) == before


def test_a_library_user_hears_nothing_in_passing(tmp_path, capsys, caplog):
    """search called from Python: what is in passing is for who listens."""
    caplog.set_level(logging.INFO, "sana15")
    pipe = sana15.Pipeline.from_pretrained(make(tmp_path / "model"))
    for _ in range(2):
        sana15.search(pipe, ["a red circle"], out=tmp_path / "out", n=1, pick=1, judge="scenes", steps=1)
    assert [r.name for r in caplog.records if r.name.startswith("sana15")] == ["sana15.scaling.run"]
    shown = capsys.readouterr()  # other packages and the threads of other tests may write to standard error
    assert shown.out == ""
    assert "holds this run already" not in shown.err


def test_only_commands_print():
    """No module prints but the commands' own functions, and none writes to standard error by itself."""
    root = Path(sana15.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(r"file=sys\.stderr|warnings\.warn\(", path.read_text(encoding="utf-8"))
    }
    assert found == {"cli/main.py"}
