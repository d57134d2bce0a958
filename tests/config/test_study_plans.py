"""Every run of every study is one that train.py takes."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from runs import CONF, ROOT

from flowrl.launch.checks import check_rules
from flowrl.launch.compose import register_resolvers
from flowrl.launch.scores import check_parts
from flowrl.launch.validate import validate
from flowrl.runs.glossary import check
from flowrl.studies.plan import ORDER, read
from flowrl.studies.record import names_of
from flowrl.studies.tables import sides

EXPERIMENTS = ROOT / "experiments"


def test_every_folder_is_a_study():
    """Mutation: forget a study in ORDER."""
    assert {path.name for path in EXPERIMENTS.iterdir() if path.is_dir()} == set(ORDER)


def first_runs(name, is_quick):
    """The first seed's runs, tuned by the last variant of the grid; of a tuning stage that variant
    alone.
    """
    for stage in read(name, EXPERIMENTS, is_quick).stages:
        stages = read(stage.tuned or "methods", EXPERIMENTS, is_quick).stages
        tuning = next(stage for stage in stages if stage.chooses)
        chosen = {
            method: list(variants.values())[-1] for method, variants in tuning.variants.items()
        }
        for run in stage.runs(chosen):
            last = list(stage.variants[run.method])[-1]
            if run.seed == stage.seeds[0] and (run.variant == last or not stage.chooses):
                yield run


@pytest.mark.parametrize(
    "name",
    [name if name == "published" else pytest.param(name, marks=pytest.mark.slow) for name in ORDER],
)
def test_every_condition_composes_and_makes_a_method(name):
    """Mutation: misspell an override in a sweep.yaml, or give a value a bound below what was
    studied.
    """
    runs = list(first_runs(name, is_quick=False))
    assert len({run.overrides for run in runs}) == len(runs) > 0
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for run in runs:
            cfg = compose("config", overrides=["name=test", *run.overrides])
            assert (
                instantiate(cfg.algorithm).num_steps == 6
                and cfg.num_threads == 1
                and cfg.logger == {}
            )
            instantiate(cfg.batch)
            for check in (validate, check_parts, check_rules):
                check(cfg)


def test_a_quick_study_is_the_same_reduced():
    """Fewer runs of conditions that the full study has; one of each stage composes. Mutation:
    misname a method.
    """
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name in ORDER:
            full, quick = (list(first_runs(name, is_quick)) for is_quick in (False, True))
            assert {(run.stage, run.method) for run in quick} <= {
                (run.stage, run.method) for run in full
            }
            assert read(name, EXPERIMENTS, True).hours < read(name, EXPERIMENTS, False).hours / 4
            for run in {run.stage: run for run in quick}.values():
                cfg = compose("config", overrides=["name=test", *run.overrides])
                assert cfg.num_iterations <= 8
                check_rules(cfg)
    assert sum(read(name, EXPERIMENTS, True).hours for name in ORDER) < 0.5


@pytest.mark.parametrize("name", ORDER)
def test_a_report_names_what_its_study_has(name):
    """Mutation: compare a condition that is never run, or draw a metric that is not listed."""
    report = read(name, EXPERIMENTS, False).report
    labels = {
        run.condition for run in first_runs(name, is_quick=False) if run.stage in report["stages"]
    }
    assert {
        own for key in ("compare", "cost_ratios") for pair in report.get(key, ()) for own in pair
    } <= labels
    drawn = [
        spec
        for spec in report["figures"].values()
        if spec["kind"] in ("paths", "curves", "speeds", "dots")
    ]
    axes = {spec[key] for spec in drawn for key in ("x", "y") if key in spec}
    named = {*report.get("rewards", ()), report["kl"], *report.get("differences", ()), *axes}
    named |= {own[key] for own in report.get("equal", ()) for key in ("of", "at")}
    named |= set(report.get("scores", {}))
    for own in report.get("interactions", ()):
        assert {label for pairs in sides(own) for pair in pairs for label in pair} <= labels
    named |= {metric for spec in drawn for metric in spec.get("metrics", ())}
    assert named <= report["metrics"].keys()
    for metric in report["metrics"].values():
        check([name for names in names_of(metric) for name in names])
    check(report.get("training", {}).values())
    assert {stage for spec in drawn for stage in spec.get("stages", ())} <= set(report["stages"])
    assert set(report.get("pace", ())) <= {
        stage.name for stage in read(name, EXPERIMENTS, False).stages
    }


def test_both_passes_over_half_the_rollouts_are_as_many_updates_of_the_same_size():
    """G/2-I2 against G-I1. Mutation: halve the updates' size too."""
    stage = read("reuse", EXPERIMENTS, False).stages[0]
    register_resolvers()
    sizes = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for variant, overrides in stage.variants["flow_grpo"].items():
            plan = instantiate(compose("config", overrides=["name=test", *overrides]).batch)
            steps = plan.updates_per_iteration * plan.inner_epochs
            sizes[variant] = plan.num_samples, steps, plan.samples_per_update
    assert sizes == {"G-I1": (288, 2, 144), "G-I2": (288, 4, 144), "G/2-I2": (144, 2, 144)}


def test_one_pass_is_the_run_of_the_study_of_methods():
    """So its record serves both. Mutation: another budget in one of them."""
    chosen = dict.fromkeys(
        read("methods", EXPERIMENTS, False).stages[1].methods, ("optimizer.lr=1e-3",)
    )
    ours = read("reuse", EXPERIMENTS, False).stages[0].runs(chosen)
    theirs = read("methods", EXPERIMENTS, False).stages[1].runs(chosen)
    known = {frozenset(run.overrides) for run in theirs}
    assert [frozenset(run.overrides) in known for run in ours] == [
        run.variant == "G-I1" for run in ours
    ]
