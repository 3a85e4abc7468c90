"""Counts what training a model takes, in bytes, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sana_ext import optim

from ..model.config import SanaConfig
from ..model.transformer import SanaTransformer

TEXT_TOKENS = 300  # SANA's selection of the text encoder's features
#: fp32 weights under bf16 autocast, or bf16 weights alone.
PRECISIONS = {"mixed": torch.float32, "bf16": torch.bfloat16}
OPTIMIZERS: dict[str, Any] = {
    "AdamW": torch.optim.AdamW,
    "AdamW8bit": optim.AdamW8bit,
    "CAME8bit": optim.CAME8bit,
}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one training step. Not counted: short-lived workspace, and what the allocator rounds up."""

    precision: str
    optimizer: str
    weights: int
    gradients: int
    largest_gradient: int  # all that remains of the gradients with `sana_ext.optim.fuse_backward`
    state: int
    activations: int  # what the forward pass keeps for the backward
    checkpointed: int  # the same with gradient checkpointing: the inputs of all blocks and the inside of one

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state + self.activations

    @property
    def least(self) -> int:
        """With gradient checkpointing and, for an 8-bit optimizer, the step fused into the backward."""
        gradients = self.gradients if self.optimizer == "AdamW" else self.largest_gradient
        return self.weights + gradients + self.state + self.checkpointed


def training_memory(
    config: SanaConfig, *, batch: int = 1, latent: int | None = None, text_tokens: int = TEXT_TOKENS
) -> list[TrainingMemory]:
    """One row for each precision and optimizer.

    Weights and activations are those of the model's own forward pass on tensors without memory, optimizer state that of
    the optimizer itself.

    Args:
        config: the model.
        batch: pictures of a step on one device.
        latent: side of the latents (pixels / 32 for the published autoencoder); default: what the model was made for.
        text_tokens: of each prompt.

    Raises:
        ValueError: a batch or a number of tokens below 1, or a latent side that the patch size does not divide.
    """
    latent = config.sample_size if latent is None else latent
    for name, value in (("batch", batch), ("latent", latent), ("text_tokens", text_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    rows = []
    for precision, dtype in PRECISIONS.items():
        with _without_memory(dtype):
            model = SanaTransformer(config)
            every, inputs = (_kept(model, batch, latent, text_tokens, precision, block) for block in (False, True))
            checkpointed = inputs + (every - inputs) // config.num_layers  # one block at a time is recomputed
            sizes = [p.numel() * p.element_size() for p in model.parameters()]
            for name in OPTIMIZERS:
                state = _state_bytes(name, model)
                rows.append(
                    TrainingMemory(precision, name, sum(sizes), sum(sizes), max(sizes), state, every, checkpointed)
                )
    return rows


def _state_bytes(name: str, model: SanaTransformer) -> int:
    optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-4)
    if hasattr(optimizer, "state_bytes"):
        return optimizer.state_bytes()
    # torch's AdamW: both moments in the parameter's dtype, and an fp32 step counter each.
    return sum(2 * p.numel() * p.element_size() + 4 for p in model.parameters())


def _kept(
    model: SanaTransformer, batch: int, latent: int, text_tokens: int, precision: str, checkpointing: bool
) -> int:
    """Bytes which the forward pass keeps for the backward, weights apart."""
    config = model.config
    inputs = {
        "latents": torch.empty(batch, config.in_channels, latent, latent),
        "text": torch.empty(batch, text_tokens, config.caption_channels),
        "timestep": torch.empty(batch, dtype=torch.float32),
        "text_mask": torch.empty(batch, text_tokens),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.empty(batch, dtype=torch.float32)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # by storage; the tensor keeps its storage's address from being used again

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage()._cdata not in own:
            kept[t.untyped_storage()._cdata] = t
        return t

    model.gradient_checkpointing = checkpointing
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"),
    ):
        model(**inputs)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@contextmanager
def _without_memory(dtype: torch.dtype) -> Iterator[None]:
    """Tensors with sizes and no contents; new ones of this dtype."""
    before = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def table(rows: list[TrainingMemory]) -> str:
    """For the terminal, in GiB."""
    heads = ("precision", "optimizer", "weights", "gradients", "state", "activations", "total", "least")
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        values = (row.weights, row.gradients, row.state, row.activations, row.total, row.least)
        lines.append((row.precision, row.optimizer, *(f"{value / 2**30:.2f}" for value in values)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(v.ljust(w) if i < 2 else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths))) for line in lines
    )
