"""patch(cuda_graph=True), all but CUDA's own part: a recording of torch operations stands in for a CUDA graph.

Like one, it repeats the operations that it saw, on the tensors that it saw, with the constants that it saw, and overwrites
its outputs; Python does not run again. tests/gpu/test_cuda_graph.py has the real one.
"""

import copy
import pickle

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers_models import inputs, run, transformer
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from weight_changes import CHANGES, adapter, edit

import sana_ext
from sana_ext.patching import cuda_graph as graphs
from sana_ext.patching.keeping import GRAPHS

pytestmark = pytest.mark.usefixtures("fused_parts", "one_thread", "recorded")


class Recording:
    def __init__(self, fn):
        self.outputs = fn()
        leaves, self.spec = pytree.tree_flatten(self.outputs)
        self.leaves = [leaf.clone() for leaf in leaves]
        self.graph = make_fx(lambda: [leaf.clone() for leaf in pytree.tree_leaves(fn())])()

    def wait(self):
        pass

    def replay(self):
        for leaf, value in zip(self.leaves, self.graph()):
            leaf.copy_(value)
        return pytree.tree_unflatten(self.leaves, self.spec)

    def release(self):
        """From here on a step on another stream may overwrite the outputs."""
        for leaf in self.leaves:
            leaf.fill_(float("nan"))


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    monkeypatch.setattr(graphs, "capture", Recording)


@pytest.fixture(params=[False, True], ids=["graph", "graph and text"])
def model(request):
    model = transformer()
    edit(model)  # so that no weight has the version of a new one
    sana_ext.patch(model, cuda_graph=True, cache_text=request.param)
    model.with_text = request.param
    return model


@pytest.fixture
def given(model):
    return inputs(model)


def counts(model):
    graphs = vars(model)[GRAPHS]
    return graphs.captures, graphs.replays


@torch.no_grad()
def step(model, given):
    return run(model, **given)


@torch.no_grad()
def assert_right(model, given):
    twin = copy.deepcopy(model)
    sana_ext.patch(twin)
    assert GRAPHS not in vars(twin)
    assert torch.equal(run(model, **given), run(twin, **given))


def test_steps_repeat_one_capture(model, given):
    for i in range(5):
        given["hidden_states"] = torch.randn_like(given["hidden_states"])
        given["timestep"] = given["timestep"] + i
        given["encoder_attention_mask"][1, -i:] = 0
        assert_right(model, given)
    assert counts(model) == ((1, 4) if model.with_text else (1, 5))  # with text: the first step fills the buffers


def test_outputs_are_the_callers(model, given):
    results = []
    for _ in range(4):
        given["hidden_states"] = torch.randn_like(given["hidden_states"])
        out = step(model, given)
        results.append((out, out.clone()))
    assert all(torch.equal(out, kept) for out, kept in results)
    kept = given["hidden_states"].clone()
    step(model, given)
    assert torch.equal(given["hidden_states"], kept)


def test_prompts_change(model, given):
    texts = [torch.randn_like(given["encoder_hidden_states"]) for _ in range(3)]
    for text in (*texts, *reversed(texts), texts[1], texts[1]):
        for _ in range(2):
            assert_right(model, given | {"encoder_hidden_states": text})
    assert counts(model)[0] == 1


def test_prompt_edited_in_place(model, given):
    for _ in range(4):
        for _ in range(3):
            assert_right(model, given)
        given["encoder_hidden_states"][0, 0] += 1


def test_forms_change(model, given):
    for height, width in ((5, 7), (4, 4), (5, 7), (4, 4)):
        given["hidden_states"] = torch.randn(2, 4, height, width)
        for _ in range(2):
            assert_right(model, given)
    assert counts(model)[0] == 2
    for height in range(2, 9):
        assert_right(model, given | {"hidden_states": torch.randn(2, 4, height, 3)})
    assert len(vars(model)[GRAPHS]._steps) == graphs.GRAPHS


@torch.no_grad()
def test_arguments_come_and_go(model, given):
    unmasked = {name: value for name, value in given.items() if name != "encoder_attention_mask"}
    for _ in range(3):
        (first,) = model(**given, return_dict=False)
        assert torch.equal(first, model(**given, return_dict=True).sample)
        assert not torch.equal(first, model(**unmasked).sample)
    assert counts(model)[0] == 3


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_weights_change(model, given, change):
    before = [step(model, given) for _ in range(3)][-1]
    change(model)
    after = [step(model, given) for _ in range(3)]
    assert not torch.equal(after[0], before)
    assert all(torch.equal(after[0], other) for other in after)
    assert_right(model, given)


def test_scale_of_an_adapter(model, given):
    adapter(model)
    results = []
    for scale in (1.0, 0.5, 1.0):
        model.set_adapters("default", scale)
        results += [step(model, given) for _ in range(2)]
        assert_right(model, given)
    assert torch.equal(results[0], results[4])
    assert not torch.equal(results[0], results[2])
    assert counts(model) == (0, 0)


def test_runs_without_a_graph(model, given):
    for _ in range(3):
        step(model, given)
    served = counts(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_right(model, given)
    with torch.inference_mode():
        run(model, **{k: v.clone() for k, v in given.items()})
    gradient = torch.autograd.grad(run(model, **given).sum(), model.proj_out.weight)[0]
    assert gradient.abs().max() > 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    step(compiled, given)
    vars(model)[GRAPHS]._lock.acquire()  # another thread is in a step
    assert_right(model, given)
    vars(model)[GRAPHS]._lock.release()
    assert counts(model) == served


def test_a_failed_capture_is_said_once(model, given, monkeypatch, caplog):
    def fail(fn):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "capture", fail)
    for _ in range(4):
        assert_right(model, given)
    assert [r.message for r in caplog.records if "CUDA graph" in r.message] == [
        "sana_ext: no CUDA graph, steps run without: operation not permitted when stream is capturing"
    ]


def test_copies_pickles_and_unpatch(model, given):
    for _ in range(2):
        step(model, given)
    twin = copy.deepcopy(model)
    assert counts(twin) == (0, 0)
    edit(twin)
    for _ in range(3):
        assert_right(twin, given)
    assert_right(model, given)
    assert b"sana_ext" not in pickle.dumps(model)
    sana_ext.patch(model)
    assert GRAPHS not in vars(model)
    assert type(model) is SanaTransformer2DModel


def test_report():
    report = sana_ext.patch(transformer(), cuda_graph=True, cache_text=True)
    assert report.cached == ["text of SanaTransformer2DModel", "step of SanaTransformer2DModel"]
