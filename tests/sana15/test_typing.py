"""A user's file that goes through `mypy --strict` learns the type of every public name: no Any, no error."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sana15
import sana_ext

USER = """\
import torch

import sana15
import sana_ext
from sana15 import SanaConfig, SanaTransformer, block_importance, calibration, grow, prune, search

pipe = sana15.Pipeline.from_pretrained("mini")
reveal_type(pipe)
reveal_type(pipe.transformer)
reveal_type(pipe("a red circle", n=2))
config = SanaConfig.named("1600M")
reveal_type(config)
reveal_type(config.num_layers)
model = SanaTransformer(config)
reveal_type(model)
batches = calibration(pipe, ["a red circle"])
reveal_type(batches)
reveal_type(block_importance(model, batches))
reveal_type(grow(model, layers=30))
reveal_type(prune(model, 10))
found = search(pipe, ["a red circle"], out="out")
reveal_type(found)
reveal_type(found.scores)
x = torch.zeros(1, 4, 8)
report = sana_ext.patch(model)
reveal_type(report)
reveal_type(report.cached)
reveal_type(sana_ext.unpatch(model))
reveal_type(sana_ext.kernel_info())
reveal_type(sana_ext.linear)
reveal_type(sana_ext.linear_attention)
reveal_type(sana_ext.residual_norm_modulate)
reveal_type(sana_ext.glumbconv)
reveal_type(sana_ext.optim.CAME8bit([x], lr=1e-3))
"""


def test_a_strict_user_sees_no_any(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    roots = [str(Path(package.__file__).parents[1]) for package in (sana15, sana_ext)]
    # An installed package's own code is not checked for its user: follow-imports=silent says so for a source tree.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", tmp_path / "cache", "user.py"],
        cwd=tmp_path, env=os.environ | {"MYPYPATH": os.pathsep.join(roots)}, capture_output=True, text=True,
    )  # fmt: skip
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(revealed) == USER.count("reveal_type(")
    assert not [line for line in revealed if re.search(r"\bAny\b", line)]
