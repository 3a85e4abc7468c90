"""patch(cuda_graph=True) with CUDA's own graphs; tests/patching/test_cuda_graph.py has the rest, with a stand-in."""

import copy

import pytest
import torch
from helpers import needs_gpu

import sana_ext
from sana_ext.patching.keeping import GRAPHS

pytest.importorskip("diffusers")
from diffusers_models import SMALL, inputs, run, transformer

pytestmark = needs_gpu


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request):
    model = transformer(SMALL).to("cuda", request.param)
    report = sana_ext.patch(model, cuda_graph=True, cache_text=True)
    assert len(report.replaced) == 2
    assert len(report.cached) == 2
    return model


@pytest.fixture
def given(model):
    return {k: v.cuda() for k, v in inputs(model, height=16, width=16).items()}


@torch.no_grad()
def assert_right(model, given):
    twin = copy.deepcopy(model)
    sana_ext.patch(twin)
    expected = run(twin, **given)
    tolerance = 1e-5 if expected.dtype == torch.float32 else 2e-2  # cuBLAS may choose another algorithm in a graph
    torch.testing.assert_close(
        run(model, **given), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
    )


def test_steps_prompts_shapes_and_weights_change(model, given):
    for i in range(3):
        for text in (given["encoder_hidden_states"], torch.randn_like(given["encoder_hidden_states"])):
            for _ in range(3):
                step = given | {
                    "hidden_states": torch.randn_like(given["hidden_states"]),
                    "encoder_hidden_states": text,
                }
                step["timestep"] = given["timestep"] + i
                assert_right(model, step)
    graphs = vars(model)[GRAPHS]
    assert graphs.captures == 1
    assert graphs.replays >= 12
    given["encoder_hidden_states"][0, 0] += 1
    other = given | {"hidden_states": torch.randn(2, 4, 8, 24, device="cuda", dtype=model.dtype)}
    for _ in range(3):
        assert_right(model, other)
    assert graphs.captures == 2
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    for _ in range(3):
        assert_right(model, other)


def test_repeats_bit_for_bit(model, given):
    with torch.no_grad():
        run(model, **given)
        first = run(model, **given)
        assert all(torch.equal(first, run(model, **given)) for _ in range(5))


def test_another_stream(model, given):
    with torch.no_grad():
        results = [run(model, **given) for _ in range(3)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(run(model, **given))
        torch.cuda.current_stream().wait_stream(stream)
        results.append(run(model, **given))
    torch.cuda.synchronize()
    assert all(torch.equal(results[1], other) for other in results[2:])
