"""A real run goes to a stand-in of the hub, by the command as a user calls it, and is listed."""

import io
import json
import os
import subprocess
import sys

import torch
import yaml
from hub import Hub
from runs import ROOT
from safetensors.torch import load, load_file

from flowrl.cli import runs as listing

LORA = "pytorch_lora_weights.safetensors"


def push(run, url, *words):
    """The command in a process of its own, whose library takes `url` for the hub."""
    command = [sys.executable, str(ROOT / "scripts" / "push_run.py"), str(run), "me/lora", *words]
    hub = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    env = os.environ | hub | {"HF_TOKEN": "hf_mine", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_a_finished_run_arrives(finished_run):
    """Mutation: upload the trained weights, or a card without its picture."""
    hub = Hub()
    with hub.start() as url:
        done = push(finished_run, url)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{url}/me/lora"
        hub.refuse["/api/"] = 403
        refused = push(finished_run, url)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "the token may not write there (403)" in refused.stderr
    files = hub.files["me/lora", "main"]
    assert files.keys() == {"README.md", "config.yaml", "images/before_and_after.png", LORA}
    mine, theirs = load_file(finished_run / "lora" / LORA), load(files[LORA])
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    head = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert head["library_name"] == "diffusers" and "flow-dppo" in head["tags"]
    for content in files.values():
        assert str(finished_run).encode() not in content


def test_a_finished_run_is_listed(finished_run, call):
    """Mutation: read `latest`, which is a link, as a run of its own."""
    outputs = finished_run.parents[1]
    status, out, _ = call(listing, outputs, "--json")
    assert status == 0
    [row] = json.load(io.StringIO(out))
    assert (row["state"], row["iterations"], row["num_iterations"]) == ("finished", 4, 4)
    assert row["method"] == "Flow-DPPO" and row["headline"] == "strict"
    assert 0 <= row["before"] <= 1 and 0 <= row["after"] <= 1
