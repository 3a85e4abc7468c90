"""Chooses where the commands compute: `--device` of the command line and `device` of a training configuration.

torch is imported when it is asked: the command line names the devices in its help.
"""

from __future__ import annotations

DEVICES = ("auto", "cpu", "cuda")


def resolved(device: str) -> str:
    """ "cpu" or "cuda"; "auto" is the GPU where there is one (CUDA_VISIBLE_DEVICES says which).

    Raises:
        ValueError: another name, or a GPU that PyTorch does not see.
    """
    import torch

    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    there = gpu_is_there()
    if device == "cuda" and not there:
        reason = "sees no GPU" if torch.backends.cuda.is_built() else "is built without CUDA"
        raise ValueError(f"device is cuda, and this PyTorch {reason}")
    return "cuda" if there and device != "cpu" else "cpu"


def gpu_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def trouble(error: RuntimeError) -> str | None:
    """Returns what to tell a user of a GPU that is too small, too old or lost; None for every other error."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is too small for this; try a smaller --batch-size (--heal-batch), or --device cpu"
    if isinstance(error, getattr(torch, "AcceleratorError", ())):
        return f"the GPU failed ({str(error).strip().splitlines()[0]}); --device cpu goes without it"
    return None


def of_pipeline(pipe: object) -> str:
    """Returns the device where a pipeline's judges belong: beside it on a GPU, else on the CPU, also for one whose parts are offloaded.

    A generator (sana15.sampling.generator) is where the pipeline in it is.
    """
    import torch

    device = getattr(getattr(pipe, "pipe", pipe), "device", None)
    return str(device) if isinstance(device, torch.device) and device.type == "cuda" else "cpu"
