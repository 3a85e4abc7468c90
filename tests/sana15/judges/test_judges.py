"""Judges: each answers alike through the same interface, and a judge that fails is asked again and then given up."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import numpy as np
import pytest
import torch
from judge_models import LINE, SPEC, VISION, image_processor
from judge_models import tiny_tokenizer as tiny_tokenizer
from PIL import Image

from sana15 import judges
from sana15.judges import JudgeFailed, Patient, Verdict, mean_ranks
from sana15.judges.clip import ClipJudge
from sana15.judges.learned import COLOR, SHAPE, LearnedJudge, SceneDetector, SeenObject, find, probability
from sana15.judges.question import question
from sana15.judges.server import ServerJudge, read_answer
from sana15.scenes.render import render
from sana15.scenes.scene import sample_scene
from sana15.scenes.spec import Clause, Spec
from sana15.scenes.vocabulary import COLOR_NAMES, SHAPES
from sana15.storage.files import DataError
from sana15.training.judge import batch, sample, targets, train_judge


def picture(spec=SPEC, seed=0):
    return Image.fromarray(render(sample_scene(spec, Random(seed))))


WRONG = picture(Spec((Clause("circle", 1, "red"),)))


def test_the_exact_checker():
    judge = judges.make("scenes")
    right, wrong = judge.judge([picture(), WRONG], LINE)
    assert (right.score, right.correct, right.reason) == (1.0, True, "")
    assert (wrong.score, wrong.correct) == (0.0, False)
    assert "expected 1 star, found 0" in wrong.reason
    assert judge.judge([picture()], {"prompt": "a red circle and a blue star"})[0].correct
    with pytest.raises(ValueError, match="unknown shape"):
        judge.judge([picture()], {"prompt": "a red pentagon"})


@pytest.mark.parametrize("name", ["oracle", "clip", "vlm:", "ftp://x/v1"])
def test_unknown_judges(name):
    with pytest.raises(ValueError, match="judge"):
        judges.make(name)


# The learned judge


def test_labels_are_the_renderers():
    rng = Random(1)
    made = [sample(rng) for _ in range(40)]
    target, weight = targets([(scene, damaged) for scene, _, damaged in made])
    assert any(damaged is not None for _, _, damaged in made)
    for b, (scene, pixels, damaged) in enumerate(made):
        assert int(target[b, 0].sum()) == len(scene.objects)
        assert np.array_equal(render(scene), pixels) == (damaged is None)
        for i, o in enumerate(scene.objects):
            y, x = int(o.cy / 4), int(o.cx / 4)
            there, well, dx, dy, size, shape, color, _ = target[b, :, y, x].tolist()
            assert (there, bool(well), SHAPES[int(shape)], COLOR_NAMES[int(color)]) == (
                1,
                i != damaged,
                o.shape,
                o.color,
            )
            assert ((x + 0.5 + dx) * 4, (y + 0.5 + dy) * 4) == pytest.approx((o.cx, o.cy), abs=1e-4)
            assert 20 * math.exp(size) == pytest.approx(o.diameter, rel=1e-5)
            assert weight[b, y, x] == 1
    a, b = batch(0, 3, 4, None), batch(0, 3, 4, None)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_checker_is_not_what_it_learns_from():
    import ast
    import inspect

    from sana15.judges import learned
    from sana15.training import judge as learned_training

    for module in (learned, learned_training):
        names = [
            n.module or "" for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.ImportFrom)
        ]
        assert not [n for n in names if "checker" in n or "detect" in n]


def found(shape, color, centre, there=0.999):
    shapes, colors = (np.full(n, math.log(0.001)) for n in (len(SHAPES), len(COLOR_NAMES)))
    shapes[SHAPES.index(shape)] = colors[COLOR_NAMES.index(color)] = math.log(0.99)
    return SeenObject(centre, 18.0, there, math.log(0.99), shapes, colors)


def test_probability_follows_the_metadata():
    circle, star = found("circle", "red", (16, 30)), found("star", "blue", (46, 30))
    assert probability([circle, star], LINE) > 0.9
    assert probability([star, circle], LINE) == pytest.approx(probability([circle, star], LINE))
    for wrong in (
        [circle], [circle, star, found("ring", "pink", (30, 50))], [circle, found("star", "red", (46, 30))],
        [circle, found("heart", "blue", (46, 30))], [], [circle, found("star", "blue", (46, 30), there=0.1)],
    ):  # fmt: skip
        assert probability(wrong, LINE) < 0.2
    exchanged = [found("circle", "blue", (16, 30)), found("star", "red", (46, 30))]
    assert probability(exchanged, LINE) < 1e-3
    for relation, holds in (("right of", True), ("left of", False), ("above", False), ("below", False)):
        line = Spec((Clause("circle"), Clause("star")), relation).metadata("")  # the star is ... the circle
        assert (probability([circle, star], line) > 0.5) == holds
    three = Spec((Clause("star", 3),)).metadata("three stars")
    stars = [found("star", c, (x, 20)) for c, x in (("red", 10), ("blue", 30), ("pink", 50))]
    assert probability(stars, three) > 0.9
    assert probability(stars[:2], three) < 0.1


def test_objects_are_found_where_the_network_says():
    out = torch.full((COLOR.stop, 16, 16), -9.0)
    out[0, 5, 3], out[0, 5, 4], out[0, 12, 9] = 4.0, 3.0, 2.0  # the second is the first one's shoulder
    out[1:5] = 0
    out[2, 5, 3] = 0.25
    out[SHAPE.start + 2, 5, 3] = 9
    first, second = find(out)
    assert first.centre == ((3 + 0.75) * 4, 5.5 * 4)
    assert second.centre == (9.5 * 4, 12.5 * 4)
    assert first.shapes.argmax() == 2


def test_training_learns_and_repeats(tmp_path):
    losses = []
    arguments = {"batch_size": 16, "autoencoder": None, "width": 16, "blocks": 1}
    judge = train_judge(30, **arguments, report=lambda step, error: losses.append(error))
    assert losses[-1] < 0.5 * losses[0]
    again = train_judge(30, **arguments)
    assert judge.identity() == again.identity()
    judge.save(tmp_path)
    loaded = judges.make(f"learned:{tmp_path}")
    (a,), (b,) = judge.judge([picture()], LINE), loaded.judge([picture()], LINE)
    assert a.score == pytest.approx(b.score, rel=0.05)
    assert 0 <= a.score <= 1
    assert a.reason.startswith("sees ")
    with pytest.raises(ValueError, match="sees 64x64 pictures, got 32x64"):
        loaded.judge([Image.new("RGB", (32, 64))], LINE)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(DataError, match=r"model\.safetensors is damaged"):
        LearnedJudge.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no learned judge"):
        LearnedJudge.load(tmp_path / "none")


def test_the_networks_size():
    assert sum(p.numel() for p in SceneDetector().parameters()) < 250_000


# A server that speaks OpenAI's protocol


def logs(**tokens):
    top = [{"token": token, "logprob": log} for token, log in tokens.items()]
    return {"choices": [{"logprobs": {"content": [{"token": "x", "top_logprobs": top}]}}]}


@pytest.fixture
def server():
    """answers: what the server says next, a dict (200), a number (that status) or a pause in seconds."""
    answers, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(
                (self.path, dict(self.headers), json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            )
            answer = answers.pop(0)
            if isinstance(answer, float):
                time.sleep(answer)
                answer = 500
            body = b"busy" if isinstance(answer, int) else json.dumps(answer).encode()
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}/v1", answers, asked
    made.shutdown()


def test_a_server_is_asked_yes_or_no(server, monkeypatch):
    url, answers, asked = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    answers += [logs(Yes=-0.1, no=-3.0, yes=-4.0), logs(No=-0.2, the=-5.0)]
    judge = judges.make(f"{url}#judge-2b")
    yes, no = judge.judge([picture(), WRONG], LINE)
    assert yes.score == pytest.approx(math.log(math.exp(-0.1) + math.exp(-4.0)) + 3.0)
    assert (yes.correct, no.correct) == (True, False)
    assert no.score == pytest.approx(-5.0 + 0.2)  # yes is at most as likely as the least likely token that is listed
    path, headers, body = asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["max_tokens"], body["logprobs"], body["temperature"]) == ("judge-2b", 1, True, 0)
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["text"] == question(LINE["prompt"])
    assert "secret" not in json.dumps(judge.identity())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (logs(maybe=-0.1), "neither yes nor no but 'maybe'"),
        ({"choices": [{"message": {"content": "yes"}}]}, "no log-probabilities"),
        ({"error": "x"}, "no log-probabilities"),
        ([], "no log-probabilities"),
    ],
)
def test_nonsense_from_a_server(answer, message):
    with pytest.raises(ValueError, match=message):
        read_answer(answer)


def test_a_busy_server_is_asked_again(server):
    url, answers, asked = server
    patient = Patient(ServerJudge(url), attempts=4, backoff=0.01)
    answers += [503, logs(maybe=-1.0), logs(yes=-0.1, no=-2.0)]
    (verdict,) = patient.judge([picture()], LINE)
    assert verdict.score == pytest.approx(1.9)
    assert (len(asked), patient.retries) == (3, 2)
    answers += [503] * 4
    with pytest.raises(JudgeFailed, match=r"judge server failed 4 times: .* answered 503: busy"):
        patient.judge([picture()], LINE)


def test_a_slow_server_runs_into_the_timeout(server):
    url, answers, _ = server
    answers += [2.0, 2.0, 2.0]
    begin = time.monotonic()
    with pytest.raises(JudgeFailed, match=r"failed 2 times: no answer in 0\.1 s"):
        Patient(ServerJudge(url), attempts=2, timeout=0.1, backoff=0.01).judge([picture()], LINE)
    assert time.monotonic() - begin < 2
    with pytest.raises(JudgeFailed, match="timed out"):
        Patient(ServerJudge(url, timeout=0.1), attempts=1).judge([picture()], LINE)


class Scripted:
    name = "scripted"

    def __init__(self, *answers):
        self.answers = list(answers)

    def identity(self):
        return {"judge": self.name}

    def judge(self, pictures, line):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize(
    "bad",
    [
        RuntimeError("out of\nmemory"), [], [Verdict(1.0), Verdict(1.0)], [Verdict(math.nan)], [Verdict(math.inf)], [1.0],
        None, [Verdict(True)], [Verdict("high")],
    ],
)  # fmt: skip
def test_nonsense_is_never_a_verdict(bad):
    good = [Verdict(0.5)]
    patient = Patient(Scripted(bad, good), backoff=0)
    assert patient.judge([picture()], LINE) == good
    assert patient.retries == 1
    with pytest.raises(JudgeFailed) as error:
        Patient(Scripted(bad, bad), attempts=2, backoff=0).judge([picture()], LINE)
    assert "\n" not in str(error.value)


def test_ranks():
    scores = np.array([[0.1, 0.9, 0.5, 0.5], [100.0, 300.0, 200.0, -5.0]])
    assert mean_ranks(scores).tolist() == [0.5, 3.0, 1.75, 0.75]
    assert mean_ranks(np.exp(5 * scores[:1])).tolist() == [0, 3, 1.5, 1.5]


# Models of transformers, tiny and random


TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}"
)


def test_a_vision_language_model(tiny_tokenizer, tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text,
        image_token_index=tiny_tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    LlavaProcessor(
        image_processor(), tiny_tokenizer, patch_size=16, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)  # fmt: skip
    judge = judges.make(f"vlm:{tmp_path}")
    assert len(judge.tokens["yes"]) == 2
    a, b = judge.judge([picture(), WRONG], LINE)
    assert a.score != b.score  # it sees the picture
    assert a.correct == (a.score > 0)
    assert judge.judge([picture()], LINE)[0].score == a.score
    assert judge.judge([picture()], {"prompt": "three"})[0].score != a.score  # and reads the prompt
    judge.processor.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        type(judge)(judge.model, judge.processor, "x")
    with pytest.raises(DataError, match="is no vision-language model"):
        judges.make(f"vlm:{tmp_path / 'none'}")


def test_clip(tiny_tokenizer, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    text = {
        "vocab_size": len(tiny_tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 2,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))
    processor = CLIPProcessor(image_processor(), tiny_tokenizer)
    judge = ClipJudge(model, processor, "tiny")
    a, b = judge.judge([picture(), WRONG], LINE)
    assert a.score != b.score
    assert -100 <= a.score <= 100
    assert a.correct is None
    assert judge.judge([WRONG, picture()], LINE)[1].score == pytest.approx(a.score, abs=1e-4)
    assert judge.judge([picture()], {"prompt": "exactly " * 50})[0].score  # cut to what the model reads
    with pytest.raises(DataError, match="is no CLIP model"):
        judges.make(f"clip:{tmp_path / 'none'}")
