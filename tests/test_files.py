"""Folders that appear whole: staging beside the target, killed and concurrent runs, read-only folders, names that are taken."""

import subprocess

import pytest
from test_growth import files_below, run_python, source

from sana15 import files
from sana15.checkpoint import load_transformer, save_transformer
from sana15.cli import main
from sana15.files import DataError, read_json, staging
from sana15.growth_files import grow_folder

HOLD = """
import sys, time
from pathlib import Path
from sana15.files import staging
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
    """Both begin before either is done; what appears is whole."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    save_transformer(source(), src)
    slow = """
import sys, sana15.growth_files as g
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
    grow_folder(src, dst, layers=6)
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
