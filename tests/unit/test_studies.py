"""Runs of studies are planned, chosen from and found; their records are written by hand, so that
every number that comes out is known.
"""

import json
import shutil
import sys
import textwrap
from dataclasses import replace
from functools import partial

import pytest
import yaml
from study_by_hand import KL, REWARD, SWEEP, finish, run_stage, write_run

from flowrl.cli import study as script
from flowrl.errors import NotFinite
from flowrl.studies.choice import choose
from flowrl.studies.document import pieces
from flowrl.studies.place import Place
from flowrl.studies.plan import Planned, merge, read
from flowrl.studies.record import DIVERGED, from_folder, load, thinned
from flowrl.sweep.pool import Pool


def test_of_overrides_with_one_key_the_last_stays():
    """Mutation: keep the first, so that a variant cannot change a tuned value."""
    assert merge(["a=1", "b=2"], ["a=3"], ["c=x=y"]) == ("a=3", "b=2", "c=x=y")


def test_a_plan_by_hand(study_place):
    """Seeds outermost, grids as products, the quick section instead of what it names.

    Mutation: let a method take the other's grid, put seeds inside, or forget the common overrides
    in quick.
    """
    study = study_place.study("mine")
    assert [stage.num_runs for stage in study.stages] == [10, 4] and study.num_runs == 14
    assert study.hours == pytest.approx((10 * 30 + 4 * 60) / 7200)
    runs = study.stages[0].runs({})
    assert [(run.seed, run.condition) for run in runs[:5]] == [
        *((100, "grpo lr=1 clip=5"), (100, "grpo lr=2 clip=5")),
        *((100, "dppo lr=1"), (100, "dppo lr=2"), (100, "dppo lr=3")),
    ]
    assert runs[1].overrides == (
        "num_iterations=40",
        "logger=none",
        "loss=grpo",
        "lr=2",
        "clip=5",
        "seed=100",
    )
    quick = read("mine", study_place.plans, is_quick=True)
    assert [stage.num_runs for stage in quick.stages] == [2, 4]
    assert quick.stages[0].runs({})[0].overrides[0] == "num_iterations=4"
    with pytest.raises(ValueError, match=r"metods: no such study \(did you mean 'methods'"):
        study_place.study("metods")


def test_a_stage_waits_for_what_it_is_tuned_by(study_place):
    """Mutation: run untuned methods."""
    assert [run.stage for run in study_place.planned(study_place.study("mine"))] == ["tune"] * 10
    with pytest.raises(ValueError, match="has tuned no grpo, dppo"):
        study_place.study("mine").stages[1].runs({})


def test_a_method_that_is_new_to_a_plan_waits_alone(study_place):
    """What is known of the others stays. Mutation: choose nothing, or list no run, while one method
    is not tuned.
    """
    study = study_place.study("mine")
    runs = study.stages[0].runs({})
    for i, planned in enumerate(
        run for run in runs if run.method == "dppo" or run.variant == runs[0].variant
    ):
        write_run(study_place.runs("mine") / str(i), planned)
    chosen = study_place.tuned(study)
    assert list(chosen) == ["dppo"]
    (study_place.root / "mine" / "tuned.json").write_text(json.dumps(chosen))
    listed = study_place.planned(study)
    assert {run.method for run in listed if run.stage == "test"} == {"dppo"}
    assert len([run for run in listed if run.stage == "tune"]) == 10
    found = pieces(
        study, {"runs": list(study_place.find("mine", listed).values()), "tuned": chosen}
    ).texts
    assert found["mine/chosen/dppo/chosen"] == "lr=2" and "mine/chosen/grpo/chosen" not in found


def test_tuning_takes_the_best_mean_and_no_failed_variant(study_place):
    """Mutation: take the smallest score, a failed run's score, or choose from half of the runs."""
    study = study_place.study("mine")
    stage, runs = study.stages[0], run_stage(study_place, 0)
    records = study_place.find("mine", runs)
    chosen = choose(stage, runs, records)
    assert {method: own["variant"] for method, own in chosen.items()} == {
        "grpo": "lr=2 clip=5",
        "dppo": "lr=2",
    }
    assert chosen["dppo"]["score"] == 0.6875 and chosen["dppo"]["overrides"] == ["lr=2"]
    failed = next(run for run in runs if run.condition == "dppo lr=2")
    records[failed] = records[failed] | {"status": "failed"}
    assert choose(stage, runs, records)["dppo"]["variant"] == "lr=1"  # of two equals the first
    del records[failed]
    with pytest.raises(ValueError, match="not over"):
        choose(stage, runs, records)


def test_a_recorded_run_is_known_without_its_folder(study_place):
    """So a study goes on after a sitting whose outputs are gone. Mutation: look at folders
    alone.
    """
    finish(study_place)
    shutil.rmtree(study_place.root)
    study = study_place.study("mine")
    assert study_place.chosen("mine") == {"grpo": ("lr=2", "clip=5"), "dppo": ("lr=2",)}
    planned = study_place.planned(study)
    assert len(planned) == 14 and len(study_place.find("mine", planned)) == 14
    elsewhere = Planned("other", "x", "", 0, tuple(reversed(planned[-1].overrides)))
    assert study_place.find("other", [elsewhere])[elsewhere]["stage"] == "other"
    fresh = Place(study_place.plans, study_place.root, study_place.root)
    assert fresh.find("mine", planned) == {}


def test_the_folders_of_all_studies_are_known(study_place):
    """A study that shares another's run takes its samples from there. Mutation: look below one
    study.
    """
    runs = run_stage(study_place, 0)
    write_run(study_place.runs("yours") / "0", replace(runs[0], overrides=("loss=grpo", "seed=7")))
    found = study_place.every_folder
    assert len(found) == len(runs) + 1 == len(study_place.folders("mine")) + 1
    assert found[frozenset({"seed=7", "loss=grpo"})] == study_place.runs("yours") / "0"


def test_a_run_that_goes_on_has_no_record(study_place, tmp_path):
    """A stopped one neither, nor one that failed by accident; one that diverged has. Mutation: take
    any folder.
    """
    planned = study_place.study("mine").stages[0].runs({})[0]
    write_run(tmp_path / "a", planned, status="stopped")
    write_run(tmp_path / "b", planned, status="failed")
    assert (
        from_folder(planned, tmp_path / "a") is None
        and from_folder(planned, tmp_path / "b") is None
    )
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    (tmp_path / "b" / "summary.json").write_text(json.dumps(summary | {"error": DIVERGED}))
    kept = from_folder(planned, tmp_path / "b")
    assert NotFinite.__name__ == DIVERGED
    assert kept["status"] == "failed" and kept["evaluations"][1] == {
        "iteration": 20,
        REWARD: 0.5,
        KL: 0.125,
    }
    assert (kept["commit"], kept["device"], kept["seed"]) == ("abc", "a processor", 100)
    (tmp_path / "a" / "summary.json").unlink()
    assert from_folder(planned, tmp_path / "a") is None


def test_curves_are_thinned_to_means():
    """Mutation: take every n-th value."""
    assert thinned([1.0, 3.0] * 20) == [2.0] * 20
    assert thinned([0.5, 0.25]) == [0.5, 0.25] and thinned([]) == []


STAND_IN = """
    import json, pathlib, sys
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    folder, ahead = pathlib.Path(given["run_dir"]), 0.125 if given["loss"] == "dppo" else 0.0
    (folder / "config.yaml").write_text("seed: " + given["seed"])
    rows = f"1,0.5,0.0\\n40,{0.625 + ahead},{0.5 - ahead}\\n"
    (folder / "metrics.csv").write_text(f"iteration,{REWARD},{KL}\\n{rows}")
    summary = {"status": "finished", "iterations": 40, "images": 9, "seconds": 1.0, "versions": {}}
    (folder / "summary.json").write_text(json.dumps(summary))
"""


def test_the_script_runs_a_study_from_nothing(tmp_path, monkeypatch, capsys):
    """Both stages with a stand-in for train.py, beside the record; the second time nothing is left
    to run.

    Mutation: skip the second stage, write into experiments/, run what is over, or take no option
    between the words.
    """
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(textwrap.dedent(STAND_IN).replace("{REWARD}", REWARD).replace("{KL}", KL))
    (tmp_path / "experiments" / "mine").mkdir(parents=True)
    plan = tmp_path / "experiments" / "mine" / "sweep.yaml"
    plan.write_text(yaml.safe_dump(SWEEP | {"common": ["num_threads=1"]}, sort_keys=False))
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "PLANS", tmp_path / "experiments")
    monkeypatch.setattr(script, "flowrl_commit", lambda: None)
    monkeypatch.setattr(script, "Pool", partial(Pool, script=stand_in))
    monkeypatch.setattr(sys, "argv", ["study.py", "reproduce", "mine"])
    script.main()
    out = tmp_path / "outputs" / "reproduce" / "unknown" / "mine"
    assert "10 of 10 runs" in capsys.readouterr().out
    assert len(load(out / "results.json")["runs"]) == 14
    assert "+0.125" in (out / "results.md").read_text()
    assert (out / "figures" / "frontier.svg").is_file()
    assert [path.name for path in plan.parent.iterdir()] == ["sweep.yaml"]
    script.main()
    assert "at a time" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["study.py", "plan", "--quick", "mine"])
    script.main()
    assert "0 are over" in capsys.readouterr().out


def test_a_stage_may_be_run_alone(study_place, monkeypatch):
    """Mutation: run the others too, or none under a name that is misspelt."""
    swept = []
    monkeypatch.setattr(script, "sweep", lambda where, study, runs, *_: swept.append(runs[0].stage))
    study = study_place.study("mine")
    finish(study_place)
    last = study.stages[-1].name
    script.run(study_place, study, 1, False, [last])
    assert swept == [last]
    names = ", ".join(stage.name for stage in study.stages)
    with pytest.raises(ValueError, match=f"--stage tets: mine has the stages {names}"):
        script.run(study_place, study, 1, False, ["tets"])


def test_all_studies_are_not_reproduced_by_accident(monkeypatch):
    """Mutation: let a bare `reproduce` begin half a day of runs."""
    monkeypatch.setattr(sys, "argv", ["study.py", "reproduce"])
    monkeypatch.setattr(script, "run", lambda *_: pytest.fail("runs"))
    with pytest.raises(
        ValueError, match=r"name the studies; all of them .methods, .* take .. hours"
    ):
        script.main()
