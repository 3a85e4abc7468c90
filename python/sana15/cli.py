"""sana15 <command>: the command line. Exit code 2: a wrong argument; 3: a missing or damaged file; 4: prompts that no judge judged."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .device import DEVICES, trouble
from .experiments import BUDGETS, EXPERIMENTS
from .files import DTYPES, DataError
from .redaction import guard_tracebacks, redacted


def _train(args: argparse.Namespace) -> None:
    from .train import train
    from .train_config import load_config

    config, overrides = args.config, args.overrides
    if config is not None and _is_override(config):  # the file is left out
        config, overrides = None, [config, *overrides]
    print(f"exported to {train(load_config(config, overrides))}")


def _is_override(text: str) -> bool:
    """Whether a command's file argument is none but key=value: no such file, and a key that could be one."""
    return re.match(r"[A-Za-z_][\w.]*=", text) is not None and not Path(text).exists()


def _demo(args: argparse.Namespace) -> None:
    from .demo import run

    run(args)


def _sample(args: argparse.Namespace) -> None:
    from .sample import run

    run(args)


def _search(args: argparse.Namespace) -> int:
    from .scaling.command import run

    return run(args)


def _curve(args: argparse.Namespace) -> None:
    from .scaling.curve import run

    run(args)


def _eval(args: argparse.Namespace) -> None:
    from .evaluate import run

    run(args)


def _export(args: argparse.Namespace) -> None:
    from .export import run

    run(args)


def _grow(args: argparse.Namespace) -> None:
    from .growth_files import run

    run(args)


def _importance(args: argparse.Namespace) -> None:
    from .importance_report import run

    run(args)


def _prune(args: argparse.Namespace) -> None:
    from .pruning_files import run

    run(args)


def _reproduce(args: argparse.Namespace) -> None:
    from .experiments.command import run

    run(args)


def _convert(args: argparse.Namespace) -> None:
    import torch
    import yaml

    from .checkpoint import parse_bytes
    from .release import convert, needed_changes, parameter_shapes, read_release
    from .train_config import parse_overrides

    dtype = DTYPES[args.dtype] if args.dtype else None
    shard_bytes = parse_bytes(args.shard_size) if args.shard_size else None
    changes = parse_overrides(args.changes)
    config = convert(args.source, args.target, dtype=dtype, shard_bytes=shard_bytes, ema=args.ema, changes=changes)
    total = sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())
    print(
        f"{args.target}: {total:,} parameters, {config.num_layers} blocks of width {config.width}, "
        f"{config.num_cross_attention_heads} cross-attention heads, qk-norm {config.qk_norm or 'none'}, made for "
        f"{config.sample_size}x{config.sample_size} latents, position embedding {config.interpolation_scale or 'none'}"
    )
    if Path(args.target).is_file() and (needed := needed_changes(read_release(Path(args.target)), config)):
        words = (f"{name}={yaml.safe_dump(value).splitlines()[0]}" for name, value in needed.items())
        print(f"to read it back: sana15 convert {args.target} FOLDER {' '.join(words)}")


def _info(args: argparse.Namespace) -> None:
    import torch

    from .config import SanaConfig
    from .model import SanaTransformer

    config = SanaConfig.load(args.model) if Path(args.model).is_dir() else SanaConfig.named(args.model)
    with torch.device("meta"):
        model = SanaTransformer(config)
    block = sum(p.numel() for p in model.transformer_blocks[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    heads = f"{config.num_attention_heads} heads of {config.attention_head_dim}"
    print(f"{total:,} parameters, {config.num_layers} blocks of {block:,}; width {config.width}, {heads}, ", end="")
    print(f"Mix-FFN {config.hidden}, qk-norm {config.qk_norm or 'none'}")
    if args.memory:
        from .memory import table, training_memory

        latent = args.latent or config.sample_size
        print(f"\nGiB of a training step, {args.batch} x {latent}x{latent} latents:\n")
        print(table(training_memory(config, batch=args.batch, latent=latent)))
        print("\nleast: with gradient checkpointing, and for an 8-bit optimizer with sana_ext.optim.fuse_backward")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(redacted(message))  # it repeats the argument, such as a judge's URL with a password


def parser() -> argparse.ArgumentParser:
    root = _Parser(prog="sana15", description="SANA-1.5: train, grow, make pictures, score them, convert checkpoints.")
    commands = root.add_subparsers(dest="command", required=True, metavar="command")

    train = commands.add_parser("train", help="train from a YAML configuration; the same command resumes")
    train.add_argument("config", nargs="?", help="YAML file (default: built-in defaults)")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, such as transformer.flow_shift=2"
    )
    train.set_defaults(run=_train)

    demo = commands.add_parser("demo", help="prompts to pictures with the embedded model: contact sheet, scores, times")
    demo.add_argument("--out", default="out/demo", metavar="DIR", help="default out/demo")
    demo.add_argument("--model", default="mini", metavar="DIR", help='"mini" (default) or a pipeline folder')
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    demo.add_argument("--per-category", type=int, default=8, help="prompts of each category (default 8)")
    demo.add_argument("--no-timing", action="store_true", help="skip the comparison with stock diffusers")
    _device_option(demo)
    demo.set_defaults(run=_demo)

    sample = commands.add_parser("sample", help="pictures for prompts; the same command resumes")
    sample.add_argument("prompt", nargs="*", metavar="PROMPT", help='what to paint, such as "a red circle"')
    sample.add_argument(
        "--prompts", metavar="FILE", help='prompts: GenEval\'s *.jsonl, a text file, or "test" for the shipped test set'
    )
    sample.add_argument("--model", default="mini", metavar="DIR", help='"mini" (default) or a pipeline folder')
    sample.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures; the same run's are kept")
    sample.add_argument("--n", type=int, default=1, help="pictures per prompt (default 1)")
    sample.add_argument("--batch-size", type=int, metavar="N", help="pictures computed at once")
    _sampling_options(sample)
    sample.set_defaults(run=_sample)

    search = commands.add_parser(
        "search", help="many pictures per prompt, judged, the best picked; the same command resumes"
    )
    search.add_argument(
        "--prompts", required=True, metavar="FILE", help='as for sample; "test" is the shipped test set'
    )
    search.add_argument("--model", default="mini", metavar="DIR", help='"mini" (default) or a pipeline folder')
    search.add_argument("--out", required=True, metavar="DIR", help="the run's folder")
    search.add_argument("--n", type=int, default=32, help="candidates per prompt (default 32)")
    search.add_argument("--pick", type=int, default=4, help="how many of them are picked (default 4)")
    search.add_argument(
        "--judge", action="append", metavar="NAME",
        help="scenes, learned[:DIR], clip:MODEL, vlm:MODEL or http://HOST/v1#MODEL (default learned); several vote by rank",
    )  # fmt: skip
    search.add_argument(
        "--policy", default="best_of_n", help="best_of_n (default), tournament, stop, halving or bandit"
    )
    search.add_argument(
        "--budget",
        type=int,
        metavar="UNITS",
        help="of the run: transformer evaluations and judge calls (default: no limit)",
    )
    search.add_argument("--stop-at", type=float, metavar="SCORE", help="good enough, for stop and bandit")
    search.add_argument("--shard", default="0/1", metavar="I/N", help="only prompts I, I + N, ... (default 0/1: all)")
    search.add_argument(
        "--batch-size", type=int, metavar="N", help="pictures computed at once (default: 32 mini, else 1)"
    )
    search.add_argument("--attempts", type=int, default=3, help="how often a failing judge is asked (default 3)")
    search.add_argument("--timeout", type=float, default=120.0, help="seconds for a judge's answer (default 120)")
    _sampling_options(search)
    search.set_defaults(run=_search)

    curve = commands.add_parser(
        "curve", help="score against pictures per prompt, from a search's folder: PNG and table"
    )
    curve.add_argument("folder", metavar="DIR", help="of a search for scenes that judged every candidate (best_of_n)")
    curve.add_argument("--out", metavar="FILE", help="the PNG (default DIR/curve.png)")
    _bootstrap_options(curve)
    curve.set_defaults(run=_curve)

    evaluate = commands.add_parser("eval", help="score a folder of pictures in GenEval's layout")
    evaluate.add_argument(
        "folder", metavar="DIR", help="what sana15 sample --prompts FILE --out DIR wrote, or GenEval's results.jsonl"
    )
    evaluate.add_argument("--against", metavar="DIR", help="another run on the same prompts: the paired difference")
    evaluate.add_argument(
        "--detector",
        metavar="MODEL",
        help="photos: a Mask2Former for COCO judges by GenEval's rules, into DIR/results.jsonl",
    )
    evaluate.add_argument(
        "--clip",
        metavar="MODEL",
        help="that tells colours to --detector: open_clip:ViT-L-14:openai, or one of transformers",
    )
    _device_option(evaluate)
    evaluate.add_argument("--json", metavar="FILE", help="write scores and verdicts there; - for standard output")
    _bootstrap_options(evaluate)
    evaluate.set_defaults(run=_eval)

    export = commands.add_parser("export", help="a folder of pictures in the format of a benchmark's own program")
    export.add_argument("format", choices=("geneval", "geneval2", "dpg", "t2icompbench", "hpsv2"))
    export.add_argument("source", metavar="DIR", help="what sana15 sample --prompts or sana15 search (picks/) wrote")
    export.add_argument("target", metavar="OUT", help="folder; must not exist")
    export.add_argument("--prompts", metavar="DIR", help="the benchmark's own prompts, for dpg and hpsv2")
    export.add_argument("--rule", default="strict", choices=("strict", "geneval"), help="of geneval's results.jsonl")
    export.set_defaults(run=_export)

    grow = commands.add_parser("grow", help="a deeper model from a trained one, from folder to folder")
    grow.add_argument("source", metavar="SRC", help='"mini", a transformer folder or a pipeline folder')
    grow.add_argument("target", metavar="DST", help="folder; must not exist")
    grow.add_argument("--layers", type=int, required=True, help="blocks of the grown model")
    grow.add_argument(
        "--keep",
        type=int,
        metavar="K",
        help="blocks kept, the first K (default: all; partial_preservation: all but two)",
    )
    grow.add_argument(
        "--strategy", default="partial_preservation", metavar="NAME",
        help="partial_preservation (default), interleave, cyclic, block_replication or stack",
    )  # fmt: skip
    grow.add_argument("--seed", type=int, default=0, help="of the new blocks (default 0)")
    grow.add_argument("--add-qk-norm", action="store_true", help="give a SANA-1.0 model the norms of SANA-1.5")
    grow.add_argument("--shard-size", metavar="SIZE", help="largest file, such as 5GB")
    grow.add_argument(
        "--check", action="store_true", help="read everything back and compare with the source's function"
    )
    grow.set_defaults(run=_grow)

    importance = commands.add_parser("importance", help="how much each block does: JSON, a figure, a table")
    importance.add_argument("source", metavar="SRC", help='"mini" or a pipeline folder')
    importance.add_argument("--out", required=True, metavar="DIR", help="folder for importance.json and importance.png")
    _calibration_options(importance)
    importance.add_argument("--bins", type=int, default=10, help="timestep bins of equal width (default 10)")
    importance.add_argument(
        "--no-loss", action="store_true", help="leave out the loss without each block, most of the time"
    )
    importance.set_defaults(run=_importance)

    prune = commands.add_parser("prune", help="a shallower model from a trained one, from folder to folder")
    prune.add_argument("source", metavar="SRC", help='"mini", a pipeline folder or a transformer folder')
    prune.add_argument("target", metavar="DST", help="folder; must not exist")
    prune.add_argument("--keep", type=int, metavar="K", help="blocks that stay")
    prune.add_argument(
        "--by", metavar="NAME", help="importance (default), loss, search, learned or indices (default with --indices)"
    )
    prune.add_argument("--importance", metavar="FILE", help="importance.json of SRC; else it is measured")
    prune.add_argument(
        "--indices", metavar="LIST", help="0,1,3 or a file: a JSON list, or a pruned folder's sana15.json"
    )
    prune.add_argument("--candidates", type=int, metavar="N", help="search: removals tried at each depth (default 4)")
    prune.add_argument(
        "--trial-steps", type=int, metavar="N", help="search: healing before each is judged (default 20)"
    )
    prune.add_argument("--learning-steps", type=int, metavar="N", help="learned: steps (default 200)")
    prune.add_argument("--group", type=int, metavar="M", help="learned: neighbours that share their places (default 4)")
    prune.add_argument("--rank", type=int, help="learned: of the changes that make up for missing blocks (default 8)")
    prune.add_argument(
        "--heal",
        type=int,
        nargs="?",
        const=100,
        metavar="STEPS",
        help="train the pruned model (default 100 steps)",
    )
    prune.add_argument(
        "--heal-on",
        choices=("scenes", "samples"),
        help="rendered scenes (default; mini text encoder only) or what SRC makes of the calibration prompts (else)",
    )
    prune.add_argument("--heal-batch", type=int, metavar="N", help="pictures of a step (default: 64 mini, else 4)")
    prune.add_argument("--heal-lr", type=float, metavar="RATE", help="default: by the depth taken away; else 1e-4")
    prune.add_argument(
        "--distill",
        type=float,
        metavar="W",
        help="of healing: weight of the distance from the source (default 10; 0: the flow loss instead)",
    )
    prune.add_argument("--shard-size", metavar="SIZE", help="largest file, such as 5GB")
    _calibration_options(prune)
    prune.set_defaults(run=_prune)

    convert = commands.add_parser("convert", help="the authors' .pth to a diffusers folder, and back")
    convert.add_argument(
        "source", metavar="IN", help=".pth or .safetensors in the release's layout, or a transformer folder"
    )
    convert.add_argument(
        "target", metavar="OUT", help="folder, or FILE.safetensors or FILE.pth for the release's layout; must not exist"
    )
    convert.add_argument(
        "changes", nargs="*", metavar="key=value", help="what a release file does not tell, such as sample_size=16"
    )
    convert.add_argument("--dtype", choices=tuple(DTYPES), help="default: as stored")
    convert.add_argument("--shard-size", metavar="SIZE", help="largest file, such as 5GB (default: one file)")
    convert.add_argument("--ema", action="store_true", help="the averaged weights of a .pth")
    convert.set_defaults(run=_convert)

    info = commands.add_parser("info", help="parameters and sizes of a published size or a transformer folder")
    info.add_argument("model", metavar="SIZE|DIR")
    info.add_argument("--memory", action="store_true", help="what training takes, by precision and optimizer")
    info.add_argument("--batch", type=int, default=1, help="pictures of a training step (default 1)")
    info.add_argument(
        "--latent", type=int, metavar="SIDE", help="of the latents, pixels / 32 (default: the model's own)"
    )
    info.set_defaults(run=_info)

    reproduce = commands.add_parser("reproduce", help="this project's experiments; the same command resumes")
    reproduce.add_argument("name", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)} (default: all)")
    reproduce.add_argument("--budget", default="small", choices=BUDGETS, help="sizes: smoke, small (default) or full")
    reproduce.add_argument("--out", metavar="DIR", help="default out/reproduce-BUDGET; processes may share it")
    reproduce.add_argument("--only", default="", metavar="TEXT", help="only cells with this in their name")
    reproduce.add_argument("--list", action="store_true", help="name the cells, and say which are done")
    _device_option(reproduce)
    reproduce.set_defaults(run=_reproduce)
    return root


def _bootstrap_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rule", default="strict", choices=("strict", "geneval"), help="the checker's rule")
    command.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap (default 10000)")
    command.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")


def _device_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", choices=DEVICES, help="default: the GPU where there is one")


def _calibration_options(command: argparse.ArgumentParser) -> None:
    _device_option(command)
    command.add_argument(
        "--prompts", metavar="FILE", help="calibration prompts, as in sana15 sample (default: drawn for the mini model)"
    )
    command.add_argument("--count", type=int, default=100, help="of calibration prompts (default 100)")
    command.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at once (default 16)")


def _sampling_options(command: argparse.ArgumentParser) -> None:
    _device_option(command)
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


def main(arguments: Sequence[str] | None = None) -> int:
    if arguments is None:  # the program, not a caller in Python
        guard_tracebacks()
    args = parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except (OSError, DataError) as error:
        return _fail(args.command, error, 3)
    except ValueError as error:
        return _fail(args.command, error, 2)
    except ModuleNotFoundError as error:
        return _fail(args.command, f"{error}; pip install 'sana-ext[sana15]'", 3)
    except RuntimeError as error:
        if (message := trouble(error)) is None:
            raise
        return _fail(args.command, message, 3)
    except KeyboardInterrupt:
        return _fail(args.command, "interrupted", 130)


def _fail(command: str, error: object, code: int) -> int:
    print(f"sana15 {command}: {' '.join(redacted(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
