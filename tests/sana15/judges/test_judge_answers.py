"""What servers answer, shape by shape: the right verdict, or an honest refusal, never the wrong verdict."""

import json
import math

import pytest
import torch

from sana15.judges.answers import NO_LOGS, THINKS, read_answer
from sana15.judges.base import _sensible
from sana15.judges.question import LEAST, verdict, word_of

INF, NAN = math.inf, math.nan


def item(token, log, tops=()):
    return {"token": token, "logprob": log, "top_logprobs": [{"token": t, "logprob": v} for t, v in tops]}


def chat(*content, **message):
    """An answer as it comes over the wire: json takes -Infinity and NaN as it writes them."""
    choice = {"index": 0, "logprobs": {"content": list(content)}, "finish_reason": "length"}
    return json.loads(json.dumps({"choices": [choice | ({"message": message} if message else {})]}))


def completion(**logprobs):
    return {"choices": [{"text": "Yes", "logprobs": logprobs}]}


def opposite(value):
    """The same answer with yes and no exchanged."""
    text = json.dumps(value, ensure_ascii=False)
    for a, b in (("Yes", "No"), ("yes", "no"), ("YES", "NO")):
        text = text.replace(a, "\0").replace(b, a).replace("\0", b)
    return json.loads(text)


YES = {
    "the sampled token in capitals, not in the list": chat(item("YES", -0.2, [("NO", -1.9), ("The", -4)])),
    "the sampled token's twin after a blank": chat(item("Yes", -0.3, [("No", -1.5), ("Yes", -6.0)])),
    "the list alone, as a mapping": {"choices": [{"logprobs": {"content": [{"top_logprobs": {"Yes": -0.1, "No": -3}}]}}]},
    "completions": completion(tokens=["Yes"], token_logprobs=[-0.1], top_logprobs=[{"Yes": -0.1, "No": -2.4}]),
    "completions without the sampled one": completion(tokens=[" Yes"], token_logprobs=[-0.1], top_logprobs=[{" No": -2.4}]),
    "completions without a list": completion(tokens=["Yes"], token_logprobs=[-0.1], top_logprobs=None),
    "completions inside a chat": {"choices": [{
        "message": {"content": "Yes"},
        "logprobs": {"content": None, "tokens": ["▁Yes"], "token_logprobs": [-0.1], "top_logprobs": [{"▁No": -2.5}]},
    }]},
    "by token id": chat({
        "token": "Yes", "logprob": -0.1,
        "top_logprobs": {"9": {"logprob": -0.1, "decoded_token": "Yes"}, "7": {"logprob": -3, "decoded_token": "No"}},
    }),
    "llama.cpp, probabilities": {"choices": [{}], "completion_probabilities": [
        {"content": "Yes", "probs": [{"tok_str": "Yes", "prob": 0.9}, {"tok_str": "No", "prob": 0.0}]},
    ]},
    "the smallest float": chat(item("Yes", 0.0, [("Yes", 0.0), ("No", -3.4028234663852886e38)])),
    "-9999": chat(item("Yes", -0.1, [("Yes", -0.1), ("No", -9999.0), ("A", -9999.0)])),
    "-inf": chat(item("Yes", -0.1, [("Yes", -0.1), ("No", -INF)])),
    "-inf as a string": chat(item("Yes", "-0.1", [("Yes", "-0.1"), ("No", "-Infinity")])),
    "a preamble, with an opinion behind it": chat(item("The", -0.2, [("Yes", -2), ("No", -5)])),
    "NaN at the other, which has no room to win": chat(item("Yes", -0.1, [("Yes", -0.1), ("No", NAN)])),
    "NaN at the sampled one, the list knows it": chat(item("Yes", NAN, [("Yes", -0.1), ("No", -3)])),
    "null at the sampled one, the list knows it": chat(item("Yes", None, [("ĠYes", -0.1), ("No", -3)])),
    "-9999 at the sampled one, the list knows it": chat(item("Yes", -9999.0, [("Yes", -0.1), ("No", -3)])),
    "no list, less than half": chat(item("Yes", -0.9)),
    "list null": chat({"token": "Yes", "logprob": -0.1, "top_logprobs": None}),
    "list missing": chat({"token": "Yes", "logprob": -0.1}, content="Yes"),
    "marks, quotes, Markdown": chat(item("<0x0A>", -0.9, [("**Yes", -0.9), ("\u201cyes", -1.5), ("ĊYES", -2), ("No", -1.2)])),
    "spellings add up": chat(item("No", -1.2, [("No", -1.2), ("Yes", -1.3), ("yes", -1.4), (" YES", -3), ("The", -1.5)])),
    "a blank first": chat(item("\n\n", -0.01, [("\n\n", -0.01), ("No", -5)]), item("Yes", -0.1, [("Yes", -0.1), ("No", -3)])),
    "Markdown first": chat(item("**", -0.01), item("Yes", -0.1, [("No", -3)]), item("**", -0.01), content="**Yes**"),
    "a sampled token without a text": chat(item("", -0.1, [("Yes", -0.1), ("No", -3)]), item(".", -0.1), content="Yes."),
    "every text empty": chat(item("", -0.1, [("", -0.1), ("", -9.0)]), content="Yes"),
    "a thought that is over": chat(item("<think>", 0), item("No", 0), item("</think>", 0), item("\n", 0),
        item("Yes", -0.1, [("No", -3)])),
    "its end in pieces": chat(item("<think>", 0), item("no", 0), item("</", 0), item("think", 0), item(">", 0), item("ĠYes", -0.1)),
    "a thought told apart": chat(item("No", 0), item("t", 0), item("ĠYes", -0.1, [("No", -3)]), content="Yes", reasoning_content="Not"),
    "a thought told apart, tokens of the answer alone": chat(item("Yes", -0.1, [("No", -3)]), content="Yes.", reasoning="Hm"),
    "an answer in parts": chat(item("Yes", -0.1, [("No", -3)]), content=[{"type": "text", "text": "Yes"}]),
    "content null": chat(item("Yes", -0.1, [("No", -3)]), content=None),
}  # fmt: skip


@pytest.mark.parametrize("name", YES)
def test_what_is_determined(name):
    (found,) = _sensible([read_answer(YES[name])], 1)
    assert found.correct is True
    assert found.score >= 0
    (other,) = _sensible([read_answer(opposite(YES[name]))], 1)
    assert other.correct is False
    assert other.score == pytest.approx(-found.score)


THOUGHT = {"content": "", "reasoning_content": "No"}
OPEN = {
    "no numbers at all": (chat(item("Yes", None), content="Yes"), NO_LOGS),
    "an empty list of tokens": (chat(content="Yes"), f"{NO_LOGS}, it only says 'yes'"),
    "logprobs null": ({"choices": [{"message": {"content": "Yes"}, "logprobs": None}]}, NO_LOGS),
    "an error in place of an answer": ({"error": {"message": "no such\nmodel"}}, f"{NO_LOGS}: no such model"),
    "the sampled one unknown, the list without it": (
        chat(item("Yes", None, [("No", -9.8), ("ĠYes", -12)])), "of what it answered, 'yes'",
    ),
    "the sampled one in the text alone": (
        chat({"top_logprobs": [{"token": "No", "logprob": -9.8}]}, content="Yes"), "of what it answered, 'yes'",
    ),
    "the tail of the list alone": (chat({"top_logprobs": [{"token": "No", "logprob": -9.8}]}), "neither yes nor no"),
    "next to nothing for yes and no": (chat(item("The", -0.02, [("Yes", -4), ("No", -7)])), "neither yes nor no but 'the'"),
    "NaN may be more": (chat(item("Yes", -1.2, [("Yes", -1.2), ("No", NAN)])), "leave open"),
    "text against numbers": (chat(item("Yes", -0.1, [("No", -3)]), content="No"), "answered no, but"),
    "everything impossible": (chat(item("Yes", -INF, [("Yes", -INF), ("No", -INF)])), NO_LOGS),
    "probabilities for logarithms": (chat(item("Yes", 0.97, [("Yes", 0.97), ("No", 0.03)])), NO_LOGS),
    "a thought begins": (chat(item("<think>", -1e-6, [("Yes", -17), ("No", -18)]), content="<think>"), THINKS),
    "a thought begins, by another mark": (chat(item("◁think▷", -0.9, [("Yes", -1.0), ("No", -3)])), THINKS),
    "a thought, over, and nothing after it": (chat(item("<think>", 0), item("No", 0), item("</think>", 0)), THINKS),
    "a thought that takes the token": (chat(item("No", -0.1, [("Yes", -3)]), **THOUGHT), THINKS),
    "the same, content null": (chat(item("No", -0.1, [("Yes", -3)]), content=None, reasoning="No"), THINKS),
    "a thought in parts": (chat(item("No", -0.1), content=[{"type": "thinking", "thinking": [{"text": "No"}]}]), THINKS),
    "a thought that is counted alone": (
        chat(item("No", -0.1), content="") | {"usage": {"completion_tokens_details": {"reasoning_tokens": 1}}}, THINKS,
    ),
    "a thought and an answer, tokens of neither": (chat(item("Hm", 0), content="Yes", reasoning_content="Well"), THINKS),
    "a blank alone": (chat(item("\n", -0.1, [("\n", -0.1), ("Yes", -4)])), "neither yes nor no"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN)
def test_what_is_not(name):
    answer, message = OPEN[name]
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        read_answer(answer)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "strange", [None, 3, "Yes", [], {}, {"a": []}, [[]], [["Yes"]], {"content": "Yes"}, [None], [{"token": 3}]]
)
def test_no_shape_is_a_traceback(strange):
    good = item("Yes", -0.1, [("No", -3)])
    places = [strange, {"content": [strange]}, {"tokens": strange}, {"tokens": ["Yes"], "token_logprobs": strange}]
    for answer in (strange, {"choices": strange}, *({"choices": [{"logprobs": p}]} for p in places)):
        with pytest.raises(ValueError, match=r"first token|neither"):
            read_answer(answer)
    for change in ({"top_logprobs": strange}, {"bytes": strange}):
        assert read_answer(chat(good | change)).correct
    assert read_answer(chat(good, content=strange if strange != "Yes" else "")).correct


def test_scores_keep_their_order_where_something_cannot_come():
    never, hardly = read_answer(chat(item("Yes", 0, [("No", -INF)]))), read_answer(chat(item("Yes", 0, [("No", -40)])))
    assert never.score == -LEAST > hardly.score == 40
    with pytest.raises(ValueError, match="not numbers"):
        verdict(NAN, -1.0)


def test_words():
    assert {
        word_of(t)
        for t in ("ĠYes", "▁yes", "<0x0A>YES", "**Yes", '"yes"', "Yes.", "\u2018Yes\u2019", " (yes)", "> Yes")
    } == {"yes"}
    assert not {word_of(t) for t in ("yesterday", "not", "none", "<yes>", "##yes", "y", "n", "№", "")} & {"yes", "no"}


class Words:
    """A tokenizer and a processor with a vocabulary of its own."""

    chat_template, all_special_tokens = "x", ["<no>"]

    def __init__(self, *words):
        self.words, self.tokenizer = words, self

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}

    def decode(self, ids):
        return self.words[ids[0]]

    def apply_chat_template(self, *_, **__):
        return Inputs()


class Inputs(dict):
    def to(self, _):
        return self


class Says:
    """A model whose next token has these logits."""

    device, dtype = "cpu", torch.float32

    def __init__(self, *logits):
        self.logits = torch.tensor([[logits]])

    def eval(self):
        return self

    def __call__(self, **_):
        return self


def test_a_local_model_is_read_by_the_same_rules():
    from PIL import Image

    from sana15.judges.vlm import VisionLanguageJudge

    picture, line = Image.new("RGB", (8, 8)), {"prompt": "x"}
    words = Words("No", "Ġyes", "▁YES", "**Yes", "<think>", "<no>")
    judge = VisionLanguageJudge(Says(1.0, 0.5, 0.5, 0.5, 0.0, 9.0), words, "x")
    assert judge.tokens == {"yes": [1, 2, 3], "no": [0]}
    with pytest.raises(ValueError, match="neither yes nor no but '<no>'"):
        judge.judge([picture], line)
    judge.model = Says(1.0, 0.5, 0.5, 0.5, 0.0, 0.0)
    assert judge.judge([picture], line)[0].score == pytest.approx(math.log(3) - 0.5)
    judge.model = Says(1.0, 2.0, 0.0, 0.0, 20.0, 0.0)
    with pytest.raises(ValueError, match="neither yes nor no but '<think>'"):
        judge.judge([picture], line)
    judge.model = Says(1.0, -INF, -INF, -INF, 0.0, 0.0)
    assert judge.judge([picture], line)[0].correct is False
    assert math.isfinite(judge.judge([picture], line)[0].score)
