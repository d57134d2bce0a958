"""A finished run that is shared, whose configuration tells secrets and places."""

import json
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from PIL import Image
from runs import composed

from flowrl.sharing.folder import examine, write_folder

HOME = Path.home()
LORA = "pytorch_lora_weights.safetensors"
NUMBERS = {"reward": 0.5, "strict": 0.25, "diversity": 0.2, "missing": 0.0, "families": {"a": 1}}


def write_run(folder, policy):
    """Write the folder of a finished run with a policy's LoRA."""
    plain = OmegaConf.to_container(composed("debug=smoke"), resolve=True)
    plain |= {
        "run_dir": str(folder),
        "logger": {"wandb": {"entity": "acme", "folder": str(folder)}},
        "embeddings": {"folder": f"{HOME}/cache"},
        "http": {"url": "http://scorer.acme.internal:8000/score", "token": "abc"},
    }
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "images" / "000002.png")
    (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    after = NUMBERS | {"strict": 0.75}
    summary = {
        "status": "finished",
        "iterations": 2,
        "images": 16,
        "eval": {
            "before": NUMBERS | {"held_out": NUMBERS},
            "after": after | {"held_out": NUMBERS | {"strict": 0.125}},
        },
        "seconds": 4.9,
        "versions": {"torch": "2.9.0"},
        "git_revision": "0123456789abcdef",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    change = {"key": "lr", "before": "1", "after": f"{HOME}/x|y", "iteration": 1}
    (folder / "provenance.json").write_text(json.dumps({"changes": [change]}))
    policy.tuning.save(policy.model.pipeline, folder / "lora")


def write(run, out, evaluation=None, repository="me/lora", revision=None):
    shared = examine(run, evaluation)
    write_folder(shared, out, repository, revision)
    return (out / "README.md").read_text()


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
