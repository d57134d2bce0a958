"""Folders of sweeps and jobs that others made: only values and options are taken from them."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from runs import CONF

from flowrl.errors import UserError
from flowrl.launch.compose import compose
from flowrl.launch.composed import HEAD
from flowrl.launch.foreign_jobs import check_job, check_overrides, check_sweep, continue_command
from flowrl.sweep.plan import Sweep


@pytest.mark.parametrize(
    "override",
    [
        "--config-dir=/evil",
        "hydra.searchpath=[/evil]",
        "+hydra/launcher=mine",
        "+callbacks.x={_target_: os.system}",
        "reward._target_=os.system",
        "trust_folder=true",
        "++reward.url=${oc.env:HF_TOKEN}",
        "reward.url=http://evil",
        "++reward={client: {token_env: HF_TOKEN}}",
        "reward=../../evil/reward",
        "+experiment=[/evil/x]",
        "++trust_folder=True",
        "+reward@hydra.job=remote",
        "seed=0,1",
    ],
)
def test_a_sweeps_folder_holds_values_and_options_alone(override):
    """Mutation: start its jobs with whatever stands in its list."""
    check_overrides(
        ["seed=0", "reward=ocr", "loss.delta=1e-6", "+experiment=x", "~logger"], Path("there")
    )
    with pytest.raises(UserError, match="trust_folder=true"):
        check_overrides(["seed=0", override], Path("there"))


def job_folder(place, *, text=None, **hydra):
    """A job's folder with a file as FlowRL writes it, but for Hydra's settings or the whole
    text.
    """
    place.mkdir()
    settings = {
        "run": {"dir": str(place)},
        "job": {"name": "train", "chdir": None, "num": 0, "id": "0"},
    } | hydra
    (place / "job.yaml").write_text(text or HEAD + yaml.safe_dump({"seed": 0, "hydra": settings}))
    return place


JOB = {"name": "train", "num": 0}
OWN_LIST = HEAD + "seed: 0\n"
FAULTY = {
    "another default": {"text": OWN_LIST.replace("- _self_", "- _self_\n- evil")},
    "a default at the end": {"text": OWN_LIST.replace("seed", "- evil\nseed")},
    "a package": {"text": "# @package hydra.job\n" + OWN_LIST},
    "searchpath": {"searchpath": ["/evil"]},
    "env_set": {"job": JOB | {"env_set": {"GIT_CONFIG_COUNT": "1"}}},
    "env_copy": {"job": JOB | {"env_copy": ["HF_TOKEN"]}},
    "callbacks": {"callbacks": {"x": {"_target_": "lightning.Trainer"}}},
    "launcher": {"launcher": {"slots": 1}},
    "chdir": {"job": JOB | {"chdir": True}},
    "run.dir": {"run": {"dir": "/somewhere/else"}},
    "name": {"job": JOB | {"name": "../x"}},
    "output_subdir": {"output_subdir": "/x"},
    "handler": {
        "job_logging": {"handlers": {"x": {"class": "logging.os.system", "command": "true"}}}
    },
    "log file": {
        "job_logging": {"handlers": {"x": {"class": "logging.FileHandler", "filename": "/x"}}}
    },
    "a list": {"text": "[1, 2]"},
    "empty": {"text": "\n"},
    "damaged": {"text": "a: ]"},
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_jobs_file_holds_what_flowrl_writes(name, tmp_path):
    """Hydra would compose from what it lists, set variables, and write there. Mutation: drop one of
    the checks.
    """
    check_job(job_folder(tmp_path / "good"), (CONF,))
    with pytest.raises(UserError, match=str(tmp_path / "bad")):
        check_job(job_folder(tmp_path / "bad", **FAULTY[name]), (CONF,))


def test_a_folder_beside_a_jobs_file_does_not_stand_for_hydras(tmp_path):
    """FOLDER/hydra/config.yaml comes before Hydra's own. Mutation: look at job.yaml alone."""
    folder = job_folder(tmp_path / "job")
    (folder / "hydra").mkdir()
    with pytest.raises(UserError, match="the folder hydra beside it"):
        check_job(folder, (CONF,))


def test_a_job_keeps_its_value_so_that_another_one_typed_does_not_vouch_for_it(tmp_path):
    """Mutation: let the key alone count."""
    folder = job_folder(tmp_path / "job")
    with (folder / "job.yaml").open("a") as file:
        file.write("reward: {url: 'http://evil'}\n")
    check_job(folder, (CONF,), ["reward.url=http://evil"])
    with pytest.raises(UserError, match=r"reward\.url=http://evil"):
        check_job(folder, (CONF,), ["reward.url=http://mine"])


def test_the_directory_of_a_sweeps_jobs(tmp_path, monkeypatch):
    """Another one than this process's is taken where nothing there is looked up. Mutation: take
    any.
    """
    monkeypatch.setenv("PYTHONPATH", "/x")
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    folder, script = tmp_path / "project" / "sweep", Path("/mine.py")
    (folder / "0").mkdir(parents=True)
    check_sweep(folder, Sweep(script, tmp_path / "project", ()), script)
    for bad in (folder, folder / "0", Path("relative")):
        with pytest.raises(UserError, match="comes with it"):
            check_sweep(folder, Sweep(script, bad, ()), script)
    monkeypatch.setenv("PYTHONPATH", "/x:")
    check_sweep(folder, Sweep(script, Path.cwd(), ()), script)
    with pytest.raises(UserError, match="PYTHONPATH"):
        check_sweep(folder, Sweep(script, tmp_path / "project", ()), script)
    (tmp_path / "project" / "wandb").mkdir()
    (tmp_path / "project" / "wandb" / "settings").touch()
    with pytest.raises(UserError, match="wandb/settings"):
        check_sweep(folder, Sweep(script, tmp_path / "project", ()), script)


@pytest.mark.parametrize(
    ("url", "is_trusted"), [("http://127.0.0.1:8000", False), ("http://judge:8000", True)]
)
def test_the_printed_command_continues_ones_own_run(url, is_trusted, tmp_path):
    """What a user composed is trusted in the command that FlowRL prints, and only where it has to
    be.

    Mutation: print a command that is then refused, or trust every folder.
    """
    cfg = compose(["name=test", "run_dir=run", "reward=remote", f"reward.url={url}"])
    (tmp_path / "source.yaml").write_text(OmegaConf.to_yaml(cfg))
    hydra = OmegaConf.create({"runtime": {"config_sources": []}, "overrides": {"hydra": []}})
    told = continue_command(tmp_path, [tmp_path], hydra)
    assert told.endswith(" ++trust_folder=true") == is_trusted and "resume=" in told
