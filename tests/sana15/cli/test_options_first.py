"""Options out of range are refused before a model is loaded: the option's error comes first, also for a damaged folder."""

import shutil
import subprocess
import sys

import pytest

from sana15.cli import main
from sana15.model.folder import MINI


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The mini model's folder with weights that no reader takes."""
    folder = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(MINI, folder)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
        path.write_bytes(b"no weights")
    return folder


#: Words of a command on the model MODEL, and what each bad option is answered with.
SAMPLE = ["sample", "a red circle", "--model", "MODEL", "--out", "OUT"]
SEARCH = ["search", "--prompts", "test", "--model", "MODEL", "--out", "OUT"]
IMPORTANCE = ["importance", "MODEL", "--out", "OUT"]
PRUNE = ["prune", "MODEL", "OUT", "--keep", "6"]
GROW = ["grow", "MODEL", "OUT", "--layers", "16"]
DEMO = ["demo", "--model", "MODEL", "--out", "OUT"]
LIGHT = [
    (SAMPLE, ["--n", "0"], "--n must be at least 1, got 0"),
    (SAMPLE, ["--steps", "0"], "steps must be a positive integer, got 0"),
    (SAMPLE, ["--batch-size", "0"], "batch_size must be a positive integer, got 0"),
    (SAMPLE, ["--seed", "-1"], "seed must be an integer from 0 on, got -1"),
    (SEARCH, ["--n", "0"], "n must be a positive integer, got 0"),
    (SEARCH, ["--pick", "0"], "pick must be a positive integer, got 0"),
    (SEARCH, ["--batch-size", "-2"], "batch_size must be a positive integer, got -2"),
    (IMPORTANCE, ["--count", "0"], "must be at least 1, got 0"),
    (IMPORTANCE, ["--steps", "0"], "steps must be a positive integer, got 0"),
    (IMPORTANCE, ["--bins", "1001"], "bins must be 1 to 1000, got 1001"),
    (PRUNE, ["--count", "0"], "must be at least 1, got 0"),
    (PRUNE, ["--batch-size", "0"], "batch_size must be a positive integer, got 0"),
    (PRUNE, ["--by", "learned", "--rank", "0"], "rank must be a positive integer, got 0"),
    (PRUNE, ["--by", "search", "--candidates", "0"], "candidates must be a positive integer, got 0"),
    (PRUNE, ["--by", "search", "--trial-steps", "-1"], "trial_steps must be at least 0, got -1"),
    (DEMO, ["--steps", "0"], "steps must be a positive integer, got 0"),
    (["info", "1600M", "--memory"], ["--batch", "0"], "batch must be at least 1, got 0"),
]
OTHERS = [
    (SAMPLE, ["--sampler", "ddim"], "unknown sampler 'ddim'"),
    (SAMPLE, ["--guidance", "nan"], "guidance must be a finite number"),
    (SAMPLE, ["--guidance-interval", "0.6", "0.4"], "guidance_interval must be 0 <= low <= high <= 1"),
    (SAMPLE, ["--height", "65"], "height must be a multiple of 8 from 8 to 256 pixels, got 65"),
    (SAMPLE, ["--width", "0"], "width must be a multiple of 8 from 8 to 256 pixels, got 0"),
    (SEARCH, ["--width", "4096"], "width must be a multiple of 8 from 8 to 256 pixels, got 4096"),
    (SEARCH, ["--policy", "none"], "unknown policy 'none'"),
    (SEARCH, ["--pick", "33"], "pick must be at most n = 32, got 33"),
    (SEARCH, ["--policy", "stop"], "stop needs stop_at"),
    (SEARCH, ["--stop-at", "1"], "stop_at must be a finite number"),
    (SEARCH, ["--shard", "3/2"], "shard must be i/n"),
    (SEARCH, ["--judge", "nobody"], "unknown judge 'nobody'"),
    (SEARCH, ["--judge", "clip"], "needs a model: clip:MODEL"),
    (SEARCH, ["--attempts", "0"], "attempts, timeout and backoff must be positive, got 0"),
    (SEARCH, ["--timeout", "0"], "attempts, timeout and backoff must be positive"),
    (PRUNE, ["--keep", "13"], "keep must be 1 to 12, the blocks of the source; got 13"),
    (PRUNE, ["--by", "nothing"], "unknown strategy 'nothing'"),
    (PRUNE, ["--heal", "0"], "healing takes at least one step of one picture"),
    (PRUNE, ["--heal", "4", "--heal-lr", "0"], "healing's lr must be above 0"),
    (PRUNE, ["--heal", "4", "--heal-batch", "0"], "healing takes at least one step of one picture"),
    (PRUNE, ["--heal", "4", "--distill", "-1"], "healing's distill must be at least 0"),
    (PRUNE, ["--heal", "4", "--keep", "12"], "there is nothing to heal"),
    (PRUNE, ["--shard-size", "much"], "a size must be written as 5GB"),
    (GROW, ["--layers", "1"], "layers must be at least the"),
    (GROW, ["--keep", "13"], "keep must be 1 to 12"),
    (GROW, ["--strategy", "none"], "unknown strategy 'none'"),
    (GROW, ["--shard-size", "0"], "a size must be written as 5GB"),
    (DEMO, ["--per-category", "0"], "--per-category must be at least 1, got 0"),
    (DEMO, ["--per-category", "999"], "--per-category is too large"),
    (["convert", "MODEL/transformer/diffusion_pytorch_model.safetensors", "OUT"], ["nothing=1"],
     "unknown configuration key nothing"),
    (["convert", "MODEL/transformer", "OUT"], ["--shard-size", "x"], "a size must be written as 5GB"),
    (["eval", "MODEL", "--detector", "MODEL"], ["--resamples", "0"], "--resamples must be at least 1, got 0"),
    (["eval", "MODEL", "--detector", "MODEL"], ["--seed", "-1"], "seed must be an integer from 0 on, got -1"),
    (["curve", "MODEL"], ["--resamples", "0"], "--resamples must be at least 1, got 0"),
    (["train"], ["transformer.start=MODEL", "out=OUT", "steps=0"], "steps must be at least 1, got 0"),
    (["train"], ["transformer.start=MODEL", "out=OUT", "transformer.noises=0"], "noises must be at least 1"),
    (["train"], ["transformer.start=MODEL", "out=OUT", "transformer.old_lr=-1"], "must be at least 0"),
    (["reproduce"], ["nothing"], "nothing"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "bad", "expected"),
    LIGHT + OTHERS,
    ids=lambda v: "_".join(v[:1] + v[-2:]) if isinstance(v, list) else "",
)
def test_the_option_comes_first(damaged, tmp_path, capsys, command, bad, expected):
    words = [w.replace("MODEL", str(damaged)).replace("OUT", str(tmp_path / "out")) for w in [*command, *bad]]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [SAMPLE, IMPORTANCE, PRUNE, DEMO, GROW])
def test_the_folder_is_damaged(damaged, tmp_path, capsys, command):
    """What makes the test above one: with good options, each command finds the folder's damage."""
    assert main([w.replace("MODEL", str(damaged)).replace("OUT", str(tmp_path / "out")) for w in command]) == 3
    assert "safetensors" in capsys.readouterr().err


def test_whole_numbers_are_refused_without_torch():
    code = """
import sys
from sana15.cli import main
for words in eval(sys.argv[1]):
    assert main(words) == 2, words
assert "torch" not in sys.modules
"""
    words = [[*command, *bad] for command, bad, _ in LIGHT]
    subprocess.run([sys.executable, "-c", code, repr(words)], check=True, stderr=subprocess.PIPE)


def test_no_trial_steps_are_allowed(damaged, tmp_path, capsys):
    """Zero of them judges without healing: what is wrong is then the folder."""
    options = ["--keep", "6", "--by", "search", "--trial-steps", "0"]
    assert main(["prune", str(damaged), str(tmp_path / "out"), *options]) == 3
    assert "trial" not in capsys.readouterr().err
