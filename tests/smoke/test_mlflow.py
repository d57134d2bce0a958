"""MLflow by a YAML file alone; needs the `mlflow` extra."""

import pytest
import yaml
from mlflow_server import Server
from runs import train

pytest.importorskip("mlflow")


def test_a_run_is_logged(tmp_path, monkeypatch):
    """Its name, its configuration and its figures, as a server gets them.

    Mutation: log numbers by Lightning's step, or a configuration without Hydra's choices.
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    short = ("debug=smoke", "num_iterations=2", "viewing.every=0", "evaluation.max_prompts=1")
    with Server() as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        result = train(*short, "logger=mlflow", "run_dir=run", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    (created,) = server.seen["create"]
    tags = {tag["key"]: tag["value"] for tag in created["tags"]}
    assert tags["mlflow.runName"] == f"{config['condition']} seed=0"
    batches = server.seen["log-batch"]
    params = {item["key"]: item["value"] for batch in batches for item in batch.get("params", [])}
    assert params["condition"] == config["condition"]
    assert (params["choices/loss"], params["loss/delta"]) == ("dppo", "2e-05")
    metrics = [item for batch in batches for item in batch.get("metrics", [])]
    rewards = [item["step"] for item in metrics if item["key"] == "reward/mean"]
    assert rewards == [1, 2]
    assert "trust/kl_old/0" in {item["key"] for item in metrics}
    assert server.seen["update"][-1]["status"] == "FINISHED"
