"""The command line: what it prints, its exit codes, one clear line for every error."""

import logging
import subprocess
import sys

import pytest

from sana15.cli import main, options
from sana15.storage import files


def test_info(capsys):
    assert main(["info", "4800M"]) == 0
    assert capsys.readouterr().out.startswith("4,721,825,952 parameters, 60 blocks of 77,929,600")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["info", "5B"], 2, "unknown model size '5B'"),
        (["sample", "a red circle", "--model", "{tmp}", "--out", "{tmp}/out"], 3, "is not a pipeline folder"),
        (["train", "{tmp}/missing.yaml"], 3, "missing.yaml"),
        (["train", "{tmp}/bad.yaml"], 2, "unknown configuration key stpes"),
    ],
)
def test_errors(arguments, code, message, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("stpes: 3\n")
    assert main([a.format(tmp=tmp_path) for a in arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_usage():
    with pytest.raises(SystemExit) as stop:
        main(["paint"])
    assert stop.value.code == 2


def test_help_needs_no_torch():
    """--help, --version and a mistyped command answer at once: torch takes seconds."""
    code = "import sys; from sana15.cli import main\ntry: main({!r})\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    for arguments in (
        ["--help"],
        ["--version"],
        ["smple"],
        ["grow", "--help"],
        ["sample", "--device", "tpu", "--out", "o"],
    ):
        done = subprocess.run([sys.executable, "-c", code.format(arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout + done.stderr


def test_the_names_of_dtypes_are_those_of_files():
    assert tuple(files.DTYPES) == options.DTYPES


def test_one_line_of_bitsandbytes_is_dropped_and_no_other(capsys, caplog):
    """diffusers imports bitsandbytes, which says on import that the package `kernels` is missing."""
    with pytest.raises(SystemExit):
        main(["--version"])
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("another line")
    assert caplog.messages == ["another line"]
