"""The W&B workspace and report, built without a server."""

import json
import sys

import pytest
from runs import load_script


class Panels:
    """A stand-in for wandb-workspaces, whose panels are their options."""

    def __getattr__(self, kind):
        return lambda *names, **options: (kind, *names, options)


def test_curves_average_the_seeds_of_a_condition_alone():
    """Mutation: group by the run's name, which differs by none of what a sweep varies."""
    sections = load_script("dashboard").curves(Panels())
    panels = [panel for section in sections.values() for panel in section]
    assert len(panels) > 10
    for _, options in panels:
        assert options["groupby"] == ("Config", "condition", {})


def test_the_dry_run_writes_both(tmp_path, monkeypatch):
    """Needs the `dashboard` extra.

    Mutation: name a metric that the glossary lacks, or look the project up on the server.
    """
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(
        sys,
        "argv",
        ["dashboard.py", "--entity", "me", "--sweep", "a-sweep", "--dry-run", str(tmp_path)],
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
