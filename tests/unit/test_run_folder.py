"""A run's folder belongs to one process, and an empty one is removed by that one only."""

import fcntl
import os

import pytest

from flowrl.runs.folder import claim, discard_if_empty


def test_a_folder_is_claimed_once_and_only_its_owner_removes_it(tmp_path):
    """Another open file's lock stands for another process. Mutation: remove a folder that another one has claimed."""
    folder = tmp_path / "run"
    folder.mkdir()
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=f"run_dir={folder} is being written to by another process"):
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
