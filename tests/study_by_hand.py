"""A study by hand: its plan, and run folders with outcomes that are known."""

import json

import yaml
from PIL import Image

from flowrl.studies.choice import choose
from flowrl.studies.place import Place
from flowrl.studies.record import load, write

REWARD, KL = "eval/held_in/part/soft", "eval/held_in/kl_ref"
SWEEP = {
    "common": ["num_iterations=40", "logger=none"],
    "stages": {
        "tune": {
            "chooses": REWARD,
            "seeds": [100, 101],
            "seconds": 30,
            "methods": {"grpo": ["loss=grpo"], "dppo": ["loss=dppo"]},
            "grid": {"grpo": {"lr": [1, 2], "clip": [5]}, "dppo": {"lr": [1, 2, 3]}},
        },
        "test": {
            "tuned": "mine",
            "seeds": [0, 1],
            "seconds": 60,
            "methods": {"grpo": ["loss=grpo"], "dppo": ["loss=dppo"]},
        },
    },
    "report": {
        "stages": ["test"],
        "rewards": ["soft"],
        "kl": "KL",
        "equal": [{"of": "KL", "at": "soft"}, {"of": "both", "at": "soft"}],
        "metrics": {"soft": REWARD, "KL": KL, "both": [REWARD, KL]},
        "compare": [["dppo", "grpo"]],
        "differences": ["KL"],
        "figures": {
            "frontier": {"kind": "paths", "x": "KL", "y": "soft"},
            "learning": {"kind": "curves", "y": "soft"},
            "means": {"kind": "dots", "metrics": ["soft", "KL"]},
            "tuning": {"kind": "curves", "y": "soft", "stages": ["tune"]},
        },
    },
    "quick": {
        "common": ["num_iterations=4"],
        "stages": {"tune": {"seeds": [100], "grid": {"grpo": {"lr": [1]}, "dppo": {"lr": [1]}}}},
    },
}
SEED_GAIN = {0: 0.125, 1: 0.25, 100: 0.0, 101: 0.0}


def outcome(planned):
    """Soft rises from 0.5; at the end dppo is 0.125 ahead of grpo at half the KL. In tuning a rate
    of 2 is best.
    """
    rate = next((int(own.split("=")[1]) for own in planned.overrides if own.startswith("lr=")), 0)
    gain = (
        SEED_GAIN[planned.seed]
        + (0.125 if planned.method == "dppo" else 0.0)
        + (0.0625 if rate == 2 else 0.0)
    )
    kl = 0.25 if planned.method == "dppo" else 0.5
    return [(0, 0.5, 0.0), (20, 0.5 + gain / 2, kl / 4), (40, 0.5 + gain, kl)]


def write_run(folder, planned, status="finished"):
    """A run's folder as train.py and the sweep leave it."""
    (folder / "images").mkdir(parents=True)
    config = {"seed": planned.seed, "viewing": {"every": 20}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = {max(iteration, 1): f"{soft},{kl}" for iteration, soft, kl in outcome(planned)}
    lines = [f"{i},{i / 40},{rows.get(i, ',')}" for i in range(1, 41)]
    (folder / "metrics.csv").write_text(
        "\n".join([f"iteration,reward/mean,{REWARD},{KL}", *lines, ""])
    )
    versions = {"torch": "2.8.0"}
    summary = {
        "status": status,
        "iterations": 40,
        "images": 11520,
        "seconds": 60.0,
        "versions": versions,
    }
    (folder / "summary.json").write_text(
        json.dumps(summary | {"git_revision": "abc", "device": "a processor"})
    )
    (folder / "job.json").write_text(
        json.dumps({"overrides": planned.overrides, "number": 0, "seconds": 1.0})
    )
    Image.new("RGB", (4, 4)).save(folder / "images" / "000040.png")


def place_of(folder):
    """The places of one study, `mine`, below a folder."""
    (folder / "experiments" / "mine").mkdir(parents=True)
    (folder / "experiments" / "mine" / "sweep.yaml").write_text(
        yaml.safe_dump(SWEEP, sort_keys=False)
    )
    return Place(folder / "experiments", folder / "outputs", folder / "experiments")


def run_stage(place, number):
    """Pretend that the stage was run; returns its runs."""
    study = place.study("mine")
    stage = study.stages[number]
    runs = stage.runs(place.chosen(stage.tuned) if stage.tuned else {})
    for i, planned in enumerate(runs):
        write_run(place.runs("mine") / f"{number}{i}", planned)
    return runs


def finish(place):
    """Both stages, the choice between them, and the record of all."""
    study = place.study("mine")
    runs = run_stage(place, 0)
    chosen = choose(study.stages[0], runs, place.find("mine", runs))
    (place.root / "mine" / "tuned.json").write_text(json.dumps(chosen))
    run_stage(place, 1)
    found = place.find("mine", place.planned(study))
    write(
        place.results("mine"),
        {"study": "mine", "tuned": place.tuned(study), "runs": list(found.values())},
    )
    return load(place.results("mine"))
