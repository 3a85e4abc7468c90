"""One SANA-1.5 1600M block, and one denoising step of the whole model: stock diffusers against sana_ext.patch.

The block runs 1024 tokens (1024 px) with 300 text tokens and a mask; forward and forward + backward. The step runs batch 2
(guidance) at 512 px by default, --pixels 1024 for the full size, and --loop 20 calls make the denoising loop of one picture;
text and (on a GPU) the whole step are kept between them. Weights are random; the arithmetic is the real model's.
"""

import copy

import harness
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock

import sana_ext

WIDTH, TEXT_WIDTH, TEXT = 2240, 2304, 300
FLOP_PER_TOKEN, FLOP_PER_TEXT = 138.7e6, 6.02e9  # one block: per image token, and the text projections per image


def sizes(args):
    return {"heads": 3, "cross": (2, 48), "text": 20, "layers": 2} if args.quick else {
        "heads": 70, "cross": (20, 112), "text": TEXT, "layers": 20}  # fmt: skip


def shared_copy(module):
    """A second module tree over the same parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def block_case(args, B, dtype, direction):
    size = sizes(args)
    width, (cross_heads, cross_dim), side = size["heads"] * 32, size["cross"], 8 if args.quick else 32
    op, shape = f"block {direction}", f"{B}x{side * side}x{width}"
    if not harness.wanted(args, op, shape, dtype):
        return None
    torch.manual_seed(0)
    stock = SanaTransformerBlock(
        width, size["heads"], 32, num_cross_attention_heads=cross_heads, cross_attention_head_dim=cross_dim,
        cross_attention_dim=width, attention_bias=False, qk_norm="rms_norm_across_heads",
    ).to(args.device, dtype)  # fmt: skip
    ours = shared_copy(stock)
    sana_ext.patch(ours)
    inputs = {
        "hidden": torch.randn(B, side * side, width),
        "text": torch.randn(B, size["text"], width),
        "timestep": torch.randn(B, 6 * width) * 0.3,
    }
    inputs = {k: v.to(args.device, dtype) for k, v in inputs.items()}
    mask = torch.zeros(B, 1, size["text"], device=args.device)
    mask[..., size["text"] // 2 :] = -10000.0
    double = copy.deepcopy(stock).double()

    def function(module):
        def fn(hidden, text, timestep):
            chosen = double if hidden.dtype == torch.float64 else module
            return chosen(hidden, None, text, mask.to(hidden.dtype), timestep, side, side)

        return fn

    functions = {"eager": function(stock), "ours": function(ours)}
    if not args.no_compile:
        functions["compile"] = harness.compiled(function(stock))
    parameters = list(stock.parameters())

    def training(fn):
        def run():
            given = dict(zip(inputs, harness.leaves(*inputs.values())))
            out = fn(**given)
            return torch.autograd.grad(out, [*given.values(), *parameters], harness.cotangent(out))

        return run

    train = direction == "forward + backward"
    flops = B * (FLOP_PER_TOKEN * side * side + FLOP_PER_TEXT)
    return harness.Case(
        op,
        shape,
        dtype,
        {k: training(fn) if train else harness.forward(fn, inputs) for k, fn in functions.items()},
        harness.gate(functions["ours"], functions["eager"], inputs, gradients=train),
        flops=0 if args.quick else flops * (3 if train else 1),
    )


def step_case(args, dtype):
    size = sizes(args)
    width, (cross_heads, cross_dim) = size["heads"] * 32, size["cross"]
    side = 8 if args.quick else args.pixels // 32
    op = "denoising step" if args.loop == 1 else f"loop of {args.loop} denoising steps"
    shape = f"2x{side * side}, {size['layers']} blocks"
    if not harness.wanted(args, op, shape, dtype):
        return None
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(args.device):  # 1.6 billion random numbers take a CPU half a minute
        stock = SanaTransformer2DModel(
            num_attention_heads=size["heads"], num_layers=size["layers"], num_cross_attention_heads=cross_heads,
            cross_attention_head_dim=cross_dim, cross_attention_dim=width, caption_channels=TEXT_WIDTH,
            qk_norm="rms_norm_across_heads", sample_size=32,
        ).eval()  # fmt: skip
    torch.set_default_dtype(torch.float32)
    ours = shared_copy(stock)
    sana_ext.patch(ours, cache_text=args.loop > 1, cuda_graph=args.device == "cuda")
    latents = torch.randn(2, 32, side, side).to(args.device, dtype)
    text = torch.randn(2, size["text"], TEXT_WIDTH).to(args.device, dtype)
    mask = torch.ones(2, size["text"], device=args.device)
    mask[1, size["text"] // 3 :] = 0
    timestep = torch.full((2,), 500, device=args.device)

    def call(model, latents, text):
        return model(latents, text, timestep, encoder_attention_mask=mask, return_dict=False)[0]

    @torch.no_grad()
    def gate():
        peer = call(stock, latents, text)
        for _ in range(3):  # the text's cache is filled, then a graph is captured, then it is replayed
            own = call(ours, latents, text)
        harness.assert_no_worse("step", own, peer, in_double(stock, lambda m: call(m, latents.double(), text.double())))

    def steps(step):
        def run(latents, text):
            text = text.clone()  # a picture's own text: nothing is kept from the picture before
            for _ in range(args.loop):
                step(latents, text)

        return run if args.loop > 1 else step

    inputs = {"latents": latents, "text": text}
    columns = {
        "eager": lambda latents, text: call(stock, latents, text),
        "ours": lambda latents, text: call(ours, latents, text),
    }
    if not args.no_compile:
        columns["compile"] = harness.compiled(lambda latents, text: call(stock, latents, text))
    columns = {name: steps(step) for name, step in columns.items()}
    return harness.Case(
        op,
        shape,
        dtype,
        {k: harness.forward(fn, inputs) for k, fn in columns.items()},
        gate,
        flops=0 if args.quick else args.loop * 2 * size["layers"] * (FLOP_PER_TOKEN * side * side + FLOP_PER_TEXT),
        rounds=min(args.rounds, 3),
    )


def in_double(model, call):
    """call(model) in fp64, one leaf module at a time in fp64 so that the whole model never is."""
    dtype = next(model.parameters()).dtype
    handles = []
    for module in model.modules():
        if isinstance(module, SanaTransformerBlock) or not any(True for _ in module.children()):
            handles.append(module.register_forward_pre_hook(lambda m, _: m.double() and None))
            handles.append(module.register_forward_hook(lambda m, _, out: m.to(dtype) and None))
    table = model.scale_shift_table.data
    model.scale_shift_table.data = table.double()
    try:
        return call(model)
    finally:
        model.scale_shift_table.data = table
        for handle in handles:
            handle.remove()
        model.to(dtype)


if __name__ == "__main__":
    args = harness.arguments(__doc__, pixels=512, loop=1)
    kinds = ("forward", "forward + backward")
    cases = [
        lambda B=B, d=d, k=k: block_case(args, B, d, k)
        for B in args.images
        for d in (torch.float32, torch.bfloat16)
        for k in kinds
    ]
    cases += [lambda d=d: step_case(args, d) for d in (torch.float32, torch.bfloat16)]
    harness.run(cases, args)
