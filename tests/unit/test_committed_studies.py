"""The repository's studies: plans, records, documents and figures agree."""

import re
from functools import cache

import pytest
from PIL import Image
from runs import ROOT

from flowrl.studies.analysis import conditions
from flowrl.studies.document import BLOCK, fill, page, pieces
from flowrl.studies.figures import figure_names, fingerprint
from flowrl.studies.place import Place
from flowrl.studies.plan import ORDER
from flowrl.studies.record import load


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
