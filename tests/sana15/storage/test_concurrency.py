"""Two runs at once: one lock for every command that writes a folder, however the folder is spelled and however a run ends."""

import errno
import fcntl
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import tiny_pipeline
from grown_folders import files_below, run_python, source

from sana15.cli import main
from sana15.evaluation.export import export
from sana15.model.checkpoint import save_transformer
from sana15.model.release import convert
from sana15.pruning.healing import flow_steps
from sana15.scaling.ledger import Ledger
from sana15.storage import concurrency
from sana15.storage.concurrency import InUse, claimed, claimed_target
from sana15.storage.files import replacing
from sana15.training import judge as learned_training
from sana15.training.config import load_config
from sana15.training.run import train


@contextmanager
def another(claim):
    """The claim, held by another thread of this process."""
    ready, over = threading.Event(), threading.Event()

    def hold():
        with claim:
            ready.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    assert ready.wait(60)
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_pipeline.make(tmp_path_factory.mktemp("tiny"))


IN_FOLDERS = {
    "train": ["train", "out={out}", "steps=1"],
    "sample": ["sample", "a red circle", "--model", "{model}", "--out", "{out}"],
    "demo": ["demo", "--out", "{out}"],
    "importance": ["importance", "{model}", "--out", "{out}", "--count", "1"],
    "search": ["search", "--prompts", "test", "--model", "{model}", "--out", "{out}"],
    "eval": ["eval", "{out}", "--detector", "{model}"],
}
NEW = {
    "convert": ["convert", "{model}/transformer", "{out}"],
    "convert to a file": ["convert", "{model}/transformer", "{out}.safetensors"],
    "export": ["export", "geneval", "{model}", "{out}"],
    "grow": ["grow", "{model}", "{out}", "--layers", "4"],
    "prune": ["prune", "{model}", "{out}", "--indices", "0"],
}


@pytest.mark.parametrize("command", [*IN_FOLDERS, *NEW])
def test_the_second_is_refused_in_one_line_and_touches_nothing(command, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(concurrency, "PATIENCE", 0.1)
    (tmp_path / "folder").mkdir()
    out = tmp_path / "link"
    out.symlink_to("folder")
    arguments = [a.format(out=out / "run", model=model) for a in (IN_FOLDERS | NEW)[command]]
    place = tmp_path / "folder" / ("run.safetensors" if "file" in command else "run")
    with another(claimed(place) if command in IN_FOLDERS else claimed_target(place)):
        before = files_below(tmp_path)
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"sana15 {arguments[0]}: {out}/run")
        assert "is in use: process" in line
        assert files_below(tmp_path) == before
    assert files_below(tmp_path) == {}


def test_the_judges_training_is_refused_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["learned_training", "--out", str(tmp_path / "judge"), "--steps", "1"])
    with another(claimed(tmp_path / "judge")), pytest.raises(SystemExit) as stopped:
        learned_training.main()
    assert stopped.value.code == 2
    assert "judge is in use: process" in capsys.readouterr().err


def test_a_run_in_a_folder_and_a_new_folder_of_its_name_exclude_each_other(model, tmp_path, monkeypatch):
    monkeypatch.setattr(concurrency, "PATIENCE", 0.1)
    with another(claimed_target(tmp_path / "a")), pytest.raises(InUse, match="a is in use"), claimed(tmp_path / "a"):
        pass
    with another(claimed(tmp_path / "a")), pytest.raises(InUse, match="a is in use"):
        convert(model / "transformer", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_relative_and_absolute_names_are_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with another(claimed("run")), pytest.raises(InUse), claimed(tmp_path / "x" / ".." / "run"):
        pass
    with another(claimed_target("run")), pytest.raises(InUse), claimed_target(tmp_path / "run"):
        pass


def test_two_threads_train_one_run(tmp_path):
    """Each open file has a lock of its own, so threads exclude each other as processes do."""
    config = load_config(
        None, [f"out={tmp_path}", "task=autoencoder", "steps=2", "batch_size=2", "workers=0", "log_every=1"]
    )
    ends = []

    def run():
        try:
            ends.append(train(config))
        except InUse as error:
            ends.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(end, InUse) for end in ends) == 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines if "loss" in m] == [1, 2]
    assert not (tmp_path / ".lock").exists()


HOLD = """
import os, sys, time
from sana15.storage.concurrency import claimed, claimed_target
with {claim}(sys.argv[1]):
    if not os.fork():
        time.sleep(600)
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("claim", [claimed, claimed_target])
def test_a_killed_run_leaves_no_lock_although_its_worker_lives_on(claim, tmp_path):
    process = run_python(HOLD.format(claim=claim.__name__), tmp_path / "run")
    assert process.stdout.readline() == "ready\n"
    children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
    with pytest.raises(InUse, match=f"run is in use: process {process.pid} on"), claim(tmp_path / "run"):
        pass
    process.kill()
    process.wait()
    with claim(tmp_path / "run"):
        pass
    subprocess.run(["kill", "-9", *children.stdout.split()], check=True)
    process.communicate()
    assert files_below(tmp_path) == {}


@pytest.mark.parametrize("claim", [claimed, claimed_target])
def test_of_many_one_works_at_a_time_and_no_lock_stays(claim, tmp_path):
    """The folder and its lock come and go under the others' hands."""
    inside, refused, wrong = [], [], []

    def run():
        for _ in range(40):
            try:
                with claim(tmp_path / "deep" / "run"):
                    inside.append(1)
                    if len(inside) != 1:
                        wrong.append(len(inside))
                    time.sleep(0)
                    inside.pop()
            except InUse:
                refused.append(1)
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(refused) < 6 * 40
    assert files_below(tmp_path) == {}


def test_shards_share_a_folder_that_nobody_else_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr(concurrency, "PATIENCE", 0.1)
    with another(claimed(tmp_path / "run", shared=True)), claimed(tmp_path / "run", shared=True):
        with another(claimed(tmp_path / "run", shared=True)):
            pass
        with pytest.raises(InUse), claimed(tmp_path / "run"):
            pass
    with another(claimed(tmp_path / "run")), pytest.raises(InUse), claimed(tmp_path / "run", shared=True):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_said_and_works(model, tmp_path, monkeypatch, caplog):
    def unsupported(descriptor, mode):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    concurrency._say_no_locks.cache_clear()
    assert main(["grow", str(model), str(tmp_path / "new"), "--layers", "3"]) == 0
    Ledger(tmp_path / "ledger").close()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["ledger", "new"]
    (said,) = [r.message for r in caplog.records if r.name == "sana15.storage.concurrency"]
    assert "this file system has no locks (No locks available)" in said


def test_a_place_that_cannot_be_written_is_the_commands_own_error(tmp_path, capsys):
    assert main(["train", "steps=1", "out=/dev/null/x"]) == 3
    (tmp_path / "file").write_text("")
    assert main(["train", "steps=1", f"out={tmp_path / 'file'}"]) == 3
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_two_threads_replace_one_file(tmp_path):
    with replacing(tmp_path / "x") as mine:
        mine.write_text("mine")

        def other():
            with replacing(tmp_path / "x") as others:
                others.write_text("other")

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (tmp_path / "x").read_text() == "other"
    assert (tmp_path / "x").read_text() == "mine"


def test_a_failing_run_takes_away_what_it_made_and_no_more(tmp_path):
    (tmp_path / "there").mkdir()
    for place in ("there", "new/deep"):
        with pytest.raises(FileNotFoundError):
            export("geneval", tmp_path / "nothing", tmp_path / place / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_a_folder_that_a_run_works_in_is_not_replaced(tmp_path):
    model = source()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/picture").write_text("there")
    with another(claimed(tmp_path / "run")), pytest.raises(InUse, match="run is in use"):
        save_transformer(model, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["picture"]
    save_transformer(model, tmp_path / "run")
    assert not [*tmp_path.glob(".*")]
    assert not [*tmp_path.glob("run/.*")]


def test_a_run_whose_folder_was_moved_leaves_the_next_ones_lock_alone(tmp_path):
    with claimed(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").mkdir()
        next_one = another(claimed(tmp_path / "run"))
        next_one.__enter__()
    assert (tmp_path / "run/.lock").exists()
    with pytest.raises(InUse), claimed(tmp_path / "run"):
        pass
    next_one.__exit__(None, None, None)


FORKING = """
import os, signal, threading
from sana15.storage.concurrency import using

class Shared:
    pass

shared, ready, over = Shared(), threading.Event(), threading.Event()

def hold():
    with using(shared):
        ready.set()
        over.wait()

thread = threading.Thread(target=hold)
thread.start()
ready.wait()
child = os.fork()
if not child:
    signal.alarm(5)
    with using(shared):
        os._exit(0)
status = os.waitpid(child, 0)[1]
over.set()
thread.join()
raise SystemExit(status != 0)
"""


def test_a_forked_worker_does_not_wait_for_a_thread_of_its_parent():
    subprocess.run([sys.executable, "-c", FORKING], check=True, timeout=60)


LAUNCHED = [{"WORLD_SIZE": "2", "RANK": "0"}, {"RANK": "1"}, {"LOCAL_RANK": "3", "WORLD_SIZE": "1"}]


@pytest.mark.parametrize("variables", LAUNCHED, ids=str)
def test_a_launcher_of_several_processes_is_refused(variables, model, tmp_path, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    save_transformer(source(), tmp_path / "src")
    commands = [
        ["train", f"out={tmp_path / 'new' / 'run'}", "steps=1"],
        ["prune", str(model), str(tmp_path / "dst"), "--indices", "0", "--heal", "1"],
        ["prune", str(model), str(tmp_path / "dst"), "--keep", "1", "--by", "search"],
    ]
    for command in commands:
        assert main(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "runs in one process" in line
        assert "torchrun" in line
    with pytest.raises(ValueError, match="training runs in one process"):
        train(load_config(None, [f"out={tmp_path / 'new' / 'run'}", "steps=1"]))
    with pytest.raises(ValueError, match="healing runs in one process"):
        flow_steps(None, [], [], 1)
    with pytest.raises(ValueError, match="training a judge runs in one process"):
        learned_training.train_judge(1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_one_process_of_a_launcher_may_train(monkeypatch):
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    concurrency.require_one_process("training")


@pytest.mark.parametrize(
    ("arguments", "out", "steps"),
    [(["steps=1", "out={tmp}/b"], "b", 1), (["{tmp}/steps=3.yaml", "out={tmp}/b"], "b", 3), (["steps=3.yaml"], "a", 3)],
)
def test_an_override_without_a_file_is_no_file_name(arguments, out, steps, tmp_path, monkeypatch, capsys):
    (tmp_path / "steps=3.yaml").write_text(f"steps: 3\nout: {tmp_path / 'a'}")
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr("sana15.training.run.train", lambda config: given.append(config) or config.out)
    assert main(["train", *(a.format(tmp=tmp_path) for a in arguments)]) == 0
    assert (given[0].out, given[0].steps) == (str(tmp_path / out), steps)
    assert main(["train", "runs/lr=1.yaml"]) == 3  # a file that is missing
    assert main(["train", "stepps=1"]) == 2
    assert "unknown configuration key stepps" in capsys.readouterr().err
