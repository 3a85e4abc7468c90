"""Options that several commands share."""

from __future__ import annotations

import argparse

from ..device import DEVICES

DTYPES = ("fp32", "bf16", "fp16")  # the names of files.DTYPES, which needs torch


def bootstrap_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rule", default="strict", choices=("strict", "geneval"), help="the checker's rule")
    command.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap (default 10000)")
    command.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")


def device_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", choices=DEVICES, help="default: the GPU where there is one")


def calibration_options(command: argparse.ArgumentParser) -> None:
    device_option(command)
    command.add_argument(
        "--prompts", metavar="FILE", help="calibration prompts, as in sana15 sample (default: drawn for the mini model)"
    )
    command.add_argument("--count", type=int, default=100, help="of calibration prompts (default 100)")
    command.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at once (default 16)")


def sampling_options(command: argparse.ArgumentParser) -> None:
    device_option(command)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    command.add_argument("--sampler", help="flow_dpm or flow_euler (default: the model's own)")
    command.add_argument(
        "--guidance", type=float, help="classifier-free guidance scale (default: the model's own; published sizes 4.5)"
    )
    command.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="guidance only at noise levels sigma between these (default: the model's own; published sizes 0 1)",
    )  # fmt: skip
    command.add_argument("--negative", default="", metavar="PROMPT", help="what guidance leads away from")
    command.add_argument("--height", type=int, metavar="PIXELS")
    command.add_argument("--width", type=int, metavar="PIXELS")


def require_positive(args: argparse.Namespace, *names: str, words: str = "a positive integer") -> None:
    """ValueError for an option that is given and below 1. What the model need not be asked is refused before it is loaded."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be {words}, got {value}")


def require_seed(args: argparse.Namespace) -> None:
    if args.seed < 0:
        raise ValueError(f"seed must be an integer from 0 on, got {args.seed}")


def require_calibration(args: argparse.Namespace) -> None:
    """ValueError for calibration_options out of range."""
    require_positive(args, "count", words="at least 1")
    require_positive(args, "steps", "batch_size")
    require_seed(args)
