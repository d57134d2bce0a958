"""A folder of configuration of one's own: how each program takes it, and what it vouches for."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from runs import CONF, ROOT

from flowrl.cli import evaluate
from flowrl.cli.arguments import PARSERS, head_of
from flowrl.errors import UserError
from flowrl.evaluation.subjects import Subject
from flowrl.launch.compose import compose
from flowrl.launch.errors import explain
from flowrl.launch.search_path import search_flags, searched_folders, with_config_dir
from flowrl.launch.words import check_words
from flowrl.runs.command_line import resume_command
from flowrl.tuning.layer_names import Format

COMPOSING = ("evaluate", "generate", "serve", "doctor", "plan", "export")


@pytest.fixture
def conf(tmp_path):
    """A folder, whose name needs quotes, with a reward that only it names."""
    folder = tmp_path / 'my "conf", 2' / "conf"
    (folder / "reward").mkdir(parents=True)
    (folder / "reward" / "mine.yaml").write_text("_target_: acme.rewards.Mine\n")
    return folder


def test_a_folder_of_ones_own_adds_options(conf):
    """And hides none of FlowRL's. Mutation: search it first, or lose its quotes."""
    (conf / "reward" / "shapes.yaml").write_text("_target_: acme.rewards.Shapes\n")
    words = with_config_dir(["name=t", "reward=mine"], conf)
    assert compose(words).reward._target_ == "acme.rewards.Mine"
    served = compose(with_config_dir(["reward=mine"], conf), config="serve")
    assert served.reward._target_ == "acme.rewards.Mine"
    shapes = compose(with_config_dir(["name=t", "reward=shapes"], conf)).reward
    assert shapes._target_ == "flowrl.rewards.shapes.ShapesReward"
    assert with_config_dir(["seed=1"], None) == ["seed=1"]
    assert searched_folders(words, CONF) == [CONF, conf.resolve()]
    assert searched_folders(["seed=1", "hydra.searchpath=[pkg://acme.conf]"], CONF) == [CONF]


def test_a_folder_that_is_not_there_is_refused(conf):
    """Mutation: let Hydra warn and go on without it, or take one of the two."""
    with pytest.raises(UserError, match=r"--config-dir nowhere: no such folder; give one"):
        with_config_dir([], Path("nowhere"))
    with pytest.raises(UserError, match=r"hydra\.searchpath is given too; add the folder"):
        with_config_dir(["hydra.searchpath=[file:///tmp]"], conf)


@pytest.mark.parametrize("name", COMPOSING)
def test_every_program_that_composes_takes_a_folder(name):
    """Mutation: leave one out."""
    # All but these take overrides alone.
    own = {"export": ["x", "--format", "peft"], "evaluate": ["x"]}.get(name, [])
    words = [*own, "--config-dir", "conf", "seed=1"]
    assert PARSERS[name]().parse_intermixed_args(words).config_dir == Path("conf")


def test_evaluation_builds_what_the_folder_names(conf, tmp_path):
    """A run's own folder does not vouch for itself. Mutation: read conf/ alone, or let it."""
    run = tmp_path / "run"
    run.mkdir()
    cfg = compose(with_config_dir(["name=t", "reward=mine", f"run_dir={run}"], conf))
    (run / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    subject = Subject.read(str(run))
    with pytest.raises(UserError, match=r"acme\.rewards\.Mine.*that names it: --config-dir"):
        evaluate.configure([subject], [], None)
    known = evaluate.configure([subject], with_config_dir([], conf), None)
    assert known.reward._target_ == "acme.rewards.Mine"
    # Nor does a folder that holds the run, such as `--config-dir .`.
    around = [f"{with_config_dir([], conf)[0].partition('=')[0]}=[file://{tmp_path}]"]
    with pytest.raises(UserError, match=r"acme\.rewards\.Mine"):
        evaluate.configure([subject], around, None)
    conf.rename(run / "conf")
    with pytest.raises(UserError, match=r"acme\.rewards\.Mine"):
        evaluate.configure([subject], with_config_dir([], run / "conf"), None)


def test_what_continues_a_run_names_its_folder(conf, monkeypatch):
    """Wherever it is typed. Mutation: leave the flag out, so that the command is refused, or name
    the folder from here.
    """
    monkeypatch.chdir(conf.parent)
    overrides = ["name=t", "reward=mine", *with_config_dir([], conf)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = hydra_compose("config", overrides=overrides, return_hydra_config=True).hydra
    assert search_flags(hydra) == [overrides[-1]]
    hydra.overrides.hydra = []
    for source in hydra.runtime.config_sources:
        if source.path == str(conf):
            source.provider = "command-line"
    assert search_flags(hydra) == ["--config-dir", str(conf)]
    told = resume_command("x", is_sweep=True, flags=search_flags(hydra))
    assert shlex.split(told)[-4:] == ["--config-dir", str(conf), "-m", "resume=x"]


def test_a_folder_here_is_named_and_never_read_by_itself(conf):
    """A downloaded folder must not run code because one stands in it. Mutation: say nothing, or
    read it.
    """
    line = [sys.executable, ROOT / "train.py", "reward=mine", "--cfg", "job"]
    done = subprocess.run(line, cwd=conf.parent, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.endswith("; conf/reward/mine.yaml is read with --config-dir conf\n")
    line += ["--config-dir", "conf"]
    done = subprocess.run(line, cwd=conf.parent, capture_output=True, text=True)
    assert "_target_: acme.rewards.Mine" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("reward=mien", "(did you mean 'mine'?)"),
        ("reward.beauty_wieght=2", "(did you mean 'reward.beauty_weight'?)"),
        ("beauty_weight=2", "(did you mean 'reward.beauty_weight'?)"),
        ("critik.size=2", "(did you mean 'critic.size'?)"),
        ("logger=null", "logger=null: logger is a group"),
        ("critic=null", "critic=null: critic is a group, of which one option is chosen: small"),
    ],
)
def test_what_was_meant_may_be_ones_own(conf, monkeypatch, word, answer):
    """By either way to name the folder, beside what is well. Mutation: look in FlowRL's alone."""
    (conf / "reward" / "mine.yaml").write_text("_target_: acme.Mine\nbeauty_weight: 1\n")
    (conf / "reward" / "broken.yaml").write_text("a: [1\n")
    (conf / "critic").mkdir()
    (conf / "critic" / "small.yaml").write_text("size: 1\n")
    chosen = ["+critic=small", "reward=mine", word] if word != "reward=mien" else [word]
    plain = conf.parents[1] / "plain"
    conf.rename(plain)
    for words in (["--config-dir", str(plain)], [f"hydra.searchpath=[file://{plain}]"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *words, *chosen])
        with pytest.raises(Exception) as refusal:  # Hydra raises several
            compose(with_config_dir(["name=t", *chosen], plain))
        assert answer in explain(refusal.value)


def test_a_word_alone_may_be_an_option_of_ones_own(conf, monkeypatch):
    """Mutation: look for it in FlowRL's alone."""
    words = ["seed=1", "mine", "--config-dir", str(conf)]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(UserError, match="write reward=mine"):
        check_words(words)


@pytest.mark.parametrize("name", PARSERS)
def test_help_begins_with_three_examples(name):
    """Mutation: leave one out, or print the usage first."""
    head, _, examples = PARSERS[name]().format_help().split("\n\n")[0].partition("\n")
    assert head == "Examples:"
    assert len(examples.splitlines()) >= 3
    assert examples in head_of(name)


def test_help_imports_nothing_heavy(tmp_path):
    """Mutation: run the program for it."""
    code = (
        "import sys; sys.argv = ['flowrl', 'evaluate', '--help']\n"
        "from flowrl.__main__ import main\n"
        "print(main(), {'torch', 'hydra', 'diffusers'} & {*sys.modules})"
    )
    line = [sys.executable, "-c", code]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.startswith("Examples:\n    flowrl evaluate base"), done.stderr
    assert done.stdout.endswith("0 set()\n")


def test_help_of_training_is_short():
    """Mutation: print the whole configuration."""
    line = [sys.executable, ROOT / "train.py", "--help"]
    told = subprocess.run(line, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    assert told[0] == "Examples:" and all("train.py" in line for line in told[1:4])
    assert any(line.startswith("reward: aesthetic, brisque") for line in told)
    assert len(told) < 40


def test_the_formats_of_an_export_are_those_there_are():
    """Mutation: forget one."""
    parser = PARSERS["export"]()
    for name in get_args(Format):
        assert parser.parse_args(["x", "--format", name]).format == name
