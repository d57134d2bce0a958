"""Configurations out of folders: what would run code of whoever made the folder is refused before
anything is built.
"""

import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from runs import CONF, train_as_a_user

from flowrl.cli import evaluate as evaluate_program
from flowrl.errors import UserError
from flowrl.evaluation.subjects import Subject
from flowrl.launch.compose import compose
from flowrl.launch.foreign_targets import check_config

PAYLOAD = "open(r'{marker}', 'w').close()"


class Bomb:
    """Writes a file once it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (PAYLOAD.format(marker=self.marker),)


def write_gadgets(place, marker):
    """The files that the five ways of the report need, each of which writes `marker` where its code
    runs.
    """
    text = PAYLOAD.format(marker=marker)
    torch.save({"x": Bomb(marker)}, place / "bomb.pt")
    np.save(place / "bomb.npy", np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    (place / "hubconf.py").write_text(f"{text}\ndef model(): return 1\n")
    (place / "site").mkdir()
    (place / "site" / "bomb.pth").write_text(f"import sys; {text}\n")
    (place / "auto").mkdir()
    names = '{"AutoConfig": "custom.Config", "AutoModel": "custom.Model"}'
    (place / "auto" / "config.json").write_text(
        '{"model_type": "custom", "auto_map": ' + names + "}"
    )
    (place / "auto" / "custom.py").write_text(
        f"{text}\nfrom transformers import PretrainedConfig\nclass Config(PretrainedConfig): "
        "model_type = 'custom'\n"
    )


def gadgets(place):
    return {
        "torch.load": {"_target_": "torch.load", "f": f"{place}/bomb.pt", "weights_only": False},
        "numpy.load": {"_target_": "numpy.load", "file": f"{place}/bomb.npy", "allow_pickle": True},
        "torch.hub.load": {
            "_target_": "torch.hub.load",
            "repo_or_dir": str(place),
            "model": "model",
            "source": "local",
        },
        "site.addsitedir": {"_target_": "site.addsitedir", "sitedir": f"{place}/site"},
        "transformers.AutoModel": {
            "_target_": "transformers.AutoModel.from_pretrained",
            "pretrained_model_name_or_path": f"{place}/auto",
            "trust_remote_code": True,
        },
    }


GADGETS = (
    "torch.load",
    "numpy.load",
    "torch.hub.load",
    "site.addsitedir",
    "transformers.AutoModel",
)


@pytest.fixture
def traps(tmp_path, monkeypatch):
    """Gadgets by name, and the file that each writes where its code runs."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "ran"
    write_gadgets(tmp_path, marker)
    yield gadgets(tmp_path), marker
    sys.path[:] = [path for path in sys.path if not path.startswith(str(tmp_path))]


def run_folder(place, **changes):
    """The folder of a run with a configuration of its own; only what is read before weights."""
    cfg = compose(["name=somebody", "debug=smoke", f"run_dir={place}", "logger=none"])
    OmegaConf.set_struct(cfg, False)
    for key, value in changes.items():
        cfg[key] = value
    place.mkdir()
    (place / "source.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=False))
    (place / "config.yaml").write_text("{}")
    return place


@pytest.mark.parametrize("name", GADGETS)
def test_a_folder_that_would_run_code_is_refused_by_evaluate(traps, tmp_path, name):
    """The gadget is a live one, and stays unused. Mutation: check after instantiating, or the
    reward alone.

    The refusal names target and folder.
    """
    nodes, marker = traps
    folder = run_folder(tmp_path / "run", reward=nodes[name])
    evaluate = evaluate_program
    with pytest.raises(UserError) as refusal:
        evaluate.configure([Subject.read(str(folder))], [], None)
    assert nodes[name]["_target_"] in str(refusal.value) and str(folder) in str(refusal.value)
    assert "reward._target_" in str(refusal.value) and "trust_folder=true" in str(refusal.value)
    assert not marker.exists()
    cfg = evaluate.configure([Subject.read(str(folder))], ["trust_folder=true"], None)
    with suppress(Exception):  # having run
        instantiate(cfg.reward)
    assert marker.exists()


def test_a_folder_that_would_run_code_is_refused_by_train(traps, tmp_path):
    """Mutation: no check in resume, or one after the loggers."""
    nodes, marker = traps
    folder = run_folder(tmp_path / "run", logger={"mine": nodes["torch.load"]})
    result = train_as_a_user(f"resume={folder}", cwd=tmp_path)
    assert result.returncode == 1 and not marker.exists(), result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (
        str(folder) in line
        and "logger.mine._target_=torch.load" in line
        and "trust_folder=true" in line
    )


REFUSED = (
    "flowrl.launch.errors.os.system",  # through a module's attributes
    "flowrl.rewards.client.os.system",
    "flowrl.rewards.loading.import_module",  # another package's function below a name of ours
    "flowrl.rewards.loading.require",  # functions of ours that import, write or delete
    "flowrl.runs.files.write_whole",
    "flowrl.runs.checkpoint._delete",
    "flowrl.sweep.job.Job",
    "flowrl.launch.run.run",
    "flowrl.rewards.client.Client._send",
    "flowrl.rewards.judge.json.loads",
    "torch.optim.Optimizer.load_state_dict",
    "torch.optim.swa_utils.update_bn",
    "torch.optim.lr_scheduler.LambdaLR",
    "torch.optim.optimizer.os.system",
    "torch.load",
    "lightning.LightningModule.load_from_checkpoint",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.cli.SaveConfigCallback",
    ["torch.load"],
    {},
    "lightning.pytorch.core.saving.pl_load",
    "lightning.pytorch.trainer.trainer.os.system",
    "lightning.fabric.utilities.cloud_io._load",
    "hydra.utils.get_method",
    "hydra.utils.instantiate",
    "builtins.eval",
    "os.system",
    "flowrl",
    "",
    None,
    3,
    "${oc.env:HOME}",
    "${name}",
    "torch.optim.Adam${name}",
)


@pytest.mark.parametrize("target", REFUSED)
@pytest.mark.parametrize("shape", ["node", "list", "partial"])
def test_targets_that_are_refused(target, shape):
    """Wherever they stand. Mutation: trust a prefix, follow attributes, or look at nodes that are
    no lists alone.
    """
    node = {"_target_": target, "_partial_": shape == "partial"}
    cfg = OmegaConf.create({"a": {"b": [[node]] if shape == "list" else node}})
    with pytest.raises(UserError, match="_target_="):
        check_config(cfg, Path("there"), is_trusted=False)
    assert check_config(cfg, Path("there"), is_trusted=True) is cfg


@pytest.mark.parametrize(
    "target",
    [
        "torch.optim.SGD",
        "torch.optim.adamw.AdamW",
        "lightning.Trainer",
        "lightning.pytorch.callbacks.DeviceStatsMonitor",
        "flowrl.rewards.routed.Routed",
        "flowrl.rewards.mixture.Mixture",
        "flowrl.samplers.sde.DanceSDE",
        "flowrl.models.flux1.Flux1",
        "flowrl.callbacks.trackers.wandb_logger",
        "flowrl.prompts.text.text_prompts",
    ],
)
def test_targets_that_are_harmless(target):
    """Mutation: refuse what the project's files do not name, though it is a class of an open
    module.
    """
    check_config(OmegaConf.create({"a": [{"_target_": target}]}), Path("there"), is_trusted=False)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:HF_TOKEN}",
        "${ oc.env : HF_TOKEN}",
        "http://there/${oc.env:HF_TOKEN,none}",
        "${oc.create:'{_target_: os.system}'}",
        "${oc.${name}:HF_TOKEN}",
        "${image_tokens:${oc.env:HF_TOKEN},1}",
    ],
)
def test_resolvers_that_are_refused(value):
    """They read secrets, or make nodes out of text. Mutation: let a nested call pass, or one with
    spaces.
    """
    with pytest.raises(UserError, match="calls the resolver"):
        check_config(OmegaConf.create({"reward": {"url": value}}), Path("there"), is_trusted=False)


@pytest.mark.parametrize(
    "setting", [{"trust_remote_code": True}, {"weights_only": False}, {"allow_pickle": 1}]
)
def test_settings_under_which_loaders_run_code_are_refused(setting, tmp_path):
    """Even of a loader that the project names, whose file need not have them. Mutation: look at
    targets alone.
    """
    (tmp_path / "reward.yaml").write_text("_target_: my.scorer.Scorer")
    mine = OmegaConf.create({"reward": {"_target_": "my.scorer.Scorer"}})
    check_config(mine, Path("there"), is_trusted=False, conf=(CONF, tmp_path))
    with pytest.raises(UserError, match=r"my\.scorer\.Scorer"):
        check_config(mine, Path("there"), is_trusted=False)
    mine.reward.update(setting)
    with pytest.raises(UserError, match="lets a loader run code"):
        check_config(mine, Path("there"), is_trusted=False, conf=(CONF, tmp_path))


def test_what_the_project_composes_is_trusted():
    """Every option of the groups and every recipe. Mutation: forget a group, or refuse the
    project's resolvers.
    """
    names = [f"experiment={path.stem}" for path in sorted((CONF / "experiment").glob("*.yaml"))]
    for group in ("reward", "logger", "model", "trainer"):
        names += [f"{group}={path.stem}" for path in sorted((CONF / group).glob("*.yaml"))]
    assert len(names) > 30
    for name in names:
        cfg = compose(["name=mine", name])
        check_config(cfg, Path("there"), is_trusted=False)


LEAKS = {
    "reward.client.token_env": "HF_TOKEN",
    "reward.url": "http://evil",
    "reward.rewards.x.url": r"http://127.0.0.1\\@evil",
    "data.path": "s3://evil/x",
    "trainer.default_root_dir": "/home/x",
    "logger.csv.save_dir": "${run_dir}/../x",
    "logger.csv.folder": "/home/x",
}


@pytest.mark.parametrize("key", LEAKS)
def test_what_would_be_sent_or_written_elsewhere_is_repeated_by_the_user(key, tmp_path):
    """Mutation: look at hosts alone, take a name with a backslash for this machine, or forget a
    key.
    """
    cfg = OmegaConf.create()
    OmegaConf.update(cfg, key, LEAKS[key], force_add=True)
    with pytest.raises(UserError, match=key.replace(".", r"\.")) as refusal:
        check_config(cfg, tmp_path, is_trusted=False)
    assert f"{key}=VALUE" in str(refusal.value)
    check_config(cfg, tmp_path, is_trusted=False, typed={key})
    name = key.rpartition(".")[2]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({name: LEAKS[key]}))
    check_config(cfg, tmp_path, is_trusted=False, conf=(CONF, tmp_path))


def test_loggers_write_into_the_runs_folder(tmp_path):
    """Mutation: look at save_dir alone."""
    node = {
        "_target_": "lightning.pytorch.loggers.CSVLogger",
        "save_dir": "${run_dir}",
        "name": "csv",
    }
    check_config(OmegaConf.create({"logger": {"x": node}}), tmp_path, is_trusted=False)
    for bad in (
        {"name": "../x"},
        {"version": "/home/x"},
        {"save_dir": "/home/x"},
        {"_args_": ["/home/x"]},
    ):
        with pytest.raises(UserError, match="logger"):
            check_config(
                OmegaConf.create({"logger": {"x": node | bad}}), tmp_path, is_trusted=False
            )
