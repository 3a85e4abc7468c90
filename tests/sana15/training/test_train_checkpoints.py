"""Training checkpoints: which folders are the run's, damaged ones, values that are not finite, what is on the disk when."""

import json
import os
import shutil

import pytest
import torch
from kill_train import OPTIONS
from safetensors.torch import load_file, save_file

from sana15.storage.files import DataError
from sana15.training import run as training
from sana15.training.checkpoints import checkpoints, resume, save
from sana15.training.config import load_config
from sana15.training.run import train

FILES = ("weights", "average", "optimizer")


class Run:
    """A linear layer, trained a little before every checkpoint."""

    def __init__(self, out):
        torch.manual_seed(0)
        self.out, self.model = out, torch.nn.Linear(8, 8)
        self.optimizer = torch.optim.AdamW(self.model.named_parameters(), lr=0.1)

    def save(self, *steps, keep=2):
        for step in steps:
            self.model(torch.ones(1, 8)).square().sum().backward()
            self.optimizer.step()
            average = {k: v.clone() for k, v in self.model.state_dict().items()}
            save(self.out, step, self.model, average, self.optimizer, keep)

    def resume(self):
        return resume(self.out, self.model, self.optimizer)[0]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def path_of(run, step, file="weights"):
    return run.out / f"checkpoint-{step:08d}" / f"{file}.safetensors"


def test_only_folders_of_eight_digits_are_the_runs(run, tmp_path_factory):
    run.save(1)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "kept"
    shutil.copytree(run.out / "checkpoint-00000001", elsewhere)
    others = [
        "checkpoint-0000001",
        "checkpoint-000000001",
        "checkpoint-1",
        "checkpoint-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661",
        "checkpoint-00000001\n",
    ]
    others += ["checkpoint--0000001", "checkpoint-00000001 copy", "old-checkpoint-00000001", "checkpoint.partial"]
    for name in others:
        shutil.copytree(elsewhere, run.out / name)
    (run.out / "checkpoint-00000000").symlink_to(elsewhere)
    (run.out / "checkpoint-99999999").write_text("mine")
    (run.out / "checkpoint-99999998").symlink_to(run.out / "nowhere")
    assert list(checkpoints(run.out)) == [1]
    run.save(2, 3, 4)
    assert list(checkpoints(run.out)) == [3, 4]
    assert run.resume() == 4
    others += ["checkpoint-00000000", "checkpoint-99999999", "checkpoint-99999998"]
    assert set(others) <= set(os.listdir(run.out))
    assert elsewhere.is_dir()
    with pytest.raises(DataError, match="checkpoint-99999999 is no folder of this run"):
        run.save(99999999)
    assert (run.out / "checkpoint-99999999").read_text() == "mine"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)


def another_step(path):
    shutil.copy(path.parent.parent / "checkpoint-00000001" / path.name, path)


def as_a_folder(path):
    path.unlink()
    path.mkdir()


def other_tensors(path):
    save_file({"other": torch.ones(3)}, path)


DAMAGES = {
    "a flipped bit": flip,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "bytes behind the end": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "no JSON": lambda path: path.write_bytes(b"\x20" + bytes(7) + b"{" * 32 + bytes(64)),
    "text": lambda path: path.write_text("version https://git-lfs\n"),
    "a folder": as_a_folder,
    "of another step": another_step,
    "other tensors": other_tensors,
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(damage, file, run, caplog):
    run.save(1, 2)
    good = load_file(path_of(run, 1))
    DAMAGES[damage](path_of(run, 2, file))
    assert run.resume() == 1
    assert all(torch.equal(v, good[k]) for k, v in run.model.state_dict().items())
    (line,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert f"{run.out}/checkpoint-00000002 is passed over" in line


def test_a_damaged_checkpoint_does_not_count_among_those_kept(run):
    """The whole one before it stays until there is another whole one."""
    run.save(1, 2, 3)
    path_of(run, 3).write_bytes(b"")
    assert run.resume() == 2
    path_of(run, 2, "average").write_bytes(b"")
    shutil.copytree(run.out / "checkpoint-00000003", run.out / "checkpoint-00000009")  # beyond the step, damaged
    run.save(4, keep=2)
    assert list(checkpoints(run.out)) == [2, 3, 4, 9]
    assert run.resume() == 4
    run.save(5, keep=2)
    assert list(checkpoints(run.out)) == [4, 5, 9]


def test_no_whole_checkpoint_is_one_line_and_changes_nothing(run):
    run.save(1, 2)
    for step in (1, 2):
        path_of(run, step, "optimizer").unlink()
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    with pytest.raises(DataError, match=r"no whole checkpoint \(2 tried\); the newest: .*00000002/optimizer"):
        run.resume()
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    assert list(checkpoints(run.out)) == [1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", FILES)
def test_what_is_not_finite_is_not_saved(where, bad, run):
    run.save(1, 2, 3)
    average = {k: v.clone() for k, v in run.model.state_dict().items()}
    target = {"weights": run.model.bias.data, "average": average["bias"]}
    target["optimizer"] = run.optimizer.state[run.model.bias]["exp_avg"]
    target[where][3] = bad
    name = "1.exp_avg" if where == "optimizer" else "bias"
    with pytest.raises(DataError, match=f"step 4, {where}: {name} is not finite"):
        save(run.out, 4, run.model, average, run.optimizer, 1)
    assert sorted(os.listdir(run.out)) == ["checkpoint-00000002", "checkpoint-00000003"]


def test_a_checkpoint_of_an_older_version_is_taken_unless_it_is_not_finite(run):
    run.save(1, 2)
    for step in (1, 2):
        for file in FILES:  # without step and digest
            save_file(load_file(path_of(run, step, file)), path_of(run, step, file))
    assert run.resume() == 2
    weights = load_file(path_of(run, 2))
    weights["bias"][0] = torch.inf
    save_file(weights, path_of(run, 2))
    assert run.resume() == 1


def test_everything_is_on_the_disk_before_a_checkpoint_gets_its_name(run, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(a, b):
        events.append(f"-> {os.path.basename(b)}")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    run.save(7)
    name = events.index("-> checkpoint-00000007")
    assert {"checkpoint-00000007", *(f"{file}.safetensors" for file in FILES)} <= set(events[:name])
    assert events[name + 1] == run.out.name


# The command itself.


def options(out, *others):
    return load_config(None, [*OPTIONS, f"out={out}", *others])


def test_a_corrected_command_is_accepted(tmp_path):
    out = tmp_path / "run"
    common = ["task=transformer", "transformer.size=mini", f"out={out}", "steps=1", "device=cpu"]
    with pytest.raises(FileNotFoundError):
        train(load_config(None, [*common, f"transformer.autoencoder={tmp_path / 'typo'}"]))
    assert not (out / "config.yaml").exists()
    train(options(out, "steps=2"))
    with pytest.raises(ValueError, match="run with another lr"):
        train(options(out, "lr=0.5"))


def test_a_configuration_that_failed_at_its_first_step_does_not_bind(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("sana15.training.text_task.TextTask.loss", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(options(tmp_path, "batch_size=64"))
    assert (tmp_path / "config.yaml").exists()
    train(options(tmp_path))


def test_weights_that_are_not_finite_stop_the_command(tmp_path, monkeypatch, capsys):
    from sana15.cli import main

    update, steps = torch.optim.AdamW.step, []

    def poisoned(optimizer, *arguments):
        update(optimizer, *arguments)
        steps.append(0)
        if len(steps) == 3:
            optimizer.param_groups[0]["params"][0].data[0] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    path = tmp_path / "c.yaml"
    path.write_text("\n".join(o.replace("=", ": ", 1) for o in OPTIONS if "." not in o))
    sizes = [o for o in OPTIONS if "." in o]
    assert main(["train", str(path), *sizes, f"out={tmp_path / 'run'}", "save_every=1", "log_every=100"]) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sana15 train: step 3, weights: text.positions is not finite")
    assert list(checkpoints(tmp_path / "run")) == [2]  # keep=1
    assert not (tmp_path / "run" / "export").exists()


def test_a_sample_that_was_missed_is_made(tmp_path):
    train(options(tmp_path))
    log = tmp_path / "metrics.jsonl"
    whole = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line) + "\n" for line in whole[:-1]))  # killed between checkpoint and sample
    assert "accuracy_shape" in whole[-1]
    train(options(tmp_path))
    assert [json.loads(line) for line in log.read_text().splitlines()] == whole
    train(options(tmp_path))  # and once only
    assert len(log.read_text().splitlines()) == len(whole)


def test_files_of_others_stay_in_the_exported_folder(tmp_path):
    export = train(options(tmp_path))
    (export / "README.md").write_text("mine")
    (export / "notes").mkdir()
    first = (export / "model.safetensors").read_bytes()
    train(options(tmp_path, "steps=6"))
    assert (export / "README.md").read_text() == "mine"
    assert (export / "notes").is_dir()
    assert (export / "model.safetensors").read_bytes() != first


def test_the_configuration_is_never_half_written(tmp_path, monkeypatch):
    train(options(tmp_path))
    before = {name: (tmp_path / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")}
    monkeypatch.setattr(training, "write_durably", lambda data, path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        train(options(tmp_path, "steps=6"))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_configuration_that_an_older_version_left_half_written_does_not_stop_the_same_command(tmp_path):
    train(options(tmp_path))
    path = tmp_path / "config.yaml"
    whole = path.read_text()
    for size in (0, len(whole) // 2):
        path.write_text(whole[:size])
        train(options(tmp_path))
        assert path.read_text() == whole
    path.write_text(whole.replace("seed: 0", "seed: 1"))
    with pytest.raises(ValueError, match="run with another seed"):
        train(options(tmp_path))


@pytest.mark.parametrize("what", ["a link", "a file"])
def test_what_has_a_checkpoints_name_stops_the_run_before_its_work(what, tmp_path, monkeypatch):
    """As a checkpoint that was moved to another disk and left a link."""
    train(load_config(None, [*OPTIONS, f"out={tmp_path}", "steps=2"]))
    before, at = (tmp_path / "metrics.jsonl").read_bytes(), tmp_path / "checkpoint-00000002"
    if what == "a link":
        at.symlink_to(shutil.move(at, tmp_path / "moved"))
    else:
        at = tmp_path / "checkpoint-00000004"
        at.write_text("mine")
    monkeypatch.setattr("sana15.training.text_task.TextTask.loss", None)
    with pytest.raises(DataError, match=f"{at.name} is no folder of this run"):
        train(load_config(None, [*OPTIONS, f"out={tmp_path}"]))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_configuration_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes("steps: 1".encode("utf-16"))
    with pytest.raises(ValueError, match=r"config\.yaml is not valid YAML"):
        load_config(path, [])


def test_a_file_called_export_stays(tmp_path):
    (tmp_path / "export").write_text("mine")
    with pytest.raises(NotADirectoryError, match="export is a file"):
        train(options(tmp_path))
    assert (tmp_path / "export").read_text() == "mine"


def test_tensorboard_still_shows_the_step_that_was_resumed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(options(tmp_path, "steps=2"))
    train(options(tmp_path))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4]
