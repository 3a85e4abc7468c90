import importlib
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: one thread for each of several workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory of torch.empty is NaN, in Python and in C++, so that a kernel that forgets an element is seen.

    SANA_EXT_POISON=0 leaves it as it is, for a tool that looks for reads of such memory.
    """
    if os.environ.get("SANA_EXT_POISON") == "0":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def no_gpu_by_default(request, monkeypatch):
    """Outside tests/gpu `--device auto` is the CPU, whatever the machine has: many of these tests compare bits."""
    device = sys.modules.get("sana15.device")  # the op tests also run where sana15 is not installed
    if device is not None and request.path.parent.name != "gpu":
        monkeypatch.setattr(device, "gpu_is_there", lambda: False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def fused_parts(monkeypatch):
    """Where a kernel is not compiled, its op's PyTorch kernel stands in: the fused path is tested everywhere."""
    from sana_ext.patching import guards

    every = {("cpu", gradients): tuple(guards.KERNELS) for gradients in (False, True)}
    monkeypatch.setattr(guards, "find_kernels", lambda: guards.compiled_parts.update(every))


@pytest.fixture
def one_thread():
    """Small models are faster on one thread, the more so beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _arithmetic():
    return importlib.import_module("sana_ext.ops._arithmetic")


@pytest.fixture(params=["torch's own", "fp32 arithmetic"])
def both(request, monkeypatch):
    """Both answers to "has this processor 16-bit arithmetic?"."""
    monkeypatch.setattr(_arithmetic(), "UPCAST", set(LOW) if request.param == "fp32 arithmetic" else set())
    return request.param


@pytest.fixture
def upcast(monkeypatch):
    monkeypatch.setattr(_arithmetic(), "UPCAST", set(LOW))
