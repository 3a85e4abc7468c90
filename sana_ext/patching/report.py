"""Reports what `patch` did to a model, block by block."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """Names what `patch` did: `replaced`, the names of the blocks on the fused path; `cached`, the transformers whose
    text or whole step is cached from one denoising step to the next; and `skipped`, name -> reason.

    A name in `skipped` is a block that keeps diffusers' code, or a part of a replaced block (its attention, its FFN,
    one of its layers) that is called as the module it is while the rest of the block is fused.
    """

    replaced: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    blocks: int = 0

    def __str__(self) -> str:
        lines = [f"sana_ext.patch: {len(self.replaced)} of {self.blocks} blocks replaced"]
        lines += [f"  cached between denoising steps: {what}" for what in self.cached]
        grouped: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            grouped.setdefault(reason, []).append(name or "model")
        for reason, names in grouped.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"  not replaced: {shown}: {reason}")
        return "\n".join(lines)
