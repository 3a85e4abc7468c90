"""What several test files share of importance."""

import torch

PROMPTS = ["a red circle", "two green stars", "a photo of a blue square", "a yellow cross"]


def pass_through(model, index):
    """Makes a block hand its input on."""
    block = model.transformer_blocks[index]
    with torch.no_grad():
        for module in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.conv_point):
            for parameter in module.parameters():
                parameter.zero_()
