"""The W&B workspace and report, built without a server; needs the `dashboard` extra."""

import json
import sys

import pytest
from runs import load_script

pytest.importorskip("wandb_workspaces")


def test_the_dry_run_writes_both(tmp_path, monkeypatch):
    """Mutation: name a metric that the glossary lacks, or look the project up on the server."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(
        sys,
        "argv",
        ["dashboard.py", "--entity", "me", "--group", "a-sweep", "--dry-run", str(tmp_path)],
    )
    load_script("dashboard").main()
    workspace, report = (
        json.dumps(json.loads((tmp_path / f"{name}.json").read_text()))
        for name in ("workspace", "report")
    )
    for text in (
        "eval/held_in/kl_ref",
        "loss.value.delta",
        "trust/masked_fraction",
        "trust/kl_old/",
        "images",
    ):
        assert text in workspace and text in report
    assert "a-sweep" in report
