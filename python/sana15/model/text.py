"""Prompts to text features, behind one interface with two implementations: Gemma-2 as SANA uses it, and the mini encoder.

A text encoder has `width` and `encode(prompts) -> (features [B, T, width], mask [B, T])`; mask is 1 where a token counts.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..storage.concurrency import using
from ..storage.files import DataError, read_json, read_tensors, require_finite, write_durably, write_tensors
from ..storage.redaction import said
from .measuring import evaluating

SELECTED_TOKENS = 300  # what the transformer sees: the first token and the last 299
INSTRUCTION_SHA256 = "48290080bb4fd4a264bdc81d0647ac0221359a36506e2b3e954616d6cb48c3da"


class TextEncoder(Protocol):
    width: int

    def check(self, prompts: list[str]) -> None:
        """ValueError for a prompt that the encoder cannot take."""

    def encode(self, prompts: list[str], *, negative: bool = False) -> tuple[torch.Tensor, torch.Tensor]: ...


def complex_human_instruction() -> str:
    """SANA's instruction in front of every positive prompt, as the installed diffusers' SanaPipeline has it by default.

    Raises:
        RuntimeError: diffusers' text is not the one that the released models were evaluated with.
    """
    import inspect

    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    text = "\n".join(lines)
    if hashlib.sha256(text.encode()).hexdigest() != INSTRUCTION_SHA256:
        raise RuntimeError("the instruction of the installed diffusers differs from the one SANA was released with")
    return text


class GemmaTextEncoder:
    """Gemma-2's last hidden states (arXiv:2410.10629 section 2.3): instruction + prompt, right-padded, 300 tokens kept."""

    def __init__(self, model: Any, tokenizer: Any, instruction: str | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.width = model.config.hidden_size
        self.instruction = complex_human_instruction() if instruction is None else instruction

    @staticmethod
    def load(folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> GemmaTextEncoder:
        """From a pipeline folder with `text_encoder/` and `tokenizer/`; fp16 is refused because Gemma-2 overflows in it."""
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer

        if dtype == torch.float16:
            raise ValueError("Gemma-2 overflows in float16; use bfloat16 or float32")
        root = Path(folder)
        for part in ("text_encoder", "tokenizer"):
            if not (root / part).is_dir():
                raise FileNotFoundError(f"{root / part} is missing: not a SANA pipeline folder")
        try:
            model, report = AutoModel.from_pretrained(
                root / "text_encoder", dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise DataError(f"{root}: the text encoder or tokenizer cannot be loaded: {said(error)}") from None
        if report["missing_keys"]:
            names = sorted(report["missing_keys"])
            raise DataError(f"{root / 'text_encoder'} lacks {len(names)} tensors, among them {names[0]}")
        return GemmaTextEncoder(model, tokenizer)

    def check(self, prompts: list[str]) -> None:
        """Any text will do; what is longer than 300 tokens is cut off, as SANA does."""

    @torch.no_grad()
    def encode(self, prompts: list[str], *, negative: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, 300, width] and mask [B, 300]; negative prompts go without the instruction."""
        prompts = [p.lower().strip() for p in prompts]
        with using(self.tokenizer):  # a fast one keeps padding and truncation of the call before, whoever made it
            length = SELECTED_TOKENS
            if not negative and self.instruction:
                prompts = [self.instruction + p for p in prompts]
                length = len(self.tokenizer.encode(self.instruction)) + SELECTED_TOKENS - 2
            tokens = self.tokenizer(
                prompts,
                padding="max_length",
                padding_side="right",
                max_length=length,
                truncation=True,
                add_special_tokens=True,
                return_tensors="pt",
            ).to(self.model.device)
        with evaluating(self.model):
            hidden = self.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        keep = [0, *range(-SELECTED_TOKENS + 1, 0)]
        return hidden[:, keep], tokens.attention_mask[:, keep]


class MiniTextEncoder(nn.Module):
    """Words of the scenes' grammar through one transformer layer, applied `passes` times.

    A second pass lets a word see what the first has bound to its neighbours (which of two shapes is the left one). The
    empty prompt is one `<null>` token: the unconditional branch of guidance. Words outside the vocabulary are an error
    (ValueError naming them), so that a typing mistake never becomes a wrong picture.
    """

    MAX_WORDS = 24

    def __init__(self, vocabulary: list[str], width: int = 128, heads: int = 4, passes: int = 1) -> None:
        super().__init__()
        self.vocabulary, self.width, self.heads, self.passes = list(vocabulary), width, heads, passes
        self._index = {word: i + 2 for i, word in enumerate(self.vocabulary)}  # 0 pads, 1 is <null>
        self.words = nn.Embedding(len(self.vocabulary) + 2, width)
        self.positions = nn.Parameter(sinusoids(self.MAX_WORDS, width))  # as large as the words, so that order is seen
        self.layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)

    def check(self, prompts: list[str]) -> None:
        self.tokens(prompts)

    def tokens(self, prompts: list[str]) -> torch.Tensor:
        """[B, T] word numbers, T the longest prompt of the batch."""
        rows = []
        for prompt in prompts:
            words = re.findall(r"[a-z0-9']+", prompt.lower())
            unknown = sorted({w for w in words if w not in self._index})
            if unknown:
                raise ValueError(f"the mini model does not know {', '.join(map(repr, unknown))} (prompt {prompt!r})")
            if len(words) > self.MAX_WORDS:
                raise ValueError(
                    f"the mini model reads {self.MAX_WORDS} words, the prompt has {len(words)}: {prompt!r}"
                )
            rows.append([self._index[w] for w in words] or [1])
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [B, T] -> features [B, T, width], mask [B, T]."""
        mask = tokens != 0
        x = self.words(tokens) + self.positions[: tokens.shape[1]]
        for _ in range(self.passes):
            x = self.layer(x, src_key_padding_mask=~mask)
        return self.norm(x), mask

    def encode(self, prompts: list[str], *, negative: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        return self(self.tokens(prompts).to(self.positions.device))

    def save(self, folder: str | Path) -> None:
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        config = {"vocabulary": self.vocabulary, "width": self.width, "heads": self.heads, "passes": self.passes}
        write_durably((json.dumps(config, indent=1) + "\n").encode(), root / "config.json")
        tensors = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        require_finite(tensors, str(root), "the text encoder is not written")
        write_tensors(tensors, root / "model.safetensors")

    @staticmethod
    def load(folder: str | Path) -> MiniTextEncoder:
        root = Path(folder)
        try:
            with using(torch.default_generator), torch.random.fork_rng(devices=[]):  # reading is no draw
                encoder = MiniTextEncoder(**read_json(root / "config.json"))
            encoder.load_state_dict({k: v.float() for k, v in read_tensors(root / "model.safetensors").items()})
        except (TypeError, RuntimeError) as error:
            raise DataError(f"{root} does not fit its config: {' '.join(str(error).split())}") from None
        return encoder.eval()


def sinusoids(count: int, width: int) -> torch.Tensor:
    """[count, width], sines then cosines of the place, at frequencies from 1 down to 1/10000 (the Transformer's)."""
    frequencies = 10_000.0 ** -(torch.arange(width // 2) / (width // 2))
    angles = torch.arange(count)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def is_mini(text: object) -> bool:
    """Tells whether a pipeline's text encoder is the mini model's, which knows the words of rendered scenes and no others."""
    return isinstance(text, MiniTextEncoder)
