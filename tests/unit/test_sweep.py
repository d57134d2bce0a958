"""The pool runs a stand-in for train.py that takes its orders from its overrides; so a sweep takes
a second.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from flowrl.errors import UserError
from flowrl.launch.composed import read_job
from flowrl.launch.foreign_targets import is_trusting
from flowrl.runs.command_line import override
from flowrl.sweep import pool, ranks
from flowrl.sweep.job import JobsFailed, environment, num_ranks, objective
from flowrl.sweep.plan import find_places, match, read_sweep, write_sweep
from flowrl.sweep.pool import NOTICES, Pool, Slots, find_slots
from flowrl.sweep.table import line
from hydra_plugins.flowrl_pool.pool_launcher import HYDRAS, discard_decoy, find_earlier

STAND_IN = """
    import json, os, pathlib, signal, sys, time
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    rank = int(os.environ.get("LOCAL_RANK", 0))
    folder = pathlib.Path(given.get("resume") or given["run_dir"])
    if "resume" in given: given = json.loads((folder / "config.yaml").read_text()) | {"do": "end"}
    elif rank == 0: (folder / "config.yaml").write_text(json.dumps(given))
    while not (folder / "config.yaml").exists(): time.sleep(0.01)
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LOCAL_RANK", "SLURM_NTASKS")
    seen = {name: os.environ.get(name) for name in names}
    seen |= {"arguments": sys.argv[1:], "group": os.getpgid(0)}
    (folder / f"seen{rank}.json").write_text(json.dumps(seen))
    do = given.get("do", "end").split("@")
    while "after" in given and not (folder.parent / given["after"]).exists(): time.sleep(0.01)
    if len(do) == 1 or int(do[1]) == rank:
        if do[0] == "fail": sys.exit(3)
        if do[0] == "die": os.kill(os.getpid(), signal.SIGKILL)
        if do[0] == "ignore": signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if do[0] in ("wait", "ignore"): (folder / f"waits{rank}").touch(); time.sleep(100)
    # As a rank waits in a collective that its peer has left.
    if do[0] == "fail" or do[0] == "die": time.sleep(100)
    if rank == 0: (folder / "metrics.csv").write_text("iteration,reward/mean\\n1,0.5\\n2,0.625\\n")
    if rank == 0: (folder / "summary.json").write_text(json.dumps({"status": "finished"}))
"""

TWO = Slots(("cpu0", "cpu1"), threads=3)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Runs jobs, given as overrides and numbers of ranks, in one folder."""
    script = tmp_path / "stand_in.py"
    script.write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setattr(ranks, "FAILURE_SECONDS", 0.5)

    def run(*wanted, slots=TWO, is_fail_fast=False, grace=0.5):
        jobs = match(
            tmp_path / "sweep", [job for job, _ in wanted], [(count, 2) for _, count in wanted]
        )
        write_sweep(tmp_path / "sweep", jobs, is_new=True)
        Pool(
            slots, is_fail_fast=is_fail_fast, grace=grace, refresh=0.1, group="sweep", script=script
        ).run(jobs)
        return jobs

    return run


def seen(job, rank=0):
    return json.loads((job.folder / f"seen{rank}.json").read_text())


def test_jobs_have_their_own_folder_devices_threads_and_status(sweep, monkeypatch):
    """Mutation: hand out all devices, leave the threads to the job, or let it think it is a Slurm
    task.
    """
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    jobs = sweep((("seed=0",), 1), (("seed=1",), 1), (("seed=2", "num_threads=7"), 1))
    assert [job.state for job in jobs] == ["finished"] * 3
    assert {job.devices for job in jobs[:2]} == {("cpu0",), ("cpu1",)}
    assert seen(jobs[0]) == {
        **{
            "CUDA_VISIBLE_DEVICES": None,
            "OMP_NUM_THREADS": "3",
            "LOCAL_RANK": None,
            "SLURM_NTASKS": None,
        },
        **{
            "arguments": ["seed=0", "num_threads=3", f"run_dir={jobs[0].folder}"],
            "group": seen(jobs[0])["group"],
        },
    }
    assert seen(jobs[2])["arguments"] == ["seed=2", "num_threads=7", f"run_dir={jobs[2].folder}"]
    assert len({job.folder for job in jobs} | {seen(job)["group"] for job in jobs}) == 6
    status = json.loads((jobs[1].folder / "job.json").read_text())
    assert (status["overrides"], status["state"]) == (["seed=1"], "finished")
    assert "finished        2/2  0.625  cpu" in line(jobs[1]) and "seed=1" in line(jobs[1])


def test_a_job_on_two_gpus_is_two_ranks_of_one_process_group(sweep):
    """Mutation: start ranks in groups of their own, or show each only its own device."""
    gpus = Slots(("4", "5", "6"), threads=None)
    (job,) = sweep((("seed=0",), 2), slots=gpus)
    assert [seen(job, rank)["LOCAL_RANK"] for rank in (0, 1)] == ["0", "1"]
    assert seen(job, 0)["CUDA_VISIBLE_DEVICES"] == seen(job, 1)["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert seen(job, 0)["group"] == seen(job, 1)["group"] != os.getpgid(0)
    assert seen(job)["arguments"] == ["seed=0", f"run_dir={job.folder}"]


def test_a_failure_ends_all_ranks_and_no_other_job_and_only_what_is_missing_runs_again(sweep):
    """One rank exits, one is killed, one job ends well; the second start resumes two and adds a
    third.

    Mutation: wait for the peers of a dead rank, run finished jobs again, or start failed ones from
    nothing.
    """
    wanted = [(("do=fail@1",), 2), (("do=die@0",), 2), (("seed=2",), 1)]
    start = time.monotonic()
    jobs = sweep(*wanted)
    assert time.monotonic() - start < 20
    assert [job.state for job in jobs] == ["failed", "failed", "finished"]
    assert [job.problem for job in jobs] == [
        "rank 1: exit status 3",
        "rank 0: killed by SIGKILL",
        "",
    ]
    before = seen(jobs[2])
    again = sweep(*wanted, (("seed=3",), 1))
    assert [(job.number, job.state) for job in again] == [(n, "finished") for n in range(4)]
    assert seen(again[0])["arguments"] == [f"resume={again[0].folder}", "num_threads=3"]
    assert seen(again[2]) == before


def test_fail_fast_stops_the_others(sweep):
    """Mutation: go on with waiting jobs, or call the stopped ones failed."""
    jobs = sweep(
        (("do=wait",), 1), (("do=fail", "after=0/waits0"), 1), (("seed=2",), 1), is_fail_fast=True
    )
    assert [job.state for job in jobs] == ["stopped", "failed", "waiting"]


def test_what_does_not_end_when_asked_is_killed(sweep):
    """Mutation: send SIGTERM once and wait."""
    jobs = sweep((("do=ignore",), 1), (("do=fail", "after=0/waits0"), 1), is_fail_fast=True)
    assert [job.problem for job in jobs] == ["killed by SIGKILL", "exit status 3"]


def test_a_rank_that_outlives_the_others_is_ended(sweep):
    """Mutation: wait for all ranks of a job whose first has finished."""
    (job,) = sweep((("do=wait@1",), 2))
    assert (job.state, job.problem) == ("failed", "rank 1 went on after another had ended")


def test_an_interrupt_stops_the_jobs_and_is_passed_on(sweep, tmp_path, capsys):
    """It is told at once. Mutation: leave the jobs running, swallow the interrupt, or wait in
    silence.
    """
    stopper = (
        "import os, pathlib, signal, sys, time\n"
        "while len(list(pathlib.Path(sys.argv[1]).glob('*/waits0'))) < 2: time.sleep(0.1)\n"
        f"os.kill({os.getpid()}, signal.SIGINT)"
    )
    with (
        subprocess.Popen([sys.executable, "-c", stopper, tmp_path / "sweep"]),
        pytest.raises(KeyboardInterrupt),
    ):
        sweep((("do=wait",), 1), (("do=wait", "seed=1"), 1), (("seed=2",), 1))
    for number in (0, 1):
        folder = tmp_path / "sweep" / str(number)
        assert json.loads((folder / "job.json").read_text())["state"] == "stopped"
        with pytest.raises(ProcessLookupError):
            os.killpg(json.loads((folder / "seen0.json").read_text())["group"], 0)
    assert not (tmp_path / "sweep" / "2").exists()
    told = capsys.readouterr().out
    assert told.index(NOTICES[0].format("Ctrl-C")) < told.index("stopped")
    assert NOTICES[1] not in told


def test_a_sweep_that_never_began_leaves_no_folder(tmp_path):
    """With what was made for it; a folder with anything else stays. Mutation: leave the decoy, or
    remove a sweep.
    """
    made = [tmp_path / "day" / "sweep", tmp_path / "day"]
    made[0].mkdir(parents=True)
    (made[0] / HYDRAS).touch()
    (made[0] / "sweep.json").touch()
    discard_decoy(made)
    assert len(list(made[0].iterdir())) == 2
    (made[0] / "sweep.json").unlink()
    discard_decoy(made)
    assert not made[1].exists() and tmp_path.is_dir()
    discard_decoy(made)


def test_a_job_that_still_runs_is_not_started_again(sweep, tmp_path):
    """Its log is locked by whoever runs it, and its status is theirs. Mutation: open the log, or
    write, unlocked.
    """
    folder = tmp_path / "sweep" / "0"
    folder.mkdir(parents=True)
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'ab'); fcntl.flock(f, 2); "
        "print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, folder / "job.log"], stdout=subprocess.PIPE
    ) as earlier:
        earlier.stdout.readline()
        (job,) = sweep((("seed=0",), 1))
        earlier.kill()
    assert job.state == "failed" and "earlier start" in job.problem
    assert not (folder / "job.json").exists()


def test_a_signal_while_a_job_starts_reaches_it(sweep, monkeypatch):
    """Mutation: ask only the jobs that are listed already."""

    class Interrupted(ranks.Ranks):
        def __init__(self, *args):
            super().__init__(*args)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(pool, "Ranks", Interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sweep((("do=wait",), 1))
    assert time.monotonic() - start < 20


def test_a_job_larger_than_the_pool_is_refused(sweep):
    """Mutation: wait forever for a third slot."""
    with pytest.raises(ValueError, match=r"trainer.devices=3.*2 slots"):
        sweep((("seed=0",), 3))


def test_slots(monkeypatch):
    """Mutation: number the GPUs from 0 whatever is visible, or divide threads by jobs instead of
    slots.
    """
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_slots(None, 0, wanted=3) == Slots(("cpu0", "cpu1", "cpu2"), 5)
    assert find_slots(2, 0, wanted=9) == Slots(("cpu0", "cpu1"), 8)
    assert find_slots(None, 0, wanted=99).threads == 1
    assert find_slots(None, 2, wanted=1) == Slots(("0", "1"), None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert find_slots(1, 2, wanted=9) == Slots(("3",), None)
    with pytest.raises(ValueError, match="there are 2 GPUs"):
        find_slots(3, 2, wanted=9)
    with pytest.raises(ValueError, match="at least 1"):
        find_slots(0, 2, wanted=9)


def test_jobs_are_known_by_their_overrides(tmp_path):
    """Mutation: match by job number, so that another order of the values resumes the wrong run."""
    first = match(tmp_path, [("a=1", "seed=0"), ("a=1", "seed=1")], [(1, 2)] * 2)
    for job in first:
        job.write()
    second = match(
        tmp_path, [("seed=1", "a=1"), ("a=2", "seed=0"), ("a=1", "seed=0")], [(1, 2)] * 3
    )
    assert [job.number for job in second] == [1, 2, 0]


def test_a_sweep_is_continued_by_its_folder(tmp_path):
    """Script, working directory and jobs are kept; a job that was never started keeps its number.

    Mutation: drop the jobs of an earlier batch, or number only by the folders that runs have
    written to.
    """
    first = match(tmp_path, [("seed=0",), ("seed=1",)], [(1, 2)] * 2)
    write_sweep(tmp_path, first, is_new=True, script=tmp_path / "mine.py", directory=tmp_path)
    first[1].write()
    later = match(tmp_path, [("seed=2",), ("seed=0",)], [(1, 2)] * 2)
    assert [job.number for job in later] == [2, 0]
    write_sweep(tmp_path, later[:1], is_new=False, script=tmp_path / "mine.py", directory=tmp_path)
    sweep = read_sweep(tmp_path)
    assert (sweep.script, sweep.directory) == (tmp_path / "mine.py", tmp_path)
    assert sweep.jobs == (("seed=0",), ("seed=1",), ("seed=2",))
    with pytest.raises(ValueError, match=r"no sweep\.json"):
        read_sweep(tmp_path / "x")


def test_a_sweep_of_an_earlier_version_is_continued(tmp_path):
    """Its file is a list of overrides, and its jobs have folders with a status. Mutation: read only
    the new form.
    """
    (tmp_path / "sweep.json").write_text(json.dumps([["seed=0"], ["seed=1"]]))
    match(tmp_path, [("seed=1",)], [(1, 2)])[0].write()
    assert read_sweep(tmp_path).jobs == (("seed=0",), ("seed=1",))
    jobs = match(tmp_path, [("seed=0",), ("seed=1",)], [(1, 2)] * 2)
    assert [job.number for job in jobs] == [1, 0]


def test_a_resume_in_a_sweep_stands_alone(tmp_path):
    """The folder is read as Hydra reads it. Mutation: split at `=`, which keeps the quotes, or hand
    it to every job.
    """
    folder = tmp_path / "my sweep (é), #1 = 'x'"
    assert find_earlier([(override("resume", str(folder)),)]) == folder
    for spelling in (
        "trust_folder=true",
        "trust_folder=True",
        "++trust_folder=true",
        "trust_folder=false",
    ):
        assert find_earlier([(spelling, override("resume", str(folder)))]) == folder
        assert is_trusting([spelling, "seed=0"]) is (spelling != "trust_folder=false")
    assert find_earlier([("seed=0",)]) is None
    with pytest.raises(ValueError, match="stands alone"):
        find_earlier([("resume=x", "seed=0")])


def test_the_failure_of_a_sweep_is_one_line():
    """It is an error of our own, which train.py answers in one line. Mutation: a bare Exception."""
    from flowrl.launch.errors import explain, is_users

    error = JobsFailed("1 of 2 jobs did not finish")
    assert is_users(error) and explain(error) == "1 of 2 jobs did not finish"


def test_the_group_of_a_sweep_is_its_trackers_group(monkeypatch):
    """Mutation: inherit the W&B run of the process that starts the sweep."""
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert environment("12-00-00-sweep")["WANDB_RUN_GROUP"] == "12-00-00-sweep"
    assert "WANDB_RUN_ID" not in environment("x")


def test_what_a_search_maximises(tmp_path):
    """Mutation: take the evaluation before training, or make a missing score 0."""
    (tmp_path / "summary.json").write_text(
        json.dumps({"eval": {"before": {"strict": 1}, "after": {"strict": 0.75}}})
    )
    assert objective(tmp_path, "strict") == 0.75
    assert objective(tmp_path, "soft") is None
    assert [num_ranks(devices) for devices in (2, "2", "auto", [0, 3])] == [2, 2, 1, 2]


@pytest.mark.parametrize(
    "text", ["{}", "[1]", "3", "null", '{"jobs": [{}]}', '["a"]', "[[1]]", '{"script": 1}']
)
def test_a_damaged_record_of_a_sweep_is_one_line(text, tmp_path):
    """Of any JSON that is no such record. Mutation: let KeyError or TypeError through."""
    (tmp_path / "sweep.json").write_text(text)
    for read in (read_sweep, lambda folder: find_places(folder, [("seed=0",)])):
        with pytest.raises(
            UserError,
            match=r"^[^\n]*sweep.json is damaged \([^\n]*\); remove it, and start the sweep",
        ):
            read(tmp_path)


@pytest.mark.parametrize(
    "text", ["{}", '{"overrides": 1}', '{"overrides": [1], "number": 0, "seconds": 1}', "[]"]
)
def test_a_damaged_status_of_a_job_is_one_line(text, tmp_path):
    """Mutation: let KeyError or TypeError through."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "job.json").write_text(text)
    with pytest.raises(
        UserError, match=r"0/job.json is damaged \(.*\); remove it, and start the sweep again"
    ):
        find_places(tmp_path, [("seed=0",)])


@pytest.mark.parametrize("evaluations", [None, [], {"after": None}, {"after": 3}])
def test_a_summary_without_scores_has_no_objective(evaluations, tmp_path):
    """Mutation: let AttributeError through."""
    (tmp_path / "summary.json").write_text(json.dumps({"eval": evaluations}))
    assert objective(tmp_path, "strict") is None


@pytest.mark.parametrize("text", ["", "- a", "{}", "hydra: {}", "a: [", "hydra: {job: {num: 1}}"])
def test_a_damaged_configuration_of_a_job_is_one_line(text, tmp_path):
    """Mutation: let AttributeError, the parser's or omegaconf's error through."""
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(
        UserError, match=r"^[^\n]*job.yaml is damaged \([^\n]*\); remove it, and start the sweep"
    ):
        read_job(tmp_path)
