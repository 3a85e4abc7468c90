"""patch, unpatch: the fused path inside a stock diffusers SANA model, in place and reversibly.

A block keeps its object, its parameters and their names; only its class changes, to one that inherits from the stock
class and overrides forward. What patch decides here is reported; what changes later (LoRA, hooks, processors, devices)
is decided again at every call, by the same guards.
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import torch
from torch import nn

from .. import _extension
from .._plain import Operand, leaf_reason, parameter
from . import cuda_graph as graphs
from . import guards, projections
from .block import FusedBlock, fused_forward, names_of
from .keeping import keep, release
from .report import Report
from .reversible import class_without, in_front, put_on

BLOCK = ("diffusers.models.transformers.sana_transformer", "SanaTransformerBlock")
TRANSFORMER = ("diffusers.models.transformers.sana_transformer", "SanaTransformer2DModel")
COMPONENTS = ("transformer", "controlnet")


def patch(model_or_pipeline: Any, *, cuda_graph: bool = False, cache_text: bool = False) -> Report:
    """Lets compiled kernels compute the blocks of a diffusers SANA model, in place, with the same results.

    Parameter names, saving and loading, deepcopy, gradient checkpointing, torch.compile, LoRA, hooks, offloading and
    foreign attention processors keep working: what the fused code cannot serve is called as diffusers would call it.
    torch.func, forward-mode AD, torch.jit.trace and torch.export see diffusers' code.
    Weights are read at every call, so nothing goes stale; on a GPU those of a self-attention's q, k and v move next to
    each other in memory, for one product without gradients, and stay the same parameters. Patching twice changes
    nothing. A pickled model (``torch.save(model)``) is a stock model; a state dict is the same either way.

    Args:
        model_or_pipeline: a ``SanaTransformer2DModel``, a ``SanaControlNetModel``, any ``torch.nn.Module`` that
            contains their blocks, or a diffusers pipeline (its transformer and ControlNet are patched). Move it to its
            device first.
        cache_text: keep the text's keys and values from one denoising step to the next, for the last two texts: 107 MB
            each for SANA-1.5 1600M in bf16 with guidance. Used without gradients, outside torch.compile and
            torch.inference_mode, while text and weights stay the same tensors, unedited; blocks with an adapter on
            these projections do without. A step of an optimizer or a forward with gradients empties the cache. What
            writes through ``weight.data`` (diffusers' ``EMAModel.copy_to``) cannot be seen: call patch again after it,
            which starts an empty cache. The option is that of the last call of patch.
        cuda_graph: run a whole denoising step of a CUDA model as one CUDA graph, captured on the first call of each form
            (shapes, plain arguments; four are kept). Calls that a graph cannot serve run as without it: gradients,
            autocast, hooks, adapters, offloading, foreign modules. Not yet run on a GPU.

    Returns:
        A `Report`. ``print(report)`` says what was replaced and, for the rest, why not.

    Raises:
        TypeError: neither a module nor a pipeline with a transformer.
        ValueError: an option that cannot be met.

    Source: diffusers ``SanaTransformerBlock``; SANA, arXiv:2410.10629.
    """
    models = _models("patch", model_or_pipeline)
    for name, value in (("cuda_graph", cuda_graph), ("cache_text", cache_text)):
        if not isinstance(value, bool):
            raise TypeError(f"sana_ext.patch: {name} must be True or False, got {value!r}")
    if cuda_graph:
        devices = {p.device.type for _, model in models for p in model.parameters()}
        if devices != {graphs.DEVICE}:
            raise ValueError(
                f"sana_ext.patch: cuda_graph=True needs a model on {graphs.DEVICE}, this one is on {', '.join(sorted(devices))}"
            )
    guards.find_kernels()
    report = Report()
    for prefix, model in models:
        for name, module in model.named_modules(prefix=prefix):
            stock = _class_of(type(module), BLOCK)
            if stock is not None:
                report.blocks += 1
                _patch_block(name, module, stock, report)
        _keep(prefix, model, report, text=cache_text, step=cuda_graph)
    if not report.blocks:
        report.skipped[""] = f"no {BLOCK[1]} of diffusers in {type(model_or_pipeline).__name__}"
    return report


def unpatch(model_or_pipeline: Any) -> int:
    """Gives every block its own class back.

    Args:
        model_or_pipeline: what `patch` takes.

    Returns:
        The number of blocks that were restored.

    Raises:
        TypeError: neither a module nor a pipeline with a transformer.
        RuntimeError: a block's class was changed again after `patch` (FSDP's fully_shard), so it cannot be restored.
    """
    restored = 0
    for prefix, model in _models("unpatch", model_or_pipeline):
        for name, module in model.named_modules(prefix=prefix):
            if not isinstance(module, FusedBlock):
                continue
            stock = class_without(module)
            if stock is None:
                raise RuntimeError(
                    f"sana_ext.unpatch: {name} has the class {type(module).__name__}, "
                    "made after patch by other code; undo that first"
                )
            module.__class__ = stock
            restored += 1
        for module in model.modules():
            release(module)
    return restored


def _models(op: str, given: Any) -> list[tuple[str, nn.Module]]:
    if isinstance(given, nn.Module):
        return [("", given)]
    found = [(name, getattr(given, name, None)) for name in COMPONENTS]
    models = [(name, model) for name, model in found if isinstance(model, nn.Module)]
    if isinstance(given, type) or not models:
        raise TypeError(
            f"sana_ext.{op}: expected a torch.nn.Module or a diffusers pipeline with a transformer, "
            f"got {type(given).__name__}"
        )
    return models


def _class_of(cls: type, names: tuple[str, str]) -> type | None:
    """diffusers' class of that module and name, if cls is it or inherits from it."""
    return next((c for c in reversed(cls.__mro__) if (c.__module__, c.__name__) == names), None)


def _keep(prefix: str, model: nn.Module, report: Report, *, text: bool, step: bool) -> None:
    """Gives every transformer of diffusers in the model what is wanted, after taking what an earlier call gave."""
    for module in model.modules():
        release(module)
    if not (text or step):
        return
    transformers = [(n, m) for n, m in model.named_modules(prefix=prefix) if _class_of(type(m), TRANSFORMER)]
    for name, module in transformers:
        reason = keep(module, _class_of(type(module), TRANSFORMER), text, step)
        if reason:
            report.skipped[f"{name} (text or step cached)".strip()] = reason
            continue
        label = name or type(module).__name__
        report.cached += [f"{what} of {label}" for what, given in (("text", text), ("step", step)) if given]
    if not transformers:
        report.skipped[f"{prefix} (text or step cached)".strip()] = f"no {TRANSFORMER[1]} of diffusers here"


def _patch_block(name: str, block: nn.Module, stock: type, report: Report) -> None:
    if not isinstance(block, FusedBlock):
        reason = _refusal(block, stock)
        if reason:
            report.skipped[name] = reason
            return
        put_on(block, functools.partial(_fused_class, stock=stock))
    _register(type(block), stock)
    report.replaced.append(name or type(block).__name__)
    projections.pack([getattr(block.attn1, layer) for layer in ("to_q", "to_k", "to_v")])
    _note_parts(name, block, names_of(stock), report)


def _refusal(block: Any, stock: Any) -> str | None:
    if "forward" in vars(block):
        return (
            "its forward was replaced on the instance (an offloading, caching or casting hook, or what a removed one "
            "left), so a new class would never be called; patch before adding hooks"
        )
    if type(block).forward is not stock.forward:
        return f"{type(block).__name__} overrides forward"
    if getattr(block, "attn2", None) is None:
        return "it has no cross-attention"
    operand, parts = _operand(block)
    if not parts:
        library = _extension.libraries().get(operand.device.type)
        why = f" (library {library.reason})" if library else ""
        return f"no compiled kernel answers on {operand.device.type}{why}"
    x = torch.empty(1, 1, 1, dtype=operand.dtype, device=operand.device)
    return guards.block_reason(block, x, operand, parts) or _disagreement(stock)


def _operand(block: Any) -> tuple[Operand, tuple[str, ...]]:
    table = parameter(block, "scale_shift_table")
    if table is None:  # parametrised
        table = next(p for p in block.parameters() if p.is_floating_point())
    return Operand(table.device, table.dtype, None), guards.compiled_parts.get((table.device.type, False), ())


def _channels(block: Any) -> int:
    """The channels of the residual stream, as far as the norms tell; a call knows."""
    shapes = [getattr(getattr(block, name), "normalized_shape", None) for name in ("norm1", "norm2")]
    return next((shape[-1] for shape in shapes if shape), 0)


def _note_parts(name: str, block: Any, names: Any, report: Report) -> None:
    """Notes the parts and layers of a replaced block that keep diffusers' code as things stand."""
    operand, parts = _operand(block)
    plan = guards.plan(block, names, operand, parts, _channels(block))
    for part, reason in zip(plan._fields, plan):
        if reason:
            report.skipped[f"{name}.{part}"] = reason
        elif part.startswith("attn"):
            attn = getattr(block, part)
            for layer in ("to_q", "to_k", "to_v", "to_out.0"):
                if reason := leaf_reason(attn.get_submodule(layer), nn.Linear, operand):
                    report.skipped[f"{name}.{part}.{layer}"] = reason


@functools.cache
def _fused_class(cls: Any, stock: Any) -> type:
    """cls with the fused forward in front; its name stays: diffusers and accelerate match blocks by class name."""
    return in_front(FusedBlock, cls, {"_sana_ext_names": names_of(stock), "__module__": __name__})


def _register(made: type, cls: type) -> None:
    """Tells diffusers' registry of blocks, which its caching hooks ask, that the class is one like `cls`, if it knows that."""
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry as Registry

        Registry.register(made, copy.copy(Registry.get(cls)))
    except (
        ImportError,
        ValueError,
        AttributeError,
    ):  # an older diffusers, or one that cannot cache these blocks either
        return


@functools.cache
def _disagreement(stock: Any) -> str | None:
    """Compares this diffusers' block with the fused code: both run once on a block of 8 channels.

    A later diffusers may change its block; then the stock code stays in charge, instead of an old formula.
    """
    names = names_of(stock)
    try:
        quiet = (torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False))
        with torch.device("cpu"), quiet[0], quiet[1], quiet[2]:
            torch.default_generator.manual_seed(0)  # torch.manual_seed would reach every GPU's, which nobody restores
            block = stock(8, 2, 4, 0.0, 2, 4, 8, qk_norm="rms_norm_across_heads").float().eval()
            x, text, timestep = (torch.randn(size, dtype=torch.float32) for size in ((1, 6, 8), (1, 3, 8), (1, 48)))
            mask = torch.tensor([[[0.0, 0.0, -10000.0]]], dtype=torch.float32)
            expected = block(x, None, text, mask, timestep, 2, 3)
            operand = Operand(x.device, x.dtype, None)
            plan = guards.plan(block, names, operand, ("norms", "attn1", "ff"), 8)
            got = fused_forward(block, plan, operand, x, text, mask, timestep, 2, 3)
            off = (got - expected).abs().max().item()
    except Exception as error:  # whatever it is, the stock code must go on working
        return f"the check against {_version()} failed: {type(error).__name__}: {error}"
    if any(plan) or not off <= 1e-4:
        return f"{_version()} computes something else than this version of sana_ext (difference {off:.1e})"
    return None


def _version() -> str:
    return f"diffusers {getattr(sys.modules.get('diffusers'), '__version__', 'of unknown version')}"
