"""Folders that appear whole: staging beside the target, killed and concurrent runs, read-only folders, names that are taken."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from grown_folders import files_below, run_python, source

from sana15.cli import main
from sana15.growth.folder import grow_folder
from sana15.model.checkpoint import load_transformer, save_transformer
from sana15.storage import files
from sana15.storage.files import DataError, read_json, read_text_lines, staging
from sana15.storage.png import parameters

HOLD = """
import sys, time
from pathlib import Path
from sana15.storage.files import staging
with staging(Path(sys.argv[1])) as folder:
    folder.mkdir()
    print("ready", flush=True)
    time.sleep(600)
"""


def held(target):
    """A process that has a staging folder for the target."""
    process = run_python(HOLD, target)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_runs_folder_is_removed_by_the_next_and_a_living_runs_stays(tmp_path):
    target = tmp_path / "new [x]*"
    killed = held(target)
    killed.kill()
    killed.communicate()
    (left,) = tmp_path.iterdir()
    (left / target.name).chmod(0o500)  # a copy of a read-only folder
    alive = held(target)
    try:
        (other,) = tmp_path.iterdir()
        assert other != left
        with staging(target) as folder:
            assert not folder.exists()
            assert folder.name == target.name
            assert len(list(tmp_path.iterdir())) == 2
        assert list(tmp_path.iterdir()) == [other]
    finally:
        alive.kill()
        alive.communicate()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", [(), ("unlocked",), ("dst",), ("dst", "lock"), ("dst", "unlocked")])
@pytest.mark.parametrize("kind", ["partial", "old"])
def test_a_left_folder_without_a_lock_is_removed(kind, content, tmp_path):
    """Killed between mkdir and lock, or in the middle of its removal."""
    (tmp_path / "dst").mkdir()
    left = Path(tempfile.mkdtemp(prefix=f".dst.{kind}-", dir=tmp_path))
    for name in content:
        (left / name).mkdir() if name == "dst" else (left / name).touch()
    with staging(tmp_path / "dst") as folder:
        assert names_in(tmp_path) == [folder.parent.name, "dst"]
    assert names_in(tmp_path) == ["dst"]


def test_a_living_run_whose_folder_has_no_lock_yet_takes_another(tmp_path, monkeypatch):
    """Another run comes between its mkdir and its lock, or holds what it has just made."""
    made, mkdtemp = [], tempfile.mkdtemp

    def slow(**arguments):
        root = mkdtemp(**arguments)
        made.append(root)
        if len(made) == 1:
            files.remove_left(tmp_path / "dst")  # as another run does
            assert not os.path.exists(root)
        if len(made) == 2:  # another run is about to remove it
            held.append(files._locked(Path(root)))
        return root

    held = []
    monkeypatch.setattr(tempfile, "mkdtemp", slow)
    with staging(tmp_path / "dst") as folder:
        assert len(made) == 3
        assert folder.parent == Path(made[2])
        files.remove_left(tmp_path / "dst")
        assert folder.parent.is_dir()
    held[0].close()
    files.remove_left(tmp_path / "dst")
    assert names_in(tmp_path) == []


def test_a_folder_that_a_killed_run_had_moved_aside_comes_back(tmp_path):
    """Killed between the two renames of a replacement."""
    target = tmp_path / "dst"
    save_transformer(source(), target)
    before = files_below(target)
    kill = """
import os, signal, sys
from pathlib import Path
from sana15.storage import files
replace = os.replace
def killing(a, b):
    if str(b) == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(a, b)
os.replace = killing
with files.staging(Path(sys.argv[1])) as made:
    made.mkdir()
    files.replace_folder(made, Path(sys.argv[1]))
"""
    run_python(kill, target).communicate()
    assert not target.exists()
    with staging(target):
        assert files_below(target) == before
    assert names_in(tmp_path) == ["dst"]


def test_a_new_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(a, b):
        events.append(f"-> {os.path.basename(b)}")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    save_transformer(source(), tmp_path / "src")
    grow_folder(tmp_path / "src", tmp_path / "dst", layers=4)
    for name, more in (("src", []), ("dst", ["sana15.json"])):
        at = events.index(f"-> {name}")
        assert {name, "config.json", "diffusion_pytorch_model.safetensors", *more} <= set(events[:at])
        assert events[at + 1] == tmp_path.name
        del events[: at + 1]


def test_names_like_those_of_a_staging_folder_are_nobodys_business(tmp_path):
    """A folder that is called DST.partial, or hidden like one of ours but without its lock, is left alone."""
    for name in ("dst.partial", "dst.old", ".dst.partial-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("precious")
    before = files_below(tmp_path)
    save_transformer(source(), tmp_path / "dst")
    save_transformer(source(), tmp_path / "dst")  # over the first
    grow_folder(tmp_path / "dst", tmp_path / "dst2", layers=5)
    assert {k: v for k, v in files_below(tmp_path).items() if "notes" in str(k)} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".dst.partial-notes", "dst", "dst.old", "dst.partial", "dst2"]  # fmt: skip


def test_a_source_called_like_the_targets_staging_folder(tmp_path):
    source_folder = tmp_path / "dst.partial"
    save_transformer(source(), source_folder)
    before = files_below(source_folder)
    assert main(["prune", str(source_folder), str(tmp_path / "dst"), "--indices", "0,2"]) == 0
    assert files_below(source_folder) == before
    assert load_transformer(tmp_path / "dst").config.num_layers == 2


def test_of_two_runs_to_one_target_the_second_is_refused(tmp_path):
    """At once while the first works; and the first, where something else has taken its place in the meantime."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    save_transformer(source(), src)
    slow = """
import sys, sana15.growth.folder as g
def waiting(*args, check=g.check_growth):
    print("checking", flush=True)
    sys.stdin.readline()
    return check(*args)
g.check_growth = waiting
try:
    g.grow_folder(sys.argv[1], sys.argv[2], layers=8, check=True)
except ValueError as error:
    print(error)
"""
    process = run_python(slow, src, dst, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "checking\n"
    before = files_below(tmp_path)
    with pytest.raises(ValueError, match=f"dst is in use: process {process.pid} on .* works there"):
        grow_folder(src, dst, layers=6)
    assert files_below(tmp_path) == before
    save_transformer(source(), tmp_path / "other")
    (tmp_path / "other").rename(dst)
    whole = files_below(dst)
    out, _ = process.communicate("go on\n")
    assert "dst exists" in out
    assert files_below(dst) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


def test_read_only_folders_are_opened_before_they_are_removed(tmp_path, monkeypatch):
    """Root may remove them anyway; what anybody else needs are the modes."""
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir(mode=0o500)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    folders = [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"]
    for folder in reversed(folders):
        folder.chmod(0o500)
    removed = []
    monkeypatch.setattr(
        files.shutil, "rmtree", lambda path: removed.append((path, [f.stat().st_mode & 0o777 for f in folders]))
    )
    files.remove_tree(tmp_path / "a")
    assert removed == [(tmp_path / "a", [0o700] * 3)]
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o500


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    """The old one is moved aside first; where the new one cannot take its place, it comes back."""
    save_transformer(source(), tmp_path / "dst")
    before = files_below(tmp_path)
    rename = files.os.replace

    def failing(a, b):
        if b == tmp_path / "dst" and "partial" in str(a):
            raise OSError("no")
        rename(a, b)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        save_transformer(source(3), tmp_path / "dst")
    assert files_below(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


def test_json_that_is_too_deep_is_damaged(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="is damaged"):
        read_json(tmp_path / "deep.json")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_lines_end_at_line_feeds_alone(tmp_path, mark, end):
    """Also form feeds, file separators and NEL are characters of a line."""
    lines = ["a cat", "two\u2028dogs\u2029", "a\x0bb\x0cc\x1cd\x1de\x85f", ""]
    (tmp_path / "p.txt").write_bytes(mark + end.join(line.encode() for line in lines))
    assert read_text_lines(tmp_path / "p.txt") == lines


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "config.json") == {"a": 1}


def test_text_of_another_encoding_is_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes("a cat".encode("utf-16"))
    with pytest.raises(DataError, match=r"p\.txt is no text file: 'utf-8' codec"):
        read_text_lines(tmp_path / "p.txt")


def test_values_of_the_parameters_line_are_quoted():
    """As other tools write it: what holds a comma, colon, quote or line's end is a JSON string."""
    values = {
        "prompt": "a, b: c", "negative_prompt": "", "steps": 2, "sampler": "flow_dpm", "guidance": 2.0, "seed": 1,
        "width": 64, "height": 64, "model_sha256": "0" * 64, "model": 'my, "best": model', "version": "1",
    }  # fmt: skip
    line = parameters(values).split("\n")[1]
    assert r'Model: "my, \"best\": model", Version: sana15 1' in line
    assert line.startswith("Steps: 2, Sampler: flow_dpm, ")
