"""No secret in a file, a log or a message: what is hidden, what stays, and every way out of the program."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from urllib.parse import quote

import pytest
from PIL import Image
from search_fakes import Grey, Meter

import sana15
from sana15.cli import main
from sana15.judges import Patient, make
from sana15.judges.base import JudgeFailed
from sana15.judges.server import ServerJudge
from sana15.storage import redaction
from sana15.storage.redaction import HIDDEN, clean_key, redacted, redacted_values, said

KEY = "zebra/horse+77 plum=".replace(" ", "")
PICTURE = Image.new("RGB", (8, 8))
YES = {"choices": [{"logprobs": {"content": [{"token": "Yes", "logprob": -0.1, "top_logprobs": []}]}}]}


@pytest.fixture
def server():
    """A judge behind HTTP. replies: (status, body, headers); a callable body is given the request's headers and path."""
    replies, asked = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, dict(self.headers)))
            status, body, headers = replies.pop(0) if replies else (200, json.dumps(YES), {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write((body(self) if callable(body) else body).encode())

        do_GET = do_POST

        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{made.server_port}/v1", replies, asked
    made.shutdown()


def ask(judge):
    return Patient(judge, attempts=1).judge([PICTURE], {"prompt": "x"})


@pytest.mark.parametrize("form", [
    str, quote, lambda k: quote(k, safe=""), lambda k: base64.b64encode(k.encode()).decode(), lambda k: repr(k.encode()),
    json.dumps, lambda k: f"Bearer {k}",
])  # fmt: skip
def test_a_known_key_in_any_form(monkeypatch, form):
    monkeypatch.setenv("SOME_API_KEY", KEY + "\r\n")
    text = redacted(f"refused: {form(KEY)} (was {form(KEY)})")
    assert form(KEY).strip("'\"b=") not in text
    assert text.startswith("refused: ")
    assert text.count(HIDDEN) == 2


@pytest.mark.parametrize(("text", "secret"), [
    ("Invalid header value b'Bearer abc-def-123\\r'", "abc-def"), ("http://user:pw@host/v1", "pw"),
    ("http://user:p/w#x?y@host/v1", "p/w"), ("nonnumeric port: 'user:pw@host'", "pw"), ("https://token@host", "token"),
    ("GET /v1?api_key=abc&n=1 and https://h/?sig=abc", "abc"), ("Authorization: Basic dXNlcjpwdw==", "dXNl"),
    ("{'Authorization': 'Bearer abc', 'n': 1}", "abc"), ('{"api_key": "abc", "n": 1}', "abc"), ("X-Api-Key: abcd", "abcd"),
    ("Incorrect API key provided: sk-ab***yz. See https://h", "yz"), ("invalid token hf_abcdefghijKLMN", "hf_a"),
    ("https://h/v1?whatever=A1b2C3d4E5f6G7h8I9j0K", "A1b2"), ("bearer abc-def-1 is wrong", "abc-def"),
    ("bad key sk-proj-Abcdefgh12345678", "Abcd"), ("not sk-ab****yz", "yz"), ("Token 9944b09199c62bcf9418ad846dd0e4bb", "9944"),
])  # fmt: skip
def test_what_looks_like_a_secret(text, secret):
    assert secret not in redacted(text)
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize("text", [
    "tokenizer.json is missing", "the first token is no number", "http://host:8000/v1#model", "learned:DIR", "a red circle",
    "https://h/v1/@cf/model?api-version=2024-10-21", "hf_hub_download failed", "KeyError: 'key'", "Basic usage", os.getcwd(),
    "a ring bearer holding flowers", "the bearer of bad news", "/data/sk-learn-models/x.json is missing", "sk-image-1.2.3",
    "https://h/v1?model=Qwen2.5-VL-7B-Instruct-AWQ", "https://h/m?revision=0123456789abcdef0123456789abcdef01234567",
    "the secretary: a woman", "no token /root/.cache/huggingface/token is there", "unknown token transformer.flow_shift=2",
    "3f786850e387550fdab836ed7e6dc881de23001bd0b3f6a8ee0f0a5f6b8b2c2e differs",
    "http://[::1]:8000/v1 answered 503: busy", "max_tokens=1", "bearer token is missing", "--judge http://HOST/v1#MODEL",
])  # fmt: skip
def test_what_stays(text):
    assert redacted(text) == text


@pytest.mark.parametrize("key", ["/base64+with/slash7=", "~tilde-77", ".hidden-77"])
def test_a_key_that_begins_like_a_path(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert redacted(f"refused {key}, really") == f"refused {HIDDEN}, really"


@pytest.mark.parametrize("value", ["EMPTY", "dummy", "test", os.path.dirname(__file__)])
def test_a_variable_that_holds_no_secret(monkeypatch, value):
    """Words for servers that want no key, and the path of a key's file."""
    monkeypatch.setenv("OPENAI_API_KEY", value)
    assert redacted(f"{value} is a word") == f"{value} is a word"
    assert redacted_values({"set": value}) == {"set": value}


def test_numbers_and_marks_of_a_model_are_no_secrets():
    told = {"token_length": 77, "key_points": 17, "session": 3, "bos_token": "<s>", "eos_token": "</s>"}
    assert redacted_values(told) == told
    assert redacted_values({"password": 1234, "api_key": "a"}) == {"password": HIDDEN, "api_key": HIDDEN}


def test_values_for_a_file(monkeypatch):
    monkeypatch.setenv("SHORT_TOKEN", "clip")  # does not change what a judge is called
    values = {
        "judge": "clip",
        "headers": [{"Authorization": "Bearer x"}],
        "api_key": "abc",
        "n": 1,
        "key": None,
        "max_tokens": 1,
    }
    hidden = {
        "judge": "clip",
        "headers": [{"Authorization": HIDDEN}],
        "api_key": HIDDEN,
        "n": 1,
        "key": None,
        "max_tokens": 1,
    }
    assert redacted_values(values) == hidden
    assert said(KeyError()) == "KeyError"


@pytest.mark.parametrize("around", ["\r", "\r\n", "\n", " ", "\t ", "\ufeff", "\xa0"])
def test_what_stands_around_a_key_does_not_count(server, monkeypatch, around):
    url, _, asked = server
    monkeypatch.setenv("OPENAI_API_KEY", around + KEY + around)
    assert ask(make(f"http://{url}"))[0].correct
    assert asked[0][1]["Authorization"] == f"Bearer {KEY}"


def test_blanks_are_no_key(server, monkeypatch):
    url, _, asked = server
    monkeypatch.setenv("OPENAI_API_KEY", " \n")
    ask(make(f"http://{url}"))
    assert "Authorization" not in asked[0][1]
    assert clean_key("\0abc\0", "KEY") == "abc"


@pytest.mark.parametrize("inside", ["\r\n", "\n", " ", "\x07", "\xe9", "\u200b"])
def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch, capsys, inside, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", f"first-half{inside}other-half")
    (tmp_path / "p.txt").write_text("a ring\n")
    command = [
        "search",
        "--prompts",
        str(tmp_path / "p.txt"),
        "--out",
        str(tmp_path / "run"),
        "--judge",
        "http://127.0.0.1:9/v1",
    ]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "OPENAI_API_KEY holds a blank, a control character" in told
    assert told.count("\n") == 1
    assert "half" not in told


def test_a_password_in_the_url_is_sent_and_never_told(server, monkeypatch):
    url, replies, asked = server
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    judge = make(f"http://us%40er:p#1/%2Fq@{url}/?api_key=qqqq&api-version=3#vlm")
    assert ask(judge)[0].correct
    path, headers = asked[0]
    assert path == "/v1/chat/completions?api_key=qqqq&api-version=3"
    assert base64.b64decode(headers["Authorization"].split()[1]).decode() == "us@er:p#1//q"
    assert judge.identity() == {
        "judge": "server",
        "url": f"http://{HIDDEN}@{url}/?api_key={HIDDEN}&api-version=3",
        "model": "vlm",
    }
    echo = (401, lambda request: f"{request.headers['Authorization']} {request.path} us@er:p#1//q p#1//q", {})
    replies += [echo]
    with pytest.raises(JudgeFailed, match="answered 401") as error:
        ask(judge)
    assert not [s for s in ("qqqq", "p#1", headers["Authorization"][6:-2]) if s in str(error.value)]


@pytest.mark.parametrize("body", [
    lambda request: "Incorrect API key provided: " + request.headers["Authorization"][7:], lambda request: "x" * 290 + KEY,
    lambda request: json.dumps({"error": {"message": f"no {KEY}"}}),
])  # fmt: skip
@pytest.mark.parametrize("status", [401, 200])
def test_a_server_that_repeats_the_key(server, monkeypatch, body, status):
    url, replies, _ = server
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    replies += [(status, body, {})]
    with pytest.raises((ValueError, OSError)) as error:
        ServerJudge(f"http://{url}").judge([PICTURE], {"prompt": "x"})
    assert "zebra" not in str(error.value)


@pytest.mark.parametrize("answer", [
    {"message": {"content": "UPPER-" + KEY}}, {"logprobs": {"content": [{"token": "UPPER-" + KEY, "logprob": -0.1}]}},
])  # fmt: skip
def test_a_model_that_repeats_the_key(server, monkeypatch, answer):
    """Its answer is shown in small letters."""
    url, replies, _ = server
    monkeypatch.setenv("OPENAI_API_KEY", "UPPER-" + KEY)
    replies += [(200, json.dumps({"choices": [answer]}), {})]
    with pytest.raises(ValueError, match=r"says|but") as error:
        ServerJudge(f"http://{url}").judge([PICTURE], {"prompt": "x"})
    assert "zebra" not in str(error.value)
    assert "upper" not in str(error.value)


def test_the_key_follows_no_redirect(server, monkeypatch):
    url, replies, asked = server
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    replies += [(302, "elsewhere", {"Location": f"http://{url}/steal"})]
    with pytest.raises(JudgeFailed, match="answered 302"):
        ask(make(f"http://{url}"))
    assert len(asked) == 1


@pytest.mark.parametrize("name", [
    "ftp://u:hidden-1@h/v1#m", "u:hidden-1@h/v1#m", "http://u:hidden-1@h:x/v1#m", "http://u:hidden 1@h/v1 x#m", "http://u:hidden-1@/v1",
    "vlm:http://u:hidden-1@127.0.0.1:9/x",
])  # fmt: skip
def test_a_mistaken_judge_is_named_without_its_password(name, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a ring\n")
    code = main(["search", "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "run"), "--judge", name])
    assert code in (2, 3)
    with pytest.raises(SystemExit):
        main(["search", "--prompts", "p", "--out", "o", "--judges-are", name])
    assert "hidden" not in capsys.readouterr().err


class Leaky(Meter):
    """A judge whose library says too much, and whose identity does."""

    def identity(self):
        return {
            "judge": "leaky",
            "url": "https://me:open-sesame@h/v1",
            "headers": {"Authorization": "Bearer open-sesame"},
        }

    def judge(self, pictures, line):
        if line["prompt"] == "two":
            raise RuntimeError("GET https://me:open-sesame@h/v1?key=open-sesame with Bearer open-sesame failed")
        return super().judge(pictures, line)


def test_a_run_holds_no_secret_and_goes_on(tmp_path, capsys):
    def go():
        found = sana15.search(Grey(), ["one", "two"], out=tmp_path / "run", n=2, pick=1, judge=Leaky(), attempts=1)
        return found.unjudged

    before = go()
    assert before
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert not [p for p in files if b"sesame" in p.read_bytes()]
    assert "sesame" not in str(before)
    assert go() == before
    run = tmp_path / "run/run.json"  # of a version that still wrote it
    run.write_text(
        run.read_text().replace(f"//{HIDDEN}@", "//me:open-sesame@").replace(f'"{HIDDEN}"', '"Bearer open-sesame"')
    )
    assert "sesame" in run.read_text()
    assert go() == before
    assert "sesame" not in run.read_text()


def test_a_run_goes_on_with_another_password(server, tmp_path):
    url, _, asked = server
    for password in ("open-sesame", "new-sesame"):
        judge = f"http://me:{password}@{url}#m"
        sana15.search(Grey(), ["one"], out=tmp_path / "run", n=2, pick=1, judge=judge)
    assert len(asked) == 2
    with pytest.raises(ValueError, match="its judges differs"):
        sana15.search(Grey(), ["one"], out=tmp_path / "run", n=2, pick=1, judge=f"http://me:x@{url}#other")
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file() and b"sesame" in p.read_bytes()]


def test_nothing_that_is_redacted_takes_long(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "caf\udce9-sesame")
    begin = time.monotonic()
    for pattern in ("a.", "!", "eyJaaaaaaaa-", "?;", "api-key", "http://a@", ":", "Bearer ", "'\"", "?a=", "sk-"):
        redacted(pattern * (20_000 // len(pattern)))
    assert time.monotonic() - begin < 10
    assert "sesame" not in redacted("caf\udce9-sesame caf%E9-sesame")


def test_a_proxys_password(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://me:open%20sesame@127.0.0.1:9")
    assert "sesame" not in redacted("cannot connect to me:open%20sesame@127.0.0.1: 'open sesame' is wrong")


def test_tracebacks_hold_no_secret():
    code = (
        "import runpy, sys, threading; runpy.run_path(sys.argv[1])['guard_tracebacks']()\n"
        "def fail(): raise RuntimeError('Bearer open-sesame-5, http://u:open-sesame-5@h')\n"
        "t = threading.Thread(target=fail); t.start(); t.join(); fail()"
    )
    done = subprocess.run([sys.executable, "-c", code, redaction.__file__], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError: Bearer ***, http://***@h") == 2
    assert "sesame-5@" not in done.stderr
