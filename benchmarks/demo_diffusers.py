"""A stock diffusers SanaPipeline, run as it is and after sana_ext.patch: same prompt, same noise, times and differences.

Without --model everything is built here with random weights and the true sizes: the SANA-1.5 1600M transformer (bf16), the
DC-AE f32c32 autoencoder (fp32), and a text encoder shrunk to one Gemma-2 layer (hidden size 2304, so that the transformer
sees what it expects). The pictures are then noise; the arithmetic is the real model's. With --model DIR a folder saved by
diffusers' SanaPipeline is used instead.

    python benchmarks/demo_diffusers.py --size 512 --steps 2 --out out/demo-diffusers
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from PIL import Image, ImageDraw

import sana_ext

SANA_1600M = {
    "in_channels": 32, "out_channels": 32, "num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 20,
    "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240, "caption_channels": 2304,
    "mlp_ratio": 2.5, "sample_size": 32, "patch_size": 1, "qk_norm": "rms_norm_across_heads",
}  # fmt: skip
DC_AE_F32C32 = {
    "in_channels": 3, "latent_channels": 32, "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3), "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)), "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "upsample_block_type": "interpolate", "downsample_block_type": "conv", "scaling_factor": 0.41407,
}  # fmt: skip
PROMPT = "a small red house on a green hill under a blue sky"


def build_pipeline() -> SanaPipeline:
    """Real classes, true sizes, random weights; only the text encoder is shrunk."""
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    torch.set_default_dtype(torch.bfloat16)  # initialise in the final precision: half the memory and time
    try:
        transformer = SanaTransformer2DModel(**SANA_1600M)
        text_encoder = Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer), hidden_size=2304, intermediate_size=9216, num_hidden_layers=1,
                num_attention_heads=8, num_key_value_heads=4, head_dim=256,
            )
        )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    return SanaPipeline(
        tokenizer, text_encoder.eval(), AutoencoderDC(**DC_AE_F32C32).eval(), transformer.eval(), scheduler
    )


def build_tokenizer():
    """A byte-level BPE tokenizer learnt from this file: enough to turn a prompt into token ids."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    bpe.train_from_iterator(
        [__doc__, PROMPT, *diffusers.SanaPipeline.__call__.__doc__.splitlines()],
        4096,
        special_tokens=special,
        show_progress=False,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def generate(
    pipe: SanaPipeline, args: argparse.Namespace, steps: int
) -> tuple[torch.Tensor, Image.Image, list[float], float]:
    """(final latents, picture, seconds of each denoising step, seconds of everything after the last step)."""
    marks: list[float] = []
    latents: list[torch.Tensor] = []
    stock_forward = pipe.transformer.forward

    def forward(*values, **named):  # the first mark: prompt encoded, denoising begins
        if not marks:
            marks.append(time.perf_counter())
        return stock_forward(*values, **named)

    def after_step(_pipe, _step, _timestep, values):
        marks.append(time.perf_counter())
        latents.append(values["latents"].float().clone())
        return {}

    pipe.transformer.forward = forward
    try:
        picture = pipe(
            PROMPT, height=args.size, width=args.size, num_inference_steps=steps, guidance_scale=4.5,
            generator=torch.Generator().manual_seed(args.seed), use_resolution_binning=False, callback_on_step_end=after_step,
        ).images[0]  # fmt: skip
    finally:
        del pipe.transformer.forward
    return latents[-1], picture, [b - a for a, b in itertools.pairwise(marks)], time.perf_counter() - marks[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", type=int, default=512, help="side of the picture in pixels, a multiple of 32 (default 512)"
    )
    parser.add_argument("--steps", type=int, default=2, help="denoising steps (default 2)")
    parser.add_argument("--model", help="folder of a SanaPipeline saved by diffusers (default: random weights)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo-diffusers"), help="folder for the pictures and demo.json"
    )
    args = parser.parse_args()
    if args.size <= 0 or args.size % 32:
        parser.error(f"--size must be a positive multiple of 32, got {args.size}")
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.model and not (Path(args.model) / "model_index.json").exists():
        parser.error(f"--model {args.model}: no model_index.json there, so it is not a saved pipeline")

    begin = time.perf_counter()
    if args.model:
        pipe = SanaPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
        pipe.vae.to(torch.float32)
        print(f"Pipeline of {args.model}, transformer and text encoder in bfloat16, autoencoder in float32.")
    else:
        pipe = build_pipeline()
        print(
            "SANA-1.5 1600M transformer (bf16) and DC-AE f32c32 (fp32) at full size with random weights: the picture will be noise.\n"
            "Shrunk: Gemma-2 to one layer of hidden size 2304, its tokenizer to one learnt here."
        )
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    print(f"{parameters / 1e6:.0f}M transformer parameters ready in {time.perf_counter() - begin:.0f} s; "
          f"{torch.get_num_threads()} threads; {args.size}x{args.size} pixels, {args.steps} steps, guidance 4.5.\n")  # fmt: skip

    pipe.set_progress_bar_config(desc="warm-up")
    generate(pipe, args, 1)
    runs = {}
    for name in ("stock", "patched"):
        if name == "patched":
            print(sana_ext.patch(pipe))
        pipe.set_progress_bar_config(desc=name)
        runs[name] = generate(pipe, args, args.steps)

    (stock_latents, stock_picture, stock_steps, _), (latents, picture, steps, _) = runs["stock"], runs["patched"]
    difference = (latents - stock_latents).abs().max().item()
    scale = stock_latents.abs().max().item()
    print(f"\n{'step':>5} {'stock s':>9} {'patched s':>10} {'ratio':>6}")
    for i, (a, b) in enumerate(zip(stock_steps, steps)):
        print(f"{i + 1:>5} {a:>9.2f} {b:>10.2f} {a / b:>6.2f}")
    ratio = statistics.median(a / b for a, b in zip(stock_steps, steps))
    print(
        f"median ratio {ratio:.2f}; largest difference of the final latents {difference:.3g} (largest value {scale:.3g})"
    )

    args.out.mkdir(parents=True, exist_ok=True)
    sheet = Image.new("RGB", (2 * args.size, args.size + 20), "white")
    for i, (name, image) in enumerate((("stock", stock_picture), ("patched", picture))):
        image.save(args.out / f"{name}.png")
        sheet.paste(image, (i * args.size, 20))
        ImageDraw.Draw(sheet).text((i * args.size + 4, 4), name, fill="black")
    sheet.save(args.out / "sheet.png")
    record = {
        "stock_step_s": stock_steps, "patched_step_s": steps, "latent_difference": difference, "latent_scale": scale,
        "size": args.size, "steps": args.steps, "model": args.model or "random weights", "torch": torch.__version__,
        "peak_memory_GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }  # fmt: skip
    (args.out / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"pictures in {args.out}/ (sheet.png shows both); peak memory {record['peak_memory_GB']} GB")


if __name__ == "__main__":
    main()
