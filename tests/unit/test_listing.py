"""The list of runs: states, progress and headlines of folders written by hand, and every kind of
damage as a line.
"""

import json
import os
import sys

import pytest
import yaml
from test_report import write_run

from flowrl.cli import runs
from flowrl.errors import UserError
from flowrl.report.listing import as_lines, entry
from flowrl.runs.folder import claim, is_claimed


@pytest.fixture
def listed(monkeypatch, capsys):
    """Call the program; what it prints."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["list_runs.py", *map(str, words)])
        runs.main()
        return capsys.readouterr().out

    return call


def finished(folder, when=1000.0, **summary):
    """A run of 40 iterations, written at a time."""
    write_run(folder, 0, "dppo", 0.75)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["evaluation"]["headline"] = "reward"
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"num_iterations": 40}))
    summary = {"status": "finished", "iterations": 40, "seconds": 3725.4} | summary
    (folder / "summary.json").write_text(json.dumps(summary))
    settle(folder, when)
    return folder


def settle(folder, when):
    for path in folder.iterdir():
        os.utime(path, (when, when))


def test_a_finished_run_by_its_summary_or_its_rows(tmp_path):
    """Mutation: take the last row's score for the first, or the training reward."""
    row = entry(finished(tmp_path / "a"))
    assert (row.state, row.iterations, row.num_iterations) == ("finished", 40, 40)
    assert (row.method, row.seed, row.headline) == ("Flow-DPPO", 0, "reward")
    assert (row.before, row.after, row.seconds) == (0.5, 0.75, 3725.4)
    assert (row.written, row.problem) == (1000.0, None)
    told = {"before": {"reward": 0.25}, "after": {"reward": None}}
    row = entry(finished(tmp_path / "b", eval=told))
    assert (row.before, row.after) == (0.25, None)


def test_a_run_without_a_summary_goes_on_or_was_killed(tmp_path):
    """Mutation: call a killed run running, or one that runs unfinished."""
    folder = finished(tmp_path / "a")
    (folder / "summary.json").unlink()
    row = entry(folder)
    assert (row.state, row.iterations, row.after, row.seconds) == ("unfinished", 40, 0.75, None)
    assert not is_claimed(folder) and not is_claimed(tmp_path / "none")
    claim(str(folder))
    assert is_claimed(folder)
    assert entry(folder).state == "running"
    (folder / "metrics.csv").write_text("iteration,reward/mean\n1,0.5\n2,0.5\n3,")
    row = entry(folder)
    assert (row.iterations, row.before, row.after) == (2, None, None)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.yaml", "{", "config.yaml is damaged"),
        ("summary.json", "[]", "a JSON object was expected"),
        ("summary.json", "{", "summary.json is damaged"),
        ("metrics.csv", "iteration;reward\n1;2\n", "separates its columns"),
        ("metrics.csv", "iteration,x\n1,red\n", "line 2: x is 'red', no number"),
        ("provenance.json", '{"changes": [1]}', "provenance.json is damaged"),
    ],
)
def test_a_damaged_run_is_listed_with_the_reason(name, text, words, tmp_path, listed):
    """The others stay. Mutation: end with the first damaged one, or leave it out."""
    finished(tmp_path / "good")
    (finished(tmp_path / "bad") / name).write_text(text)
    lines = listed(tmp_path).splitlines()
    assert len(lines) == 4
    [place] = [i for i, line in enumerate(lines) if line.startswith("damaged")]
    assert lines[place].endswith("bad") and words in lines[place + 1]
    [row] = [row for row in json.loads(listed(tmp_path, "--json")) if row["state"] == "damaged"]
    assert words in row["problem"] and row["iterations"] is None


@pytest.mark.parametrize("odd", ["x", True, None, [1], float("nan")])
def test_odd_values_are_not_known(odd, tmp_path):
    """Somebody may have edited a file. Mutation: fail at the first one."""
    folder = finished(tmp_path / "a", seconds=odd, iterations=odd, eval={"before": {"reward": odd}})
    row = entry(folder)
    assert (row.seconds, row.iterations, row.before, row.after) == (None, 40, None, 0.75)


def test_the_newest_stands_last_and_lines_fit(tmp_path, listed, monkeypatch):
    """On a terminal of 80 columns a folder goes to a line of its own, whole. Mutation: cut a path
    that is there to be copied, or sort by name.
    """
    finished(tmp_path / "z" / "0", 1000)
    finished(tmp_path / "a" / "1", 3000)
    finished(tmp_path / ("b" * 70), 2000)
    monkeypatch.chdir(tmp_path)
    head, *rows = listed(".").splitlines()
    assert head.split() == ["state", "done", "method", "seed", "headline", "time", "folder"]
    assert [row.split()[-1] for row in rows] == ["z/0", "b" * 70, "a/1"]
    start = ["finished", "40/40", "Flow-DPPO", "0", "reward", "0.5", "->", "0.75"]
    assert rows[0].split()[:8] == start
    assert "1 h 02 min  z/0" in rows[0]
    entries = [entry(tmp_path / name) for name in ("z/0", "b" * 70)]
    lines = as_lines(entries, tmp_path, 80)
    assert max(map(len, lines)) <= 80
    assert lines[1::2] == ["    folder", "    z/0", f"    {'b' * 70}"]
    assert len(as_lines(entries[:1], tmp_path, 80)) == 2


def test_short_times(tmp_path):
    """Mutation: round minutes away."""
    for seconds, words in ((4.9, "5 s"), (125, "2 min 05 s"), (None, "-")):
        folder = finished(tmp_path / str(seconds), seconds=seconds)
        assert f"  {words}  " in as_lines([entry(folder)], tmp_path, None)[1]


def test_no_folder_and_no_run_are_told(tmp_path, listed):
    """Mutation: an empty table."""
    with pytest.raises(UserError, match="no such folder; give one that runs lie in"):
        listed(tmp_path / "none")
    with pytest.raises(UserError, match="no run there"):
        listed(tmp_path)
