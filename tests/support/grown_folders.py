"""What several test files share of growth."""

import os
import subprocess
import sys

import torch
from model_cases import SMALL, batch

from sana15 import SanaConfig, SanaTransformer


def source(layers=4, **changes):
    """A model none of whose weights is trivial."""
    torch.manual_seed(0)
    model = SanaTransformer(SanaConfig(**SMALL | {"num_layers": layers} | changes))
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.2)
    return model.eval()


def output(model, dtype=torch.float32):
    with torch.no_grad():
        return model(*batch(dtype=dtype).values())


def files_below(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_python(code, *arguments, stdin=None):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        text=True,
    )
