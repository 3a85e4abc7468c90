"""What several test files share of release."""

import torch

C, F, TEXT, CHANNELS = 96, 240, 20, 4

HEADS = "num_cross_attention_heads=2"


def release(layers=2, qk_norm=True, sprint=False, dtype=torch.float32, side=16):
    """Random tensors under the keys and in the shapes of the released files (width 96 instead of 2240)."""
    shapes = {"x_embedder.proj": (C, CHANNELS, 1, 1), "t_embedder.mlp.0": (C, 256), "t_embedder.mlp.2": (C, C)}
    shapes |= {"t_block.1": (6 * C, C), "y_embedder.y_proj.fc1": (C, TEXT), "y_embedder.y_proj.fc2": (C, C)}
    shapes |= {"final_layer.linear": (CHANNELS, C)}
    if sprint:
        shapes |= {"cfg_embedder.mlp.0": (C, 256), "cfg_embedder.mlp.2": (C, C), "logvar_linear": (1, C)}
    single = {"attention_y_norm.weight": (C,), "final_layer.scale_shift_table": (2, C)}
    single |= {"y_embedder.y_embedding": (300, TEXT), "pos_embed": (1, side * side, C)}
    for i in range(layers):
        b = f"blocks.{i}."
        single |= {b + "scale_shift_table": (6, C), b + "attn.qkv.weight": (3 * C, C)}
        single |= {b + "mlp.point_conv.conv.weight": (C, F, 1, 1)}
        shapes |= {b + "attn.proj": (C, C), b + "cross_attn.q_linear": (C, C), b + "cross_attn.kv_linear": (2 * C, C)}
        shapes |= {b + "cross_attn.proj": (C, C), b + "mlp.inverted_conv.conv": (2 * F, C, 1, 1)}
        shapes |= {b + "mlp.depth_conv.conv": (2 * F, 1, 3, 3)}
        if qk_norm:
            for attention in ("attn", "cross_attn"):
                single |= {f"{b}{attention}.q_norm.weight": (C,), f"{b}{attention}.k_norm.weight": (C,)}
    for name, shape in shapes.items():
        single |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in single.items()}
    tensors["pos_embed"].zero_()  # as in every released file up to 1024 pixels
    return tensors
