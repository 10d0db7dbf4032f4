"""Whole or not at all."""

import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import filelock
import pytest

from cn_clip.errors import UsageError
from cn_clip.outputs import STAMP, atomic_folder, claim, own_file, stamped_files, starts_with
from cn_clip.publish import LOCK, atomic_file, is_leftover, sweep


def test_a_file_appears_when_it_is_whole(tmp_path):
    with atomic_file(tmp_path / "new" / "file") as temporary:
        temporary.write_text("content")
        assert not (tmp_path / "new" / "file").exists()
    assert (tmp_path / "new" / "file").read_text() == "content"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("publish", [atomic_file, partial(atomic_folder, command="test")])
def test_an_error_leaves_the_old_one_and_no_litter(tmp_path, publish, error):
    target = tmp_path / "target"
    with publish(target) as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("old")
    with pytest.raises(error), publish(target) as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("half of the ne")
        raise error
    assert (target / "a" if target.is_dir() else target).read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    for name in ("a", "b"):
        with atomic_folder(tmp_path / "target", "test") as folder:
            (folder / name).write_text(name)
    assert [path.name for path in (tmp_path / "target").iterdir() if path.name != STAMP] == ["b"]


def test_a_file_that_came_while_the_new_folder_was_written_is_kept(tmp_path):
    with atomic_folder(tmp_path / "out", "test") as folder:
        (folder / "a").write_text("old")
    with (
        pytest.raises(UsageError, match=r"out holds diary, not written by test"),
        atomic_folder(tmp_path / "out", "test") as folder,
    ):
        (folder / "a").write_text("new")
        (tmp_path / "out" / "diary").write_text("mine")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert (tmp_path / "out" / "diary").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stamp_is_of_one_command_and_names_its_files(tmp_path):
    with atomic_folder(tmp_path / "out", "embed") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
    assert set(stamped_files(tmp_path / "out", "embed")) == {STAMP, "sub/a"}
    assert stamped_files(tmp_path / "out", "pack") == ()
    for damaged in ("", "[]", "{", '{"writer": "cn-clip embed", "files": 3}', "[" * 100_000):
        (tmp_path / "out" / STAMP).write_text(damaged)
        assert stamped_files(tmp_path / "out", "embed") == ()


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are other ones there")
def test_files_get_the_permissions_that_new_files_get_at_that_time(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as path:
            path.touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_the_only_copy_of_a_folder_is_never_swept_away(tmp_path):
    """Killed between two renames, the old folder lies in the temporary one."""
    (tmp_path / ".out.abcdefgh.cn-clip-tmp" / "old").mkdir(parents=True)
    (tmp_path / ".out.ijklmnop.cn-clip-tmp" / "new").mkdir(parents=True)
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".out.abcdefgh.cn-clip-tmp"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from cn_clip import outputs, publish
kind, target, at = sys.argv[1:]
if at == "rename":  # of the new folder, after the old one has moved away
    rename = Path.rename
    def killed(self, to):
        if self.name == "new":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, to)
    Path.rename = killed
write = publish.atomic_file if kind == "file" else lambda out: outputs.atomic_folder(out, "test")
with write(target) as path:
    (path / "a" if path.is_dir() else path).write_text("half")
    if at == "write":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def _killed(kind, target, at="write"):
    command = [sys.executable, "-c", _KILLED, kind, str(target), at]
    assert subprocess.run(command).returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
@pytest.mark.parametrize("name", ["target", "a name that is cut, as it is longer than forty bytes"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path, kind, name):
    target = tmp_path / name
    _killed(kind, target)
    (litter,) = tmp_path.iterdir()
    assert is_leftover(litter)
    publish = atomic_file if kind == "file" else partial(atomic_folder, command="test")
    with publish(target) as path:
        assert not litter.exists()
        (path / "a" if path.is_dir() else path).write_text("whole")
        with publish(target) as second:  # the first one is alive: its folder stays
            (second / "a" if second.is_dir() else second).write_text("whole")
        assert path.exists()
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_the_only_copy_stays_until_another_one_is_in_its_place(tmp_path):
    with atomic_folder(tmp_path / "out", "test") as folder:
        (folder / "a").write_text("mine")
    _killed("folder", tmp_path / "out", "rename")
    (litter,) = tmp_path.iterdir()
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", "test"):
        raise KeyboardInterrupt
    assert (litter / "old" / "a").read_text() == "mine"
    for name in ("b", "c"):
        with atomic_folder(tmp_path / "out", "test") as folder:
            (folder / name).write_text("new")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_temporary_folders_of_others_are_not_removed(tmp_path):
    names = [".a.npz.abcdefgh", ".a.npz.abcdefgi.cn-clip-tmp", ".b.npz.abcdefgh.cn-clip-tmp"]
    for name in names:
        (tmp_path / name).mkdir()
    for name in names[::2]:  # the second one's writer has not locked it yet
        (tmp_path / name / LOCK).touch()
    with atomic_file(tmp_path / "a.npz") as path:
        path.touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "a.npz"]


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError])
def test_a_file_system_without_locks_is_written_too(tmp_path, monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with atomic_file(tmp_path / "file") as path:
        path.write_text("content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_loop_of_links_and_a_missing_folder_are_errors(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    own = own_file("test", starts_with(b"x"))
    with pytest.raises(UsageError, match=r"could not write .*loop"):
        claim(tmp_path / "loop", own)
    assert claim(tmp_path / "new" / "folder" / "file", own, inputs=["none", "a\0b", "~nobody/x"])
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_an_output_without_write_permission_is_refused_first(tmp_path):
    (tmp_path / "read-only").mkdir(0o500)
    with pytest.raises(UsageError, match="is not writable"):
        claim(tmp_path / "read-only" / "file", own_file("test", starts_with(b"x")))


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="pipes have no path here")
def test_a_pipe_named_by_its_descriptor_is_told_before_the_work():
    ends = os.pipe()
    try:
        with pytest.raises(UsageError, match="a pipe"):
            claim(f"/dev/fd/{ends[1]}", own_file("test", starts_with(b"x")))
    finally:
        for end in ends:
            os.close(end)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are of any bytes on Linux only")
def test_a_file_is_published_where_the_locale_cannot_say_its_name(tmp_path):
    name = "猫" * 30 + ".txt"
    script = "import sys; from cn_clip.publish import write_text; write_text(sys.argv[1], 'x')"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / name)],
        check=True,
        env=os.environ | ascii_only,
    )
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_is_removed_before_it_is_locked_is_not_used(tmp_path, monkeypatch):
    acquire, folders = filelock.FileLock.acquire, []

    def late(lock, *arguments, **options):
        """Lock a file that another process takes for an abandoned one at that moment."""
        proxy = acquire(lock, *arguments, **options)
        folders.append(os.path.dirname(lock.lock_file))
        if len(folders) == 1:
            shutil.rmtree(folders[0])
        return proxy

    monkeypatch.setattr(filelock.FileLock, "acquire", late)
    with atomic_file(tmp_path / "x") as path:
        path.write_text("whole")
    assert (tmp_path / "x").read_text() == "whole" and len(folders) == 2
    assert os.listdir(tmp_path) == ["x"]
