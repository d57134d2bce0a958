"""metrics.csv after accidents: no row is invented, none is lost without a word."""

import csv
import io
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowrl.callbacks.record import RunRecord
from flowrl.errors import UserError
from flowrl.report.runs import read
from flowrl.runs.metrics import read_figures

ROWS = [
    {"iteration": i, "reward/mean": 0.1 * i, "eval/höhe/reward": "" if i % 2 else -1e-05 * i}
    for i in range(1, 6)
]


def table(rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


TEXT = table(ROWS)
WHOLE = [{name: str(value) for name, value in row.items()} for row in ROWS]


def test_a_whole_file_and_one_cut_by_a_kill(tmp_path):
    """Mutation: take a last line that is not ended, whose last number may be cut."""
    path = tmp_path / "metrics.csv"
    assert read_figures(path).rows == []
    path.write_text(TEXT, encoding="utf-8", newline="")
    assert read_figures(path).rows == WHOLE and not read_figures(path).problem
    path.write_text(TEXT[:-4], encoding="utf-8", newline="")
    assert read_figures(path).rows == WHOLE[:-1] and not read_figures(path).problem


DAMAGES = {
    "latin-1": (TEXT.encode("latin-1"), "not UTF-8", 0),
    "semicolons": (TEXT.replace(",", ";").encode("utf-8-sig"), "spreadsheets", 0),
    "cut in a row, and written on": (
        TEXT.replace("2,0.2,-2e-05\r\n", "2,0.\r\n").encode(),
        "line 3: 2 cells",
        4,
    ),
    "a letter": (TEXT.replace("0.4", "0.x").encode(), "line 5: reward/mean is '0.x', no number", 4),
    "two rows of one iteration": (TEXT.encode() + b"5,0.7,\r\n", "line 7: iteration 5 again", 5),
    "empty": (b"", "no whole line", 0),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_file_kept(name, tmp_path, caplog):
    """A resumed run keeps it aside; a report, which compares figures, refuses it by name.

    Mutation: overwrite the file, drop rows without a word, or let csv's or the codec's error
    through.
    """
    content, problem, num_rows = DAMAGES[name]
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    figures = read_figures(path)
    assert problem in figures.problem and len(figures.rows) == num_rows
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(
        UserError, match=r"metrics.csv is damaged .*; restore it, or leave this run out"
    ):
        read(tmp_path, "run")
    record = RunRecord(folder=str(tmp_path))
    record.restore(5, {"evaluations": {}, "seconds": 1.0})
    kept = tmp_path / "metrics.csv.unreadable"
    if num_rows == 5:  # nothing that belongs to the run is lacking
        assert not kept.exists() and not caplog.messages
        return
    assert kept.read_bytes() == content
    (message,) = caplog.messages
    assert problem in message and f"the rows of {num_rows} of the first 5" in message
    assert message.endswith("it is kept as metrics.csv.unreadable")


@pytest.mark.parametrize(
    "content", [TEXT.encode("utf-8-sig"), TEXT.encode() + TEXT.encode().splitlines()[-1] + b"\r\n"]
)
def test_a_mark_of_byte_order_and_a_doubled_row_are_no_damage(content, tmp_path, caplog):
    """Mutation: take the mark for a part of the first column's name, or the last row twice."""
    (tmp_path / "metrics.csv").write_bytes(content)
    record = RunRecord(folder=str(tmp_path))
    record.restore(5, {"evaluations": {}, "seconds": 1.0})
    assert record.rows == WHOLE and not caplog.messages
    assert read_figures(tmp_path / "metrics.csv").rows == WHOLE


def test_rows_that_are_gone_are_said(tmp_path, caplog):
    """Without the file; with fewer rows; and a start without a checkpoint keeps what there was.

    Mutation: begin a new file over the old one, or say nothing.
    """
    record = RunRecord(folder=str(tmp_path))
    record.restore(5, {"evaluations": {}, "seconds": 1.0})
    assert (
        "the file is gone: the rows of 0 of the first 5 iterations are left" in caplog.messages[0]
    )
    path = tmp_path / "metrics.csv"
    path.write_text(table(ROWS[2:]), encoding="utf-8", newline="")
    record.restore(4, {"evaluations": {}, "seconds": 1.0})
    assert (
        "rows are missing: the rows of 2 of the first 4 iterations are left" in caplog.messages[1]
    )
    record.start_anew()
    assert not path.exists() and len(read_figures(tmp_path / "metrics.csv.before").rows) == 2


@given(place=st.integers(0, len(TEXT.encode()) - 1), change=st.integers(0, 255))
def test_no_row_is_lost_silently(place, change, tmp_path_factory):
    """Cut anywhere (a change of 0) or with any byte changed: a problem, fewer rows at the end, or a
    changed digit.

    Mutation: skip lines that do not parse.
    """
    logging.disable()
    content = bytearray(TEXT.encode())
    if change:
        content[place] ^= change
    else:
        content = content[:place]
    path = tmp_path_factory.mktemp("fuzz") / "metrics.csv"
    path.write_bytes(content)
    figures = read_figures(path)
    # A cut: what stands before it, and no line that it goes through.
    if not figures.problem and not change:
        assert figures.rows == WHOLE[: max(0, content.count(b"\n") - 1)]
    elif not figures.problem:  # a digit, a letter of the head, or the end of the last line
        assert len(figures.rows) >= 4
    record = RunRecord(folder=str(path.parent))
    record.restore(5, {"evaluations": {}, "seconds": 1.0})
    assert len(record.rows) == 5 or (path.parent / "metrics.csv.unreadable").read_bytes() == bytes(
        content
    )
    logging.disable(logging.NOTSET)
