"""The wheel, unpacked where no checkout is: its content, and the command `flowrl` from an empty
folder.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from email import message_from_string
from zipfile import ZipFile

import pytest
from runs import ROOT

BUILD = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
QUICK = ("debug=smoke", "logger=none", "viewing.every=0", "num_threads=1")


@pytest.fixture(scope="module")
def tracked():
    """The files of the checkout, without those that git ignores."""
    line = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tracked, tmp_path_factory):
    """The wheel, built from a copy by the backend itself, since pip would ask the network."""
    place = tmp_path_factory.mktemp("wheel")
    for name in tracked:
        target = place / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    line = [sys.executable, "-c", BUILD, str(place)]
    built = subprocess.run(line, cwd=place / "source", capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "absent from the `packages`" not in built.stderr
    (path,) = place.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """Call `python -m flowrl` of the unpacked wheel, in an empty folder that all calls share."""
    site = tmp_path_factory.mktemp("site")
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    place = tmp_path_factory.mktemp("empty")

    def call(*words, cwd=place):
        line = [sys.executable, "-m", "flowrl", *map(str, words)]
        env = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call.site = site
    call.place = place
    return call


def test_the_wheel_holds_the_package_and_its_configuration(wheel, tracked):
    """And nothing else of the checkout. Mutation: leave out the folders below conf/, a template, or
    a pipeline's weights; or pack the tests.
    """
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = {name.partition(".dist-info/")[2]: name for name in archive.namelist()}
        metadata = message_from_string(archive.read(info["METADATA"]).decode())
        entry = archive.read(info["entry_points.txt"]).decode()
    packed = {name for name in tracked if name.startswith(("flowrl/", "hydra_plugins/"))}
    packed |= {f"flowrl/{name}" for name in tracked if name.startswith("conf/")}
    assert names == packed
    assert {"licenses/LICENSE", "licenses/NOTICE"} <= set(info)
    assert metadata["Name"] == "flowrl-lightning"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "flowrl = flowrl.__main__:main" in entry


def test_the_command_composes_what_train_py_does(command):
    """Mutation: look for conf/ beside the installed package."""
    assert "  flowrl evaluate  " in command("--help")
    shown = command("train", "--cfg", "job", "loss=grpo")
    line = [sys.executable, ROOT / "train.py", "--cfg", "job", "loss=grpo"]
    known = subprocess.run(line, capture_output=True, text=True, cwd=command.place).stdout
    assert shown == known and "flowrl.losses.grpo" in shown


@pytest.mark.slow
def test_a_run_a_sweep_and_an_evaluation(command):
    """Mutation: let jobs call train.py, which is not there, or leave out templates and weights."""
    out = command("train", *QUICK)
    assert "finished: " in out and (command.place / "outputs" / "latest" / "lora").is_dir()
    out = command("train", "-m", *QUICK, "seed=0,1", "hydra.sweep.dir=sweep")
    assert "all 2 jobs finished" in out and "flowrl report" in out
    sweep = json.loads((command.place / "sweep" / "sweep.json").read_text())
    assert sweep["script"] == str(command.site / "flowrl" / "cli" / "train.py")
    assert "0 of 2 jobs to run" in command("train", "-m", "resume=sweep")
    rows = [(command.place / "sweep" / str(job) / "metrics.csv").read_text() for job in (0, 1)]
    assert len(rows[0].splitlines()) == 3 and rows[0] != rows[1]
    evaluated = command("evaluate", "base", "sweep/0", "--out", "page", "--shown", 2)
    assert "page/page.html" in evaluated
    assert "<html" in (command.place / "page" / "page.html").read_text()
    assert "2 runs in 1 condition" in command("report", "sweep")


@pytest.mark.slow
def test_a_private_project(command, tmp_path):
    """A project from the template, from its first run to its server. Mutation: compose the jobs of
    its sweep anew, refuse its own runs, or record its commit as FlowRL's.
    """
    command("new", "acme", cwd=tmp_path)
    place = tmp_path / "acme"
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "first")):
        subprocess.run(["git", *words], cwd=place, check=True)
    mine = ("--config-dir", "conf")
    quick = ("experiment=first", *QUICK, "trainer.accelerator=cpu")

    def call(name, *words):
        return command(name, *mine, *words, cwd=place)

    assert "acme.losses.SPO" in call("check", *quick)
    out = call("train", *quick, "run_dir=outputs/run")
    assert "finished: " in out
    recorded = json.loads((place / "outputs" / "run" / "provenance.json").read_text())
    assert recorded["git_revision"] is None and len(recorded["projects"]["acme"]) == 40
    rows = (place / "outputs" / "run" / "metrics.csv").read_text().splitlines()
    assert "acme/beyond" in rows[0] and len(rows) == 3
    call("train", "resume=outputs/run", "num_iterations=3")
    out = call("train", "-m", *quick, "loss.bound=5e-5,1e-4", "hydra.sweep.dir=sweep")
    assert "all 2 jobs finished" in out
    assert "0 of 2 jobs to run" in call("train", "-m", "resume=sweep")
    assert "page/page.html" in call("evaluate", "base", "sweep/0", "--out", "page", "--shown", 2)
    assert "latency       ok" in call("doctor", "reward=coverage")


@pytest.mark.slow
def test_the_server_of_a_private_reward(command, tmp_path):
    """Mutation: serve without the folder of configuration."""
    pytest.importorskip("starlette")
    command("new", "acme", cwd=tmp_path)
    line = [sys.executable, "-m", "flowrl", "serve", "--config-dir", "conf", "reward=coverage"]
    env = os.environ | {"PYTHONPATH": str(command.site)}
    place = tmp_path / "acme"
    pipe = subprocess.PIPE
    with subprocess.Popen([*line, "port=0"], cwd=place, env=env, stdout=pipe, text=True) as server:
        try:
            [url] = re.findall(r"http://[\d.:]+", next(iter(server.stdout)))
            words = (*QUICK, "reward=remote", f"reward.url={url}")
            assert "finished: " in command("train", *words, cwd=place)
        finally:
            server.terminate()
