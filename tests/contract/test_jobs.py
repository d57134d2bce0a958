"""A sweep's jobs run what `--cfg job` shows for them. The script is a user's own: it writes down
what it is given.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from flowrl.runs.command_line import override

ROOT = Path(__file__).parents[2]
SCRIPT = """
    import json, os, pathlib, sys
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from flowrl.launch.compose import register_resolvers
    from flowrl.launch.errors import one_line_errors
    from hydra_plugins.flowrl_pool import pool_launcher

    pool_launcher.count_gpus = lambda: 0
    register_resolvers()
    OmegaConf.register_new_resolver("mine", lambda text: f"my {text}")

    @hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name=CONFIG_NAME)
    def main(cfg):
        config = HydraConfig.get()
        if config.mode == RunMode.MULTIRUN:  # under a launcher that calls the task itself
            from flowrl.launch.run import run_job
            return run_job(cfg)
        folder = pathlib.Path(config.runtime.output_dir)
        if cfg.resume:
            (folder / "resumed").touch()
        else:
            text = OmegaConf.to_yaml(cfg, resolve=True)
            (folder / "config.yaml").write_text(text, encoding="utf-8")
        seen = {"directory": os.getcwd(), "script": sys.argv[0], "mine": os.environ.get("MINE")}
        (folder / "seen.json").write_text(json.dumps(seen))
        if not os.path.exists(f"fail{cfg.seed}"):
            (folder / "summary.json").write_text(json.dumps({"status": "finished", "eval": {}}))
        else:
            sys.exit(3)

    if __name__ == "__main__":
        sys.exit(one_line_errors(main))
"""
FILES = {
    "DIR/experiment/mine.yaml": "# @package _global_\nnum_iterations: 2\n",
    "conf/small.yaml": """\
        seed: 0
        resume: null
        run_dir: null
        num_threads: 1
        num_iterations: 3
        objective: x
        trainer: {devices: 1}
        label: ${hydra:job.num}-${hydra:job.override_dirname}-${mine:own}
        price: \\${5}
        hydra:
          output_subdir: null
          job: {config: {override_dirname: {exclude_keys: [run_dir, note]}}}
        defaults: [{override hydra/launcher: pool}]
        """,
    "conf/hydra/launcher/pool.yaml": (ROOT / "conf/hydra/launcher/pool.yaml").read_text(),
}
FLAGS = {
    "config-dir": ["--config-dir", "DIR", "experiment=mine"],
    "searchpath": ["hydra.searchpath=[FOLDER]", "experiment=mine", "loss=grpo", "+extra='a, b'"],
    "config-path": ["--config-path", "conf", "--config-name", "small", "+note=${seed}"],
}


@pytest.fixture
def place(tmp_path):
    """A folder with characters that Hydra's grammar and shells take for their own."""
    place = tmp_path / "my project (copy) é #1, a=b & [c] 'd' ~e !f^"
    for name, text in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(textwrap.dedent(text))
    write_script(place / "mine.py")
    return place


def write_script(path, config_path=str(ROOT / "conf"), config_name="config"):
    text = (
        textwrap.dedent(SCRIPT)
        .replace("CONFIG_PATH", repr(config_path))
        .replace("CONFIG_NAME", repr(config_name))
    )
    path.write_text(text)


def call(*arguments, cwd, script="mine.py"):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, script, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def shown(*arguments, cwd, **kwargs):
    """What `--cfg job` shows."""
    result = call("--cfg", "job", "--resolve", *arguments, cwd=cwd, **kwargs)
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def ran(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def unlabelled(config):
    """A configuration without what a sweep fills in for trackers, and what follows from it."""
    for key in ("name", "group"):
        config.get("logger", {}).get("wandb", {}).pop(key, None)
    labels = ("condition", "sweep", "choices")
    return {key: value for key, value in config.items() if key not in labels}


def seen(folder):
    """What a job saw of its process."""
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize("flags", FLAGS)
def test_a_job_runs_what_the_sweep_composed(flags, place):
    """For each flag of Hydra's command line that composition depends on.

    Mutation: start jobs by their overrides alone, or compose in the job's process without one of
    the flags.
    """
    arguments = [argument.replace("FOLDER", f'"file://{place}/DIR"') for argument in FLAGS[flags]]
    result = call("-m", *arguments, "num_threads=1", "seed=0,1", "hydra.sweep.dir=sweep", cwd=place)
    assert result.returncode == 0, result.stderr
    for seed in (0, 1):
        job = place / "sweep" / str(seed)
        own = [
            "num_threads=1",
            f"seed={seed}",
            f"hydra.job.num={seed}",
            override("run_dir", str(job)),
        ]
        assert unlabelled(ran(job)) == unlabelled(shown(*arguments, *own, cwd=place))
        assert ran(job)["num_iterations"] == (3 if flags == "config-path" else 2)


def test_hydras_own_overrides_reach_the_jobs(place):
    """The folders' names, environment and working directory; a relative path means the sweep's
    directory, or a job's.

    Mutation: number the folders, or leave Hydra's part of the configuration out of the job's file.
    """
    hydra = [
        "hydra.sweep.subdir=seed-${seed}/${hydra:job.num}",
        "hydra.job.chdir=true",
        "+hydra.job.env_set.MINE=yes",
    ]
    result = call("-m", *hydra, "seed=3,4", "hydra.sweep.dir=sweep", cwd=place)
    assert result.returncode == 0, result.stderr
    for number, seed in enumerate((3, 4)):
        job = place / "sweep" / f"seed-{seed}" / str(number)
        assert ran(job)["seed"] == seed
        assert seen(job) == {"directory": str(job), "script": str(place / "mine.py"), "mine": "yes"}
    one_folder = call("-m", "hydra.sweep.subdir=x", "seed=3,4", "hydra.sweep.dir=other", cwd=place)
    assert (
        one_folder.returncode == 1
        and "hydra.sweep.subdir: two jobs would write to" in one_folder.stderr
    )


def test_a_sweep_is_resumed_as_it_was_composed(place):
    """From another directory, without the flags, after its files were changed, by the printed
    command.

    Job 0 has failed after it began, job 1 has begun and ended well, job 2 was never started.
    Mutation: compose again, print the folder without quotes, or start in the directory of the
    second command.
    """
    (place / "fail0").touch()
    write_script(place / "mine.py", config_path=None, config_name=None)
    arguments = ["--config-dir", "conf", "--config-name", "small", "num_threads=1", "seed=0,1,2"]
    result = call("-m", *arguments, "hydra.sweep.dir=sweep", cwd=place)
    assert (
        result.returncode == 1
        and "1 of 3 jobs did not finish: job 0 failed exit status 3" in result.stderr
    )
    sweep = place / "sweep"
    for path in (sweep / "2").iterdir():
        if path.name != "job.yaml":
            path.unlink()
    before = [seen(sweep / number) for number in "01"]
    (place / "fail0").unlink()
    (place / "conf" / "small.yaml").unlink()
    printed = re.search(r"`(\S*python\S* .*?)` runs what is missing", result.stderr)[1]
    elsewhere = place.parent / "elsewhere"
    elsewhere.mkdir()
    command = shlex.split(printed)[2:]
    other = call(*command, cwd=elsewhere, script=ROOT / "train.py")
    assert other.returncode == 1 and f"its jobs run {place / 'mine.py'}" in other.stderr
    again = call(*command, "++trust_folder=True", cwd=elsewhere, script=ROOT / "train.py")
    assert again.returncode == 0, again.stderr
    assert "2 of 3 jobs to run" in again.stdout
    assert not list(elsewhere.iterdir())  # no sweep's folder of its own
    assert (sweep / "0" / "resumed").exists() and not (sweep / "1" / "resumed").exists()
    assert ran(sweep / "2")["label"] == "2-num_threads=1,seed=2-my own"
    assert ran(sweep / "2")["num_iterations"] == 3
    assert [seen(sweep / number) for number in "012"] == [*before, before[0]]
    assert before[0]["directory"] == str(place)


def test_a_launcher_that_calls_the_task_runs_the_same(place):
    """As Slurm's, Ray's and submitit's do in their workers: here Hydra's own, which needs no
    package.

    Mutation: call FlowRL's train.py for another script's job, or compose the job from its
    overrides.
    """
    arguments = ["--config-path", "conf", "--config-name", "small", "+note=x"]
    result = call(
        "-m", *arguments, "hydra/launcher=basic", "seed=1", "hydra.sweep.dir=sweep", cwd=place
    )
    assert result.returncode == 0, result.stderr
    job = place / "sweep" / "0"
    own = ["seed=1", "hydra.job.num=0", override("run_dir", str(job))]
    assert unlabelled(ran(job)) == unlabelled(shown(*arguments, *own, cwd=place))
    assert seen(job) == {"directory": str(place), "script": str(place / "mine.py"), "mine": None}
    assert json.loads((job / "job.json").read_text())["state"] == "finished"
