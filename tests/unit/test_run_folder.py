"""A run's folder belongs to one process, and an empty one is removed by that one only."""

import errno
import fcntl
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from threading import Timer

import pytest

from flowrl.runs.folder import _new, claim, discard_if_empty, make_new, point_latest_at


def test_a_folder_is_claimed_once_and_only_its_owner_removes_it(tmp_path):
    """Another open file's lock stands for another process. Mutation: remove a folder that another
    one has claimed.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(
        ValueError, match=f"run_dir={folder} is being written to by another process"
    ):
        claim(str(folder))
    discard_if_empty(str(folder))
    assert folder.is_dir()
    os.close(other)
    claim(str(folder))
    (folder / "config.yaml").touch()
    discard_if_empty(str(folder))
    assert folder.is_dir()
    (folder / "config.yaml").unlink()
    discard_if_empty(str(folder))
    assert not folder.exists()


def test_who_only_asks_does_not_keep_a_run_from_its_folder(tmp_path):
    """A list of runs has the lock for an instant. Mutation: refuse at the first attempt."""
    asking = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    answered = Timer(0.1, os.close, [asking])
    answered.start()
    claim(str(tmp_path))
    answered.join()
    other = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(other)


def test_latest_is_a_link_or_a_warning(tmp_path, monkeypatch, caplog):
    """Where links are impossible, or `latest` is a folder of somebody's, the run goes on.

    Mutation: let the error end the run, delete the folder, or leave a half-made link behind.
    """
    run = tmp_path / "outputs" / "day" / "run"
    run.mkdir(parents=True)
    point_latest_at(run)
    assert (tmp_path / "outputs" / "latest").resolve() == run and not caplog.messages
    (tmp_path / "outputs" / "latest").unlink()
    (tmp_path / "outputs" / "latest").mkdir()
    point_latest_at(run)
    assert "latest cannot be made a link to this run (Is a directory)" in caplog.messages[0]
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["day", "latest"]

    def impossible(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.symlink_to", impossible)
    point_latest_at(run)
    assert "(Operation not permitted); the run goes on" in caplog.messages[1]


def test_runs_of_one_second_each_get_a_folder(tmp_path):
    """Eight processes at once, each asking twice. Mutation: look whether the folder exists before
    making it.
    """
    name = str(tmp_path / "outputs" / "day" / "12-00-00-run")
    with ProcessPoolExecutor(8, mp_context=get_context("spawn")) as pool:
        folders = list(pool.map(_ask_twice, [name] * 8, chunksize=1))
    assert all(first == second for first, second in folders)
    assert {first for first, _ in folders} == {
        name,
        *(f"{name}-{number}" for number in range(2, 9)),
    }


def _ask_twice(name):
    _new.clear()  # a process of the pool may serve twice
    return [make_new(name), make_new(name)]


def test_what_cannot_be_made_is_left_to_whoever_writes(tmp_path):
    """Mutation: look for another name for ever, or raise from within the configuration."""
    (tmp_path / "file").write_text("")
    name = str(tmp_path / "file" / "day" / "run")
    assert make_new(name) == name
