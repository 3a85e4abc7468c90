"""Ways in which a model's weights change under what patch keeps between steps; each changes the model's output."""

import copy

import torch
from diffusers_models import inputs
from peft import LoraConfig
from torch.nn.utils.parametrize import register_parametrization

LORA = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])


def replace(model):
    attn = model.transformer_blocks[1].attn2
    attn.to_v.weight = torch.nn.Parameter(attn.to_v.weight * 1.5)


def alias(model):
    """Another parameter over the same memory, edited as often as the first."""
    layer = model.transformer_blocks[1].attn2.to_v
    twin = torch.nn.Parameter(layer.weight.data)
    with torch.no_grad():
        for _ in range(layer.weight._version):
            twin.add_(0.1)
    assert twin._version == layer.weight._version > 0
    layer.weight = twin


def edit(model):
    with torch.no_grad():
        model.transformer_blocks[0].attn2.to_k.weight.mul_(-1)
        model.transformer_blocks[1].attn2.to_v.weight.mul_(-1)


def edit_all(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)


def edit_bias(model):
    with torch.no_grad():
        model.transformer_blocks[0].attn2.to_v.bias.add_(1)


def edit_caption(model):
    with torch.no_grad():
        model.caption_projection.linear_1.weight.mul_(-1)


def edit_caption_norm(model):
    with torch.no_grad():
        model.caption_norm.weight.mul_(-1)


def edit_norm(model):
    with torch.no_grad():
        model.transformer_blocks[0].attn2.norm_k.weight.mul_(-1)


def eps_of_norm(model):
    model.transformer_blocks[0].attn2.norm_k.eps = 1.0


def hook_on_norm(model):
    model.transformer_blocks[0].attn2.norm_k.register_forward_hook(lambda module, args, out: out * 2)


class Twice(torch.nn.Module):
    def forward(self, weight):
        return weight * 2


def parametrize(model):
    """A weight of a foreign class of module that changes while the cache looks at its original."""
    register_parametrization(model.transformer_blocks[0].attn2.norm_k, "weight", Twice())
    register_parametrization(model.transformer_blocks[1].attn2.to_v, "weight", Twice())


def hook_on_block(model):
    def louder(block, args):
        return (*args[:2], args[2] * 3, *args[3:])

    model.transformer_blocks[0].register_forward_pre_hook(louder)


def new_storage(model):
    """The old memory is free for others before the new weight is made."""
    for block in model.transformer_blocks:
        weight = block.attn2.to_v.weight
        values, weight.data = weight.data * 2, torch.empty(0)
        weight.data = values.clone()


def fused_optimizer(model):
    """Writes past autograd: no version changes."""
    weight = model.transformer_blocks[0].attn2.to_v.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()


def average(model):
    """As an average of weights is put in between training and validation."""
    model(**inputs(model))
    for p in model.parameters():
        p.data.copy_(p.data * 1.1)


def plain_tensors(model):
    """As FSDP and DataParallel leave them."""
    for block in model.transformer_blocks:
        for layer in (block.attn2.to_k, block.attn2.to_v):
            layer.__dict__["weight"] = layer._parameters.pop("weight").data * 2
            layer.__dict__["bias"] = layer._parameters.pop("bias").data


def load(model):
    model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})


def new_data(model):
    weight = model.transformer_blocks[0].attn2.to_v.weight
    weight.data = weight.data * 2


def new_data_of_block(model):
    for p in model.transformer_blocks[0].parameters():
        p.data = p.data * 1.5


def new_layer(model):
    attn = model.transformer_blocks[0].attn2
    attn.to_k = copy.deepcopy(attn.to_k)
    attn.to_k.weight.data.mul_(-1)


def hook(model):
    model.transformer_blocks[0].attn2.to_k.register_forward_hook(lambda module, args, out: out * 2)


def hook_on_attention(model):
    model.transformer_blocks[0].attn1.to_v.register_forward_hook(lambda module, args, out: out * 2)


def hook_on_caption(model):
    model.caption_projection.linear_2.register_forward_hook(lambda module, args, out: out * 2)


def adapter(model):
    model.add_adapter(LORA)


def merged_adapter(model):
    """fuse and unload write through weight.data and give the first layer back, without a forward in between."""
    model.add_adapter(LORA)
    model.fuse_lora()
    model.unload_lora()


CHANGES = [
    replace,
    alias,
    edit,
    edit_all,
    edit_bias,
    edit_caption,
    edit_caption_norm,
    edit_norm,
    eps_of_norm,
    hook_on_norm,
    parametrize,
    hook_on_block,
    new_storage,
    fused_optimizer,
    average,
    plain_tensors,
    load,
    new_data,
    new_data_of_block,
    new_layer,
    hook,
    hook_on_attention,
    hook_on_caption,
    adapter,
    merged_adapter,
]
