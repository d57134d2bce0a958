"""Studies read records; these are written by hand, so that every number that comes out is known."""

import json
import re
import shutil
import sys
import textwrap
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import yaml
from PIL import Image

from flowrl.cli import study as script
from flowrl.errors import NotFinite
from flowrl.studies.analysis import conditions
from flowrl.studies.choice import choose
from flowrl.studies.document import BLOCK, fill, page, pieces
from flowrl.studies.figures import draw, figure_names, fingerprint, looks, marker, style
from flowrl.studies.place import Place
from flowrl.studies.plan import ORDER, Planned, merge, read
from flowrl.studies.record import DIVERGED, from_folder, load, thinned, write
from flowrl.studies.tables import edges
from flowrl.sweep.pool import Pool

ROOT = Path(__file__).parents[2]
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


@pytest.fixture
def place(tmp_path):
    (tmp_path / "experiments" / "mine").mkdir(parents=True)
    (tmp_path / "experiments" / "mine" / "sweep.yaml").write_text(
        yaml.safe_dump(SWEEP, sort_keys=False)
    )
    return Place(tmp_path / "experiments", tmp_path / "outputs", tmp_path / "experiments")


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


def test_of_overrides_with_one_key_the_last_stays():
    """Mutation: keep the first, so that a variant cannot change a tuned value."""
    assert merge(["a=1", "b=2"], ["a=3"], ["c=x=y"]) == ("a=3", "b=2", "c=x=y")


def test_a_plan_by_hand(place):
    """Seeds outermost, grids as products, the quick section instead of what it names.

    Mutation: let a method take the other's grid, put seeds inside, or forget the common overrides
    in quick.
    """
    study = place.study("mine")
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
    quick = read("mine", place.plans, is_quick=True)
    assert [stage.num_runs for stage in quick.stages] == [2, 4]
    assert quick.stages[0].runs({})[0].overrides[0] == "num_iterations=4"
    with pytest.raises(ValueError, match=r"metods: no such study \(did you mean 'methods'"):
        place.study("metods")


def test_a_stage_waits_for_what_it_is_tuned_by(place):
    """Mutation: run untuned methods."""
    assert [run.stage for run in place.planned(place.study("mine"))] == ["tune"] * 10
    with pytest.raises(ValueError, match="has tuned no grpo, dppo"):
        place.study("mine").stages[1].runs({})


def test_a_method_that_is_new_to_a_plan_waits_alone(place):
    """What is known of the others stays. Mutation: choose nothing, or list no run, while one method
    is not tuned.
    """
    study = place.study("mine")
    runs = study.stages[0].runs({})
    for i, planned in enumerate(
        run for run in runs if run.method == "dppo" or run.variant == runs[0].variant
    ):
        write_run(place.runs("mine") / str(i), planned)
    chosen = place.tuned(study)
    assert list(chosen) == ["dppo"]
    (place.root / "mine" / "tuned.json").write_text(json.dumps(chosen))
    listed = place.planned(study)
    assert {run.method for run in listed if run.stage == "test"} == {"dppo"}
    assert len([run for run in listed if run.stage == "tune"]) == 10
    found = pieces(
        study, {"runs": list(place.find("mine", listed).values()), "tuned": chosen}
    ).texts
    assert found["mine/chosen/dppo/chosen"] == "lr=2" and "mine/chosen/grpo/chosen" not in found


def test_tuning_takes_the_best_mean_and_no_failed_variant(place):
    """Mutation: take the smallest score, a failed run's score, or choose from half of the runs."""
    study = place.study("mine")
    stage, runs = study.stages[0], run_stage(place, 0)
    records = place.find("mine", runs)
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


def test_a_recorded_run_is_known_without_its_folder(place):
    """So a study goes on after a sitting whose outputs are gone. Mutation: look at folders
    alone.
    """
    finish(place)
    shutil.rmtree(place.root)
    study = place.study("mine")
    assert place.chosen("mine") == {"grpo": ("lr=2", "clip=5"), "dppo": ("lr=2",)}
    planned = place.planned(study)
    assert len(planned) == 14 and len(place.find("mine", planned)) == 14
    elsewhere = Planned("other", "x", "", 0, tuple(reversed(planned[-1].overrides)))
    assert place.find("other", [elsewhere])[elsewhere]["stage"] == "other"
    fresh = Place(place.plans, place.root, place.root)
    assert fresh.find("mine", planned) == {}


def test_the_folders_of_all_studies_are_known(place):
    """A study that shares another's run takes its samples from there. Mutation: look below one
    study.
    """
    runs = run_stage(place, 0)
    write_run(place.runs("yours") / "0", replace(runs[0], overrides=("loss=grpo", "seed=7")))
    found = place.every_folder
    assert len(found) == len(runs) + 1 == len(place.folders("mine")) + 1
    assert found[frozenset({"seed=7", "loss=grpo"})] == place.runs("yours") / "0"


def test_a_run_that_goes_on_has_no_record(place, tmp_path):
    """A stopped one neither, nor one that failed by accident; one that diverged has. Mutation: take
    any folder.
    """
    planned = place.study("mine").stages[0].runs({})[0]
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


def test_the_edge_of_a_grid():
    """Mutation: call a single value an edge."""
    grid = ["lr=1 clip=5", "lr=2 clip=5", "lr=3 clip=5"]
    assert [edges(variant, grid) for variant in grid] == ["lr", "no", "lr"]


def test_every_number_comes_from_the_record(place):
    """Tables by hand; a changed record changes them. Mutation: keep what a block held, or mix
    conditions up.
    """
    results, study = finish(place), place.study("mine")
    own = pieces(study, results)
    found = own.texts
    assert found["mine/main/base model/soft"] == "0.5"
    assert (
        found["mine/main/grpo/soft"] == "0.75"
    )  # 0.5 + 0.0625 for its tuned rate + its seed's gain
    assert found["mine/main/dppo/both"] == "0.562"
    row = "mine/comparisons/dppo against grpo"
    assert found[f"{row}/soft, difference"] == "+0.125"
    assert found[f"{row}/KL, difference"] == "-0.25"
    assert (
        found["mine/chosen/dppo/chosen"] == "lr=2"
        and found["mine/chosen/dppo/at the edge of its grid"] == "no"
    )
    assert "14 of 14 runs, 0 of them failed" in found["mine/status"]
    text = (
        "Gain <!-- begin mine/main/dppo/soft -->9.9<!-- end -->.\n<!-- begin mine/main "
        "-->\nold\n<!-- end -->\n"
    )
    filled = fill(text, {"mine": own})
    assert (
        "Gain <!-- begin mine/main/dppo/soft -->0.875<!-- end -->." in filled
        and "old" not in filled
    )
    assert fill(filled, {"mine": own}) == filled
    results["runs"][-1]["evaluations"][-1][REWARD] = 0.0
    assert fill(filled, {"mine": pieces(study, results)}) != filled
    with pytest.raises(ValueError, match="mine/main/dpo/soft"):
        fill("<!-- begin mine/main/dpo/soft --><!-- end -->", {"mine": own})
    del results["runs"][-1]
    partly = fill("<!-- begin mine/main/dpo/soft --><!-- end -->", {"mine": pieces(study, results)})
    assert (
        "_not run yet_" in partly
        and "**Incomplete:**" in pieces(study, results).texts["mine/status"]
    )


def test_without_a_record_nothing_is_claimed(place):
    """Mutation: leave an old number standing."""
    found = pieces(place.study("mine"), load(place.results("mine")))
    text = fill(
        "<!-- begin mine/main/dppo/soft -->0.9<!-- end --> <!-- begin mine/status --><!-- end -->",
        {"mine": found},
    )
    assert (
        "0.9" not in text
        and "_not run yet_" in text
        and "**Not run yet.** Planned: 14 runs" in text
    )


def test_figures_are_the_same_bytes_from_the_same_record(place, tmp_path):
    """Mutation: let the date or random ids into the files, leave a figure out, or draw every stage
    in each.
    """
    results, study = finish(place), place.study("mine")
    first = [path.read_bytes() for path in draw(study, results, tmp_path / "a")]
    assert [path.read_bytes() for path in draw(study, results, tmp_path / "b")] == first
    assert len(first) == 8 and len(set(first)) == 8
    learning, tuning = (
        (tmp_path / "a" / f"{name}.svg").read_text() for name in ("learning", "tuning")
    )
    assert "lr=2" in tuning and "lr=2" not in learning


def test_a_method_keeps_its_colour():
    """Its variants have markers of their own; where they are too many, or unknown, all are
    numbered.

    Mutation: number by the place in the figure, or give two conditions one look.
    """
    assert (
        looks(["flow_cps", "diffusion_nft"])
        == looks(["flow_cps proxy", "diffusion_nft proxy"])
        == [1, 3]
    )
    numbers = looks(["flow_dppo a", "flow_cps", "flow_dppo b"])
    assert numbers[1] == 1 and style(numbers[0])["color"] == style(numbers[2])["color"]
    assert marker(numbers[0]) != marker(numbers[2]) and style(numbers[0]) != style(numbers[2])
    assert looks([f"flow_dppo {i}" for i in range(12)]) == list(range(12))
    assert looks(["mine", "yours"]) == [0, 1]


@cache
def committed():
    """Every study of the repository with its record, and where they are."""
    place = Place(ROOT / "experiments", ROOT / "outputs" / "none", ROOT / "experiments")
    return place, {name: (place.study(name), load(place.results(name))) for name in ORDER}


@pytest.mark.parametrize("name", ORDER)
def test_figures_are_of_the_record(name):
    """Mutation: collect without rendering, or leave how they are drawn out of the fingerprint."""
    study, results = committed()[1][name]
    has_any = results["runs"] or results.get("simulation")
    for figure in figure_names(study, results) if has_any else []:
        folder = ROOT / "experiments" / name / "figures"
        assert fingerprint(study, results) in (folder / f"{figure}.svg").read_text()
        with Image.open(folder / f"{figure}.png") as image:
            assert image.info["Description"] == fingerprint(study, results)


@pytest.mark.parametrize(
    "page",
    [
        "docs/how-to/recipes.md",
        "experiments/README.md",
        *(f"experiments/{name}/README.md" for name in ORDER),
    ],
)
def test_every_document_is_what_the_records_say(page):
    """Rendering again changes nothing, and no block is one that rendering would pass over.

    Mutation: edit a number in a README, change results.json without rendering, misspell a block's
    study, or begin a line with a quoted cell.
    """
    texts = {name: pieces(*own) for name, own in committed()[1].items()}
    text = (ROOT / page).read_text()
    assert fill(text, texts) == text
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("<!--") / 2 == text.count("-->") / 2
    assert {name.split("/")[0] for name in blocks} <= set(ORDER)
    # A line that begins with a comment is HTML to Markdown, and a link in it is not one.
    assert re.findall(r"^\s*<!-- begin [^>/]+/[^>/]+/.*", text, re.MULTILINE) == []


@pytest.mark.parametrize("name", ORDER)
def test_a_record_is_of_its_plan(name):
    """Runs have their plan's overrides, what is tuned follows from the runs, and a complete study
    shows all samples.

    Mutation: change an override in sweep.yaml, the rule of choice or a chosen variant; or lose a
    shared run's samples.
    """
    place, studies = committed()
    study, results = studies[name]
    planned = {(own.stage, own.method, own.variant, own.seed): own for own in place.planned(study)}
    for run in results["runs"]:
        own = planned[run["stage"], run["method"], run["variant"], run["seed"]]
        assert frozenset(run["overrides"]) == frozenset(own.overrides), own
    assert place.tuned(study) == results.get("tuned", {})
    if results["runs"] and len(results["runs"]) == study.num_runs and study.report.get("compare"):
        text = (ROOT / "experiments" / name / "samples.md").read_text()
        assert re.findall("^## (.*)$", text, re.MULTILINE) == list(
            conditions(results["runs"], study.report["stages"])
        )
    assert page(study, results)


def test_verdicts_quote_no_number_of_their_own():
    """A number in a verdict stands in a block, or in an override's name. Mutation: type one in."""
    for name in ORDER:
        text = (ROOT / "experiments" / name / "README.md").read_text()
        verdict = BLOCK.sub("", text[text.index("## Verdict") :]).replace("SD3.5", "")
        verdict = re.sub(r"`[\w.]+=[\w.-]+`", "", verdict)
        assert not re.search(r"(?<![-\w])\d", verdict), name


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


def test_all_studies_are_not_reproduced_by_accident(monkeypatch):
    """Mutation: let a bare `reproduce` begin half a day of runs."""
    monkeypatch.setattr(sys, "argv", ["study.py", "reproduce"])
    monkeypatch.setattr(script, "run", lambda *_: pytest.fail("runs"))
    with pytest.raises(
        ValueError, match=r"name the studies; all of them .methods, .* take 1. hours"
    ):
        script.main()


def test_recipes_are_the_commands_that_were_measured():
    """Each with the overrides of that method's runs. Mutation: quote another method's score."""
    page = (ROOT / "docs/how-to/recipes.md").read_text()
    rows = re.findall(r"`python train.py (.*?)`.*? begin methods/main/(\w+)/strict", page)
    runs = committed()[1]["methods"][1]["runs"]
    assert len(rows) > 5
    for overrides, method in rows:
        measured = [run for run in runs if run["method"] == method and not run["variant"]]
        assert measured
        for run in measured:
            assert set(overrides.split()) <= set(run["overrides"]), method
