"""The report reads run folders; these are written by hand, so that every number in it is known."""

import csv
import json
import math
import runpy
import subprocess
import sys

import pytest
import yaml
from PIL import Image

from flowrl.report.charts import Axis, curve_chart, curves
from flowrl.report.compare import conditions, differences, short
from flowrl.report.runs import find, value_text
from flowrl.report.tables import (
    ablation_table,
    difference_table,
    effect_table,
    frontier,
    frontier_table,
    run_table,
)
from flowrl.statistics import difference, mean
from flowrl.values.plural import counted

REWARD, KL = "eval/held_in/reward", "eval/held_in/kl_ref"
TARGETS = {"grpo": "flowrl.losses.grpo.grpo", "dppo": "flowrl.losses.dppo.DPPO"}


def write_run(folder, seed, loss, reward, kl=0.1, status="finished", sampler="cps.CPS", **options):
    """A run of 40 iterations whose training reward is `reward` throughout; evaluated before and at
    the end.
    """
    target = {
        "_target_": TARGETS[loss],
        **({"delta": 2e-5} if loss == "dppo" else {"clip": 1e-3}),
        **options,
    }
    sampler = {"_target_": f"flowrl.samplers.{sampler}"}
    config = {
        "seed": seed,
        "run_dir": str(folder),
        "name": f"x-{loss}",
        "loss": target,
        "sampler": sampler,
    }
    config |= {
        "data": {"seed": seed},
        "algorithm": {"loss": target},
        "evaluation": {"headline": "strict"},
    }
    config |= {"viewing": {"every": 100}, "logger": {"csv": {"save_dir": str(folder)}}}
    (folder / "images").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    Image.new("RGB", (4, 4), (seed, 0, 0)).save(folder / "images" / "000040.png")
    lines = [f"{i},{reward},,\n" for i in range(2, 40)]
    head = f"iteration,reward/mean,{REWARD},{KL}\n1,{reward},0.5,0.0\n"
    table = f"{head}{''.join(lines)}40,{reward},{reward},{kl}\n"
    (folder / "metrics.csv").write_text(table)
    if status:
        (folder / "summary.json").write_text(
            json.dumps({"status": status, "seconds": 9.5, "images_per_second": 7})
        )


@pytest.fixture
def sweep(tmp_path):
    """Two losses by two seeds: Flow-DPPO gains 0.25 on seed 0 and 0.125 on seed 1, at twice the
    KL.
    """
    for job, (loss, seed, reward) in enumerate(
        [("grpo", 0, 0.5), ("grpo", 1, 0.75), ("dppo", 0, 0.75), ("dppo", 1, 0.875)]
    ):
        write_run(
            tmp_path / "sweep" / str(job), seed, loss, reward, kl=0.2 if loss == "dppo" else 0.1
        )
    return tmp_path / "sweep"


def test_runs_alike_but_for_their_seed_are_one_condition(sweep):
    """The options that a loss brings along and the copies under `algorithm` are not named.

    Mutation: take seeds or every differing key into the label.
    """
    groups = conditions(find([sweep]))
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("loss=dppo", 2),
        ("loss=grpo", 2),
    ]
    write_run(sweep / "4", 0, "dppo", 0.5, delta=1e-4)
    labels = [group.label for group in conditions(find([sweep]))]
    assert labels == ["loss=dppo, loss.delta=2e-5", "loss=dppo, loss.delta=1e-4", "loss=grpo"]


def test_two_runs_that_differ_in_loss_and_seed_are_two_conditions(tmp_path):
    """Mutation: let the seed explain the loss."""
    write_run(tmp_path / "a", 0, "grpo", 0.5)
    write_run(tmp_path / "b", 1, "dppo", 0.5)
    assert [group.label for group in conditions(find([tmp_path]))] == ["loss=dppo", "loss=grpo"]


def test_differences_merge_copies_and_leave_folders_out(sweep):
    """Mutation: list `algorithm.loss.delta` apart, or the run folder inside a logger."""
    table = differences(find([sweep]))
    assert ("loss.delta", "algorithm.loss.delta") in table
    assert ("seed", "data.seed") in table
    assert not [names for names in table if "run_dir" in names or "logger.csv.save_dir" in names]
    assert table["loss.delta", "algorithm.loss.delta"] == ["-", "-", "2e-5", "2e-5"]


def test_values_read_as_users_write_them():
    """YAML 1.1 reads 2e-05 as text. Mutation: compare the texts 2e-05 and 2.0e-5."""
    assert [
        value_text(value)
        for value in (2e-5, "2e-05", 1e-3, 0.05, 0.8, 0.0, 2.0, None, True, [1, 2])
    ] == [*("2e-5", "2e-5", "1e-3", "0.05", "0.8", "0.0", "2.0", "null", "true", "[1, 2]")]
    assert [
        short(f"flowrl.samplers.{name}")
        for name in ("sde.FlowSDE", "dpm2.DPM2", "steps.AllButLast")
    ] == [*("flow_sde", "dpm2", "all_but_last")]
    assert short("0.05") == "0.05" and short("embedded:pipeline") == "embedded:pipeline"


def test_intervals_by_hand():
    """Of equal differences no width, of two values none, of unpaired threes none either.

    Mutation: take the standard error, or pair unshared seeds.
    """
    both = mean([1.0, 3.0])
    assert both.mean == 2.0 and both.count == 2 and math.isnan(both.low)
    assert math.isnan(mean([1.0]).low) and math.isnan(mean([]).mean)
    spread = {"0": 0.0, "1": 1.0, "2": 2.0}
    paired = difference({seed: value + 0.5 for seed, value in spread.items()}, spread)
    assert (paired.low, paired.mean, paired.high, paired.is_paired) == (0.5, 0.5, 0.5, True)
    apart = difference({"7": 0.5, "8": 1.5, "9": 2.5}, spread)
    assert apart.mean == 0.5 and math.isnan(apart.low) and not apart.is_paired


def test_tables_by_hand(sweep):
    """Mutation: subtract the wrong way round, or average over runs in place of seeds."""
    groups = conditions(find([sweep]))
    ablation = ablation_table(groups, [REWARD])
    assert [(row[0], row[1], row[2].mean) for row in ablation.rows] == [
        ("loss=dppo", 2, 0.8125),
        ("loss=grpo", 2, 0.625),
    ]
    row = difference_table(groups, groups[1], [REWARD]).rows[0]
    assert row[:3] == ["loss=dppo", 2, "paired"]
    assert row[3].mean == 0.1875 and row[3].count == 2
    assert "| +0.188 |" in difference_table(groups, groups[1], [REWARD]).markdown()
    table = list(csv.DictReader(ablation.csv().splitlines()))
    assert table[0][f"{REWARD} low"] == "" and float(table[0][REWARD]) == 0.8125
    assert [row[3] for row in frontier_table(groups, KL, REWARD).rows] == ["yes", "yes"]


def test_an_effect_holds_the_other_keys_fixed(tmp_path):
    """Loss by sampler, one of the four cells of seed 1 missing: that seed is left out.

    By hand on seed 0: dppo to grpo is -0.25 under cps and +0.125 under flow_sde, -0.0625 together.
    Mutation: pair conditions that differ in both keys, or keep the incomplete seed.
    """
    values = {
        ("dppo", "cps.CPS"): 0.75,
        ("grpo", "cps.CPS"): 0.5,
        ("dppo", "sde.FlowSDE"): 0.25,
        ("grpo", "sde.FlowSDE"): 0.375,
    }
    for job, ((loss, sampler), value) in enumerate(values.items()):
        write_run(tmp_path / f"0{job}", 0, loss, value, sampler=sampler)
        if job:
            write_run(tmp_path / f"1{job}", 1, loss, 9.0, sampler=sampler)
    rows = effect_table(conditions(find([tmp_path])), [REWARD]).rows
    assert [row[:3] for row in rows] == [
        ["loss", "dppo to grpo", 2],
        ["sampler", "cps to flow_sde", 2],
    ]
    assert [(row[3].mean, row[3].count) for row in rows] == [(-0.0625, 1), (-0.3125, 1)]


def test_the_frontier_by_hand():
    """Mutation: keep a point that another beats in both, or drop the cheapest."""
    assert frontier(
        [(0.3, 0.8), (0.1, 0.5), (0.2, 0.4), (0.4, 0.8), (math.nan, 1.0), (0.2, 0.7)]
    ) == [1, 5, 0]


def test_unfinished_and_damaged_runs_are_shown_but_not_compared(sweep):
    """Mutation: count the evaluation before training as a result, or stop at a line cut short."""
    write_run(sweep / "9", 7, "dppo", 0.1, status=None)
    text = (sweep / "9" / "metrics.csv").read_text()
    (sweep / "9" / "metrics.csv").write_text(text[: text.index("\n17,") + 4])
    runs = find([sweep])
    assert runs[-1].rows[-1]["iteration"] == 16.0
    groups = conditions(runs)
    assert groups[0].by_seed(REWARD).keys() == {"0", "1"}
    row = run_table(runs, groups, [REWARD]).rows[-1]
    assert row[2:5] == ["7", "unfinished", 16] and math.isnan(row[5])
    assert runs[0].curve(REWARD) == [(0.0, 0.5), (40.0, 0.5)]


def test_curves_average_over_runs_and_smooth_dense_metrics_only(sweep):
    """Mutation: smooth the two evaluations, or leave the band out."""
    groups = conditions(find([sweep]))
    dppo = curves(groups, REWARD, window=10)[0]
    assert dppo.points == [(0.0, 0.5), (40.0, 0.8125)] and dppo.band[1] == (40.0, 0.75, 0.875)
    runs = find([sweep])
    steps = [{"iteration": i, "reward/mean": float(i >= 20)} for i in range(40)]
    object.__setattr__(runs[0], "rows", steps)
    smooth = dict(curves(conditions(runs[:1]), "reward/mean", window=4)[0].points)
    assert (smooth[19], smooth[20], smooth[22], smooth[23]) == (0.0, 0.25, 0.75, 1.0)
    assert "polygon" in curve_chart([dppo])


def test_axes():
    """Mutation: draw y upside down, or give a log axis to values that reach zero."""
    axis = Axis.over([0.13, 0.87], 226, 10)
    assert axis.ticks()[0] <= 0.13 and axis.ticks()[-1] >= 0.87 and axis(0.13) > axis(0.87)
    log = Axis.over([1e-6, 3e-3], 226, 10, can_be_log=True)
    assert (
        log.is_log
        and log.ticks()[0] == pytest.approx(1e-6)
        and log(1e-6) == 226
        and log(1e-2) == 10
    )
    assert not Axis.over([0.0, 100.0], 226, 10, can_be_log=True).is_log
    assert Axis.over([0.5, 0.5], 0, 1)(0.5) == pytest.approx(0.5)


def test_the_script_writes_one_offline_page_without_torch(sweep, root):
    """Mutation: import torch, link a style sheet or a picture, or lose a table."""
    script = root / "scripts" / "report.py"
    code = (
        f"import sys, runpy; sys.modules['torch'] = None; runpy.run_path({str(script)!r}, "
        "run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, sweep], capture_output=True, text=True, cwd=root
    )
    assert result.returncode == 0, result.stderr
    assert "4 runs in 2 conditions" in result.stdout
    page = (sweep / "report" / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert page.count("data:image/png;base64,") == 2 and "loss=grpo" in page
    assert page.count("<svg") == 1 + 3  # the frontier, and one chart for each metric
    names = {path.name for path in (sweep / "report").iterdir()}
    tables = {"ablation", "differences", "effects", "frontier", "config", "runs"}
    assert names == {"report.html", "report.md", *(f"{name}.csv" for name in tables)}
    assert all(
        f"## {title}" in (sweep / "report" / "report.md").read_text()
        for title in ("Ablation", "Effects")
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--baseline", "loss=grp"], "loss=grpo"), (["--metrics", "eval/x"], "metrics.csv")],
)
def test_mistakes_end_in_one_line(sweep, root, extra, message, monkeypatch, capsys):
    """Mutation: fall back to the first condition, or draw an empty column."""
    monkeypatch.setattr(sys, "argv", ["report.py", str(sweep), *extra])
    with pytest.raises(SystemExit, match=r"^1$"):
        runpy.run_path(str(root / "scripts" / "report.py"), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_folder_without_runs_is_refused(tmp_path):
    """Mutation: write an empty report."""
    with pytest.raises(ValueError, match="no run there"):
        find([tmp_path])


def test_rounding_is_no_difference(tmp_path):
    """A float32 number's last bit is printed as 0, a thousandth of the value as itself; two seeds
    have no interval, and the table says so.

    Mutation: print -7.45e-09 for a difference of 0.
    """
    rewards = {"grpo": (0.1, 0.5), "dppo": (0.1 - 7.45e-9, 0.5)}
    for loss, values in rewards.items():
        for seed, reward in enumerate(values):
            write_run(tmp_path / f"{loss}{seed}", seed, loss, reward, kl=0.1)
    groups = conditions(find([tmp_path]))
    for table in (
        difference_table(groups, groups[0], [REWARD]),
        effect_table(groups, [REWARD]),
    ):
        gap = table.rows[0][-1]
        assert gap.mean == 0 and math.isnan(gap.low)
        assert "| +0 |" in table.markdown()
    assert (
        "no intervals, since there are fewer than 3 seeds" in ablation_table(groups, [REWARD]).note
    )
    write_run(tmp_path / "dppo2", 2, "dppo", 0.5005)
    write_run(tmp_path / "grpo2", 2, "grpo", 0.5)
    groups = conditions(find([tmp_path]))
    gap = difference_table(groups, groups[1], [REWARD]).rows[0][-1]
    assert gap.mean == pytest.approx(0.0005 / 3, rel=1e-4)
    assert "95 % Student's intervals" in ablation_table(groups, [REWARD]).note


def test_one_is_counted_as_one():
    """Mutation: 1 runs in 1 conditions."""
    assert [counted(count, "run") for count in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]
