"""A pipeline folder with the mini model's parts at toy size and random weights: it reads every prompt and paints 64x64 noise."""

from pathlib import Path

import torch

from sana15 import SanaConfig, SanaTransformer
from sana15.model.autoencoder import MINI_SIZES, Autoencoder
from sana15.model.checkpoint import save_transformer
from sana15.model.text import MiniTextEncoder
from sana15.scenes.prompts import word_list

SIZES = {
    "num_layers": 2, "num_attention_heads": 1, "num_cross_attention_heads": 1, "cross_attention_head_dim": 32,
    "in_channels": 16, "out_channels": 16, "caption_channels": 16, "sample_size": 8,
}  # fmt: skip


def make_published(folder: Path) -> Path:
    """The published models' parts at toy size: Gemma-2 with a tokenizer, DC-AE with 32 pixels per latent, 64x64 pictures."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

    torch.manual_seed(0)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ["User Prompt: anything"], 300, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    gemma = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    Gemma2Model(gemma).save_pretrained(folder / "text_encoder")
    save_transformer(SanaTransformer(SanaConfig(**SIZES | {"sample_size": 2})), folder / "transformer")
    stages = {"block_types": ["ResBlock"] * 6, "block_out_channels": (16,) * 6, "layers_per_block": (1,) * 6}
    stages |= {"qkv_multiscales": ((),) * 6}
    sides = {f"{side}_{name}": value for name, value in stages.items() for side in ("encoder", "decoder")}
    Autoencoder.build(MINI_SIZES | sides).model.save_pretrained(folder / "vae")
    return folder


def make(folder: Path, **changes: int) -> Path:
    torch.manual_seed(0)
    save_transformer(SanaTransformer(SanaConfig(**SIZES | changes)), folder / "transformer", dtype=torch.float16)
    MiniTextEncoder(list(word_list()), width=16, heads=2).save(folder / "text_encoder")
    Autoencoder.build(MINI_SIZES).model.half().save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"flow_shift": 1.0}')
    return folder
