"""Every public object that threads may share, from four of them: the results are those of one thread, bit for bit."""

import copy
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SanaPAGPipeline, SanaPipeline
from generator_cases import parts as parts  # the fixture
from generator_cases import pixels
from judge_models import VISION, image_processor
from judge_models import tiny_tokenizer as tiny_tokenizer  # the fixture
from kill_train import OPTIONS
from PIL import Image
from safetensors.torch import load_file
from search_fakes import Grey, Meter
from tiny_pipeline import make, make_published

import sana_ext
from sana15.evaluation.detector import ClipColors, _transformers_clip
from sana15.judges import make as judge_of
from sana15.judges.clip import ClipJudge
from sana15.model.depth import chosen_blocks
from sana15.model.text import GemmaTextEncoder
from sana15.pruning.importance import block_importance
from sana15.pruning.trajectory import calibration
from sana15.sampling.diffusers_pipeline import DiffusersGenerator
from sana15.sampling.pipeline import Pipeline
from sana15.sampling.settings import Seed
from sana15.scaling import run as searching
from sana15.scaling.run import search
from sana15.scenes import testset
from sana15.scenes.prompts import parse
from sana15.training.config import load_config
from sana15.training.distillation import Distillation
from sana15.training.judge import train_judge
from sana15.training.run import train
from sana15.training.text_task import TextTask

THREADS = 4
PROMPTS = ["a red circle", "two stars", "a blue ring above a heart", "three green squares"]
pytestmark = pytest.mark.usefixtures("one_thread", "often")


@pytest.fixture
def often():
    """Threads change as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check(jobs, rounds=3):
    """Each job's result, when four threads do them all again and again, is what it is alone."""
    expected = [job() for job in jobs]
    start = threading.Barrier(THREADS)

    def work(first):
        start.wait(60)
        order = [(first + i) % len(jobs) for i in range(len(jobs) * rounds)]
        return [(k, jobs[k]()) for k in order]

    with ThreadPoolExecutor(THREADS) as pool:
        found = [pair for pairs in pool.map(work, range(THREADS)) for pair in pairs]
    wrong = [k for k, result in found if not same(result, expected[k])]
    assert not wrong, f"{len(wrong)} of {len(found)} differ"


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return Pipeline.from_pretrained(make(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return make_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def gemma(published):
    return GemmaTextEncoder.load(published, torch.float32)


class Ids:
    """In place of Gemma: features are the token numbers, so that the tokenizer is what takes the time."""

    def __init__(self, model):
        self.config, self.device = model.config, model.device

    def eval(self):
        return self

    def __call__(self, ids, attention_mask):
        return SimpleNamespace(last_hidden_state=ids[..., None] * attention_mask[..., None])


def test_gemma(gemma, monkeypatch):
    """Positive and negative prompts are padded to two lengths, and the instruction to none: state of the tokenizer."""
    kind = type(gemma.tokenizer)
    set_state = kind.set_truncation_and_padding

    def slowly(*args, **kwargs):
        set_state(*args, **kwargs)
        time.sleep(1e-3)

    monkeypatch.setattr(kind, "set_truncation_and_padding", slowly)
    ids = Ids(gemma.model)
    one, other = (GemmaTextEncoder(ids, gemma.tokenizer, text) for text in (None, "Paint: "))  # the same tokenizer
    jobs = [
        partial(e.encode, [p], negative=n) for e in (one, other) for p in ("cat", "cat " * 400) for n in (False, True)
    ]
    check(jobs, rounds=1)


def test_a_tokenizer_is_used_on_the_side_that_is_asked_for_and_stays_as_it_is(gemma):
    expected = gemma.encode(PROMPTS)
    gemma.tokenizer.padding_side = "left"
    try:
        again = GemmaTextEncoder(gemma.model, gemma.tokenizer)
        assert same(again.encode(PROMPTS), expected)
        assert gemma.tokenizer.padding_side == "left"
    finally:
        gemma.tokenizer.padding_side = "right"


def test_pipelines_and_their_parts(mini, published):
    large = Pipeline.from_pretrained(published, dtype=torch.float32)

    def pictures(pipe, k):
        told = []
        made = pipe(
            PROMPTS[k], n=1 + k % 2, seed=k, steps=2 + k, guidance=1.0 + k, guidance_interval=(0.1 * k, 1.0),
            negative_prompt=PROMPTS[k - 1], callback=lambda *step: told.append(step),
        )  # fmt: skip
        return pixels(made[0]), told

    check([partial(pictures, mini, k) for k in range(4)] + [partial(pictures, large, k) for k in range(2)], rounds=1)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = mini.autoencoder.encode(x)

    @torch.no_grad()
    def part(k):
        y = mini.autoencoder.decode(latents * (1 + k)), mini.autoencoder.encode(x * (0.5 + 0.1 * k))
        return *y, *mini.text.encode(PROMPTS[k:])

    check([partial(part, k) for k in range(4)])


def test_importance_and_distillation_do_not_hear_others(mini):
    batches = [list(calibration(mini, [p], steps=2, seed=k)) for k, p in enumerate(PROMPTS)]
    students = [chosen_blocks(mini.transformer, [k % 2]) for k in range(2)]

    def loss(k):
        b = batches[k][0]
        student = copy.deepcopy(students[k % 2])
        distillation = Distillation(student, mini.transformer, [k % 2])
        with torch.no_grad():
            student(b.latents, b.text, b.timestep, b.mask)
            return distillation.loss()

    def measured(k):
        found = block_importance(mini.transformer, batches[k], bins=2)
        return found.cosine, found.loss_change, found.loss

    jobs = [partial(measured, k) for k in range(3)] + [partial(loss, k) for k in range(2)]
    check([*jobs, lambda: pixels(mini(PROMPTS[0], steps=3)[0])], rounds=2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in mini.transformer.modules())


class Answers(BaseHTTPRequestHandler):
    """Says yes the surer the longer the request."""

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.rfile.read(length)
        tokens = [{"token": "yes", "logprob": -1e3 / length}, {"token": "no", "logprob": -1.0}]
        content = [tokens[0] | {"top_logprobs": tokens}]
        body = json.dumps({"choices": [{"message": {"content": "yes"}, "logprobs": {"content": content}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_judges(tiny_tokenizer, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    lines = [parse(p).metadata(p) | {"prompt": p} for p in PROMPTS]
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(4)]
    text = {
        "vocab_size": len(tiny_tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 2,
    }  # fmt: skip
    clip_model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)).eval()
    clip = ClipJudge(clip_model, CLIPProcessor(image_processor(), tiny_tokenizer), "tiny")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1#m"
        judges = [judge_of("scenes"), judge_of("learned"), judge_of(url), clip]
        check([partial(j.judge, pictures[k:], lines[k]) for j in judges for k in range(3)], rounds=2)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    clip_model.save_pretrained(tmp_path)
    clip.processor.save_pretrained(tmp_path)
    colors: ClipColors = _transformers_clip(str(tmp_path), "cpu")
    with torch.no_grad():
        check([partial(no_grad, colors.embed_texts, PROMPTS[k:]) for k in range(3)])


def no_grad(function, *arguments):
    with torch.no_grad():
        return function(*arguments)


@pytest.mark.parametrize("kind", [SanaPipeline, SanaPAGPipeline])
def test_generators_of_one_diffusers_pipeline(parts, kind):
    tokenizer, text, vae, transformer = parts
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, algorithm_type="dpmsolver++"
    )
    options = {"pag_applied_layers": ["transformer_blocks.1"]} if kind is SanaPAGPipeline else {}
    pipe = kind(tokenizer, text, vae, transformer, scheduler, **options)

    def pictures(k):
        generator = DiffusersGenerator(
            pipe, evaluations=3, num_inference_steps=2 + k % 2, guidance_scale=3.0 + k, height=64, width=64,
            use_resolution_binning=False, negative_prompt="dull" * k, complex_human_instruction=None if k % 2 else ["Paint:"],
        )  # fmt: skip
        state = generator.advance(generator.start([PROMPTS[k], PROMPTS[k - 1]], [Seed(k, 0, 0), Seed(k, 1, 0)]), 1)
        previews = pixels(generator.preview(state))
        return previews, pixels(generator.finish(state))

    check([partial(pictures, k) for k in range(4)], rounds=1)
    assert not any(m._forward_pre_hooks for m in transformer.modules())


def test_searches_in_folders_of_their_own(mini, tmp_path):
    made = [0]

    def run(k):
        made[0] += 1
        out = tmp_path / f"{k}-{made[0]}-{threading.get_ident()}"
        policy = ("best_of_n", "halving", "tournament", "bandit")[k]
        result = search(
            mini, [PROMPTS[k], PROMPTS[k - 1]], out=out, n=3, pick=1, judge=["learned"], policy=policy, steps=4, seed=k
        )
        return [f.picked for f in result.found], result.scores, [pixels(row) for row in result.images]

    check([partial(run, k) for k in range(4)], rounds=1)


def test_searches_that_need_other_thread_counts_do_not_mix(tmp_path):
    """The number of threads is the process's; a run in a folder goes on with the one that it was begun with."""
    seen = []

    class Watching(Meter):
        def __init__(self, count):
            super().__init__()
            self.count = count

        def judge(self, pictures, line):
            seen.append((self.count, torch.get_num_threads()))
            return super().judge(pictures, line)

    def run(k, n):
        return search(Grey(), ["one"], out=tmp_path / str(k), n=n, pick=1, judge=Watching(1 + k % 3))

    before = torch.get_num_threads()
    for k in range(4):
        torch.set_num_threads(1 + k % 3)
        run(k, 4)
    torch.set_num_threads(before)
    for k in range(4):
        (tmp_path / str(k) / "ledger-000-of-001.jsonl").unlink()
    seen.clear()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4), [4] * 4))
    assert len(seen) == 16
    assert all(wanted == found for wanted, found in seen)
    assert torch.get_num_threads() == before
    assert not searching._thread_count._alone


def test_trainings_begin_with_their_own_weights(tmp_path, monkeypatch):
    """They are drawn from torch's one generator."""

    def judge(seed):
        return [*train_judge(1, batch_size=2, seed=seed, autoencoder=None, width=8, blocks=1).network.parameters()]

    check([partial(judge, seed) for seed in range(3)], rounds=2)

    class Begun(Exception):
        pass

    def stop(config, groups):
        raise Begun([p.detach().clone() for group in groups for p in group["params"]])

    monkeypatch.setattr("sana15.training.run.make_optimizer", stop)

    def weights(seed):
        out = tmp_path / f"{seed}-{threading.get_ident()}"
        with pytest.raises(Begun) as begun:
            train(load_config(None, ["task=autoencoder", f"seed={seed}", f"out={out}"]))
        return begun.value.args[0]

    check([partial(weights, seed) for seed in range(3)], rounds=1)


@pytest.mark.parametrize("sample_every", [1, 1000])
def test_a_training_under_way_leaves_the_first_weights_of_another_alone(sample_every, tmp_path, monkeypatch):
    begun, enough, init, loss = threading.Event(), threading.Event(), TextTask.__init__, TextTask.loss

    class Enough(Exception):
        pass

    def slow(task, config, device):
        torch.rand(1)
        time.sleep(0.2)
        init(task, config, device)

    def endless(task, batch, generator):
        begun.set()
        if enough.is_set() and threading.current_thread() is other:
            raise Enough
        return loss(task, batch, generator)

    def weights(name, *options):
        with suppress(Enough):
            train(load_config(None, [*OPTIONS, f"out={tmp_path / name}", *options]))
            return load_file(tmp_path / name / "checkpoint-00000001" / "weights.safetensors")

    monkeypatch.setattr(TextTask, "__init__", slow)
    alone = weights("alone", "steps=1", "seed=3")
    monkeypatch.setattr(TextTask, "loss", endless)
    long = ["steps=100000", "save_every=100000", f"sample_every={sample_every}"]
    other = threading.Thread(target=weights, args=("other", *long))
    other.start()
    try:
        assert begun.wait(60)
        found = weights("beside it", "steps=1", "seed=3")
    finally:
        enough.set()
        other.join()
    assert all(torch.equal(alone[name], found[name]) for name in alone)


@pytest.mark.usefixtures("fused_parts")
def test_a_patched_transformer_with_cached_texts(parts):
    """More threads than texts that are kept."""
    transformer = copy.deepcopy(parts[3]).eval()
    sana_ext.patch(transformer, cache_text=True)
    x = torch.randn(2, 16, 2, 2)
    texts = [torch.randn(2, 5, 16) for _ in range(4)]

    def steps(k):
        with torch.no_grad():
            return [transformer(x * s, texts[k], torch.full((2,), 100.0 * s), return_dict=False)[0] for s in (1, 2, 3)]

    check([partial(steps, k) for k in range(4)], rounds=5)


def test_ops_modules_and_tables():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 64, 2, 32) for _ in range(3))
    attention, mixer = sana_ext.nn.LinearAttention(64), sana_ext.nn.GLUMBConv(64, 64)

    def op(j):
        leaf = (q * (1 + j)).requires_grad_()
        out = sana_ext.linear_attention(leaf, k, v)
        out.sum().backward()
        tokens = leaf.detach().flatten(2)
        normed = sana_ext.norm_modulate(tokens, tokens[:, 0], tokens[:, 1])
        return out.detach(), leaf.grad, normed, attention(tokens).detach(), mixer(tokens, 8, 8).detach()

    check([partial(op, j) for j in range(4)], rounds=5)
    info = partial(sana_ext.kernel_info, "linear_attention", D=32)
    check([lambda: str(sana_ext.kernel_info()), lambda: len(testset.load()), info])
