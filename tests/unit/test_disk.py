"""A disk that is full is told in one line."""

import errno

import pytest

from flowrl.launch.errors import one_line_errors
from flowrl.runs import disk
from flowrl.runs.files import write_whole


def test_a_full_disk_is_one_line(tmp_path, capsys):
    """A real one: /dev/full. The file stays what it was. Mutation: let the error through without
    the folder.
    """
    path = tmp_path / "summary.json"
    write_whole(path, "before")
    (tmp_path / "summary.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError) as told:
        write_whole(path, "after")
    assert (
        told.value.errno == errno.ENOSPC
        and path.read_text() == "before"
        and len(list(tmp_path.iterdir())) == 1
    )
    assert disk.is_full(told.value) and disk.is_full(RuntimeError("I/O error: ... (os error 28)"))
    wrapped = ValueError("no summary")
    wrapped.__context__ = told.value
    assert disk.is_full(wrapped) and not disk.is_full(ValueError("no"))

    def fail():
        raise disk.DiskFull(f"{tmp_path}: no space left") from told.value

    assert one_line_errors(fail) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: no space left\n"
