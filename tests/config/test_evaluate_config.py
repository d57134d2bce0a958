"""What scripts/evaluate.py takes from a run's configuration."""

import json
import sys
from collections import Counter

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from runs import CONF, make

from flowrl.cli import doctor
from flowrl.cli import evaluate as evaluate_program
from flowrl.errors import UserError
from flowrl.evaluation.evaluator import Evaluator
from flowrl.evaluation.samples import Assessment
from flowrl.evaluation.subjects import Subject
from flowrl.launch.compose import register_resolvers
from flowrl.launch.resume import write_config
from flowrl.runs.files import SOURCE
from flowrl.types import Prompt


@pytest.fixture(scope="module")
def script():
    return evaluate_program


@pytest.fixture
def saved(script, tmp_path):
    """A subject with the configuration of a run, which has not run."""
    register_resolvers()

    def build(label, *overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(
                "config", overrides=["name=x", "run_dir=x", "tags=[]", "logger=none", *overrides]
            )
        (tmp_path / label).mkdir()
        write_config(cfg, tmp_path / label)
        return Subject(label, tmp_path / label)

    return build


def test_an_interrupt_says_how_to_go_on(script, monkeypatch, capsys):
    """Mutation: end without a word."""

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "run", interrupt)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "base", "--out", "pages"])
    assert script.main() == 130
    expected = "\nstopped; the same command goes on from what is in pages\n"
    assert capsys.readouterr().out == expected


def test_a_page_is_not_overwritten_by_one_that_tells_less(script, tmp_path):
    """The default folder is that of every evaluation. Mutation: write the newest over it."""
    script.refuse_to_overwrite(tmp_path / "none", ["base"], ["held_in"])
    results = {"held_in": {"base": {}, "a": {}}, "held_out": {"base": {}, "a": {}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    sets = ["held_in", "held_out"]
    script.refuse_to_overwrite(tmp_path, ["base", "a"], sets)
    script.refuse_to_overwrite(tmp_path, ["a", "b", "base"], [*sets, "mine"])
    with pytest.raises(UserError, match=r"an evaluation of a too, .*; name all .* another --out"):
        script.refuse_to_overwrite(tmp_path, ["base", "b"], sets)
    with pytest.raises(UserError, match=r"on other prompts \(held_out\), .*; give another --out"):
        script.refuse_to_overwrite(tmp_path, ["base", "a"], ["held_in", "mine"])


@pytest.mark.parametrize("program", [evaluate_program, doctor])
def test_a_slip_is_one_line(program, monkeypatch, capsys):
    """Mutation: read the words where nothing catches what is wrong with them."""
    monkeypatch.setattr(sys, "argv", ["program.py", "--seed=1"])
    assert program.main() == 1
    expected = "error: --seed=1: overrides have no dashes; write seed=1\n"
    assert capsys.readouterr().err == expected


def test_each_run_on_its_own_grid(script, saved):
    """A run on diffusers' grid beside one on the default. Mutation: the grid of the first run, or
    of the defaults.
    """
    runs = [saved("a", "schedule=diffusers"), saved("b", "rollout.num_steps=8", "grid.shift=3.0")]
    common = script.configure(runs, [], None)
    first, second = (script.subject_config(run, common, []) for run in runs)
    assert first.evaluation.schedule == {
        "_target_": "flowrl.schedule.DiffusersDefault",
        "shift": 2.0,
    }
    assert second.evaluation.schedule == {"_target_": "flowrl.schedule.LinearShift", "shift": 3.0}
    assert instantiate(first.evaluation).intervals != instantiate(second.evaluation).intervals
    base = script.subject_config(Subject("base", None), common, [])
    assert base.evaluation.schedule == first.evaluation.schedule and base.tuning == base.lora


def test_overrides_reach_every_run(script, saved):
    """Mutation: the run's value over the command line's."""
    run, words = (
        saved("a", "schedule=diffusers"),
        ["schedule=linear_shift", "grid.shift=5.0", "evaluation.num_steps=3"],
    )
    cfg = script.subject_config(run, script.configure([run], words, None), words)
    assert cfg.evaluation.schedule == {"_target_": "flowrl.schedule.LinearShift", "shift": 5.0}
    assert cfg.evaluation.num_steps == 3


def test_a_flux_run_keeps_what_it_was_drawn_with(script, saved):
    """Mutation: lose the schedule, the backend, the cache, or a scale taken from the rollout."""
    scale = "evaluation.guidance_scale=${rollout.guidance_scale}"
    run = saved("a", "model=flux2_klein_base_4b", "rollout.guidance_scale=2.5", scale)
    cfg = script.subject_config(run, script.configure([run], [], None), [])
    assert cfg.evaluation.schedule == {
        "_target_": "flowrl.schedule.DynamicShift",
        "rule": "empirical",
        "tokens": 1024,
    }
    assert cfg.backend.slice_decoding and cfg.embeddings.folder == "~/.cache/flowrl"
    assert cfg.evaluation.guidance_scale == 2.5


@pytest.mark.parametrize(("data", "line"), [("text", "a cat"), ("jsonl", '{"prompt": "a cat"}')])
def test_the_training_prompts_as_evaluation(script, saved, tmp_path, data, line):
    """Mutation: drop the training prompts before the evaluation has found their file."""
    (tmp_path / "prompts").write_text(line + "\n")
    run = saved("a", f"data={data}", f"data.prompts.path={tmp_path}/prompts")
    cfg = script.subject_config(run, script.configure([run], [], None), [])
    assert [prompt.text for prompt in instantiate(cfg.evaluation).prompts] == ["a cat"]
    assert cfg.data.prompts == []


@pytest.mark.parametrize(
    ("line", "family"),
    [
        ('{"prompt": "a cat", "tag": "single_object", "include": []}', "single_object"),
        ('{"prompt": "a cat", "atom_count": 3, "vqa_list": []}', "atom_count_3"),
        ('{"prompt": "a cat", "atom_count": 3, "family": "cats"}', "cats"),
        ('{"prompt": "a cat"}', ""),
    ],
)
def test_a_file_of_prompts_with_metadata(script, tmp_path, line, family):
    """GenEval's, GenEval2's, our own and plain ones. Mutation: read the file as text, or lose the
    family.
    """
    path = tmp_path / "others.jsonl"
    path.write_text(line + "\n")
    cfg = script.subject_config(Subject("base", None), script.configure([], [], str(path)), [])
    evaluator = instantiate(cfg.evaluation)
    (prompt,) = evaluator.sets["others"]
    assert (prompt.text, prompt.family) == ("a cat", family) and "prompt" not in prompt.metadata
    path.write_text("a cat\n")
    with pytest.raises(ValueError, match=r"others\.jsonl line 1: not JSON"):
        script.configure([], [], str(path))


def write_geneval2(path, count=800):
    """Lines of GenEval2's form, sorted by the number of atoms as its file is."""
    rows = []
    for i in range(count):
        questions = [[f"Are there any {i} cows?", "Yes"]]
        counts = {"atom_count": 3 + 8 * i // count, "vqa_list": questions, "skills": ["object"]}
        rows.append(json.dumps({"prompt": f"{i} cows", **counts}))
    path.write_text("\n".join(rows))
    return path


@pytest.mark.parametrize("words", [[], ["evaluation=shapes"], ["reward=shapes"]])
def test_all_prompts_of_a_file_are_taken(script, saved, tmp_path, words):
    """GenEval2's 800, 100 of each number of atoms, for a base model and after a run with a limit of
    its own.

    Mutation: leave evaluation.max_prompts at 256, of which none has more than five atoms.
    """
    path = write_geneval2(tmp_path / "geneval2_data.jsonl")
    for subjects in ([Subject("base", None)], [saved("a", "evaluation.max_prompts=7")]):
        common = script.configure(subjects, words, str(path))
        cfg = script.subject_config(subjects[0], common, words)
        evaluator = instantiate(cfg.evaluation)
        counts = Counter(prompt.family for prompt in evaluator.sets["geneval2_data"])
        assert counts == {f"atom_count_{n}": 100 for n in range(3, 11)}
        assert evaluator.describe("geneval2_data") == "800 prompts"


def test_fewer_prompts_of_a_file_only_if_asked_for(script, tmp_path):
    """Then over the whole file, also where the sets that are replaced take their first ones.
    Mutation: the first 80.
    """
    path = write_geneval2(tmp_path / "mine.jsonl")
    words = ["evaluation.max_prompts=80"]
    common = script.configure([], words, str(path))
    cfg = script.subject_config(Subject("base", None), common, words)
    evaluator = instantiate(cfg.evaluation)
    assert Counter(prompt.family for prompt in evaluator.prompts) == {
        f"atom_count_{n}": 10 for n in range(3, 11)
    }
    assert evaluator.describe("mine") == "80 of 800 prompts, evenly spread"


def test_a_run_of_before_subsets_keeps_its_first_prompts(script, saved, tmp_path):
    """Its configuration says nothing of subsets. Mutation: take others than the run itself was
    evaluated on.
    """
    path = write_geneval2(tmp_path / "mine.jsonl", 9)
    run = saved("a", "data=jsonl", f"data.prompts.path={path}", "evaluation.max_prompts=3")
    source = run.path / SOURCE
    assert "  subset: even\n" in source.read_text()
    source.write_text(source.read_text().replace("  subset: even\n", ""))
    cfg = script.subject_config(run, script.configure([run], [], None), [])
    evaluator = instantiate(cfg.evaluation)
    assert [prompt.text for prompt in evaluator.prompts] == ["0 cows", "1 cows", "2 cows"]
    assert evaluator.describe("held_in") == "3 of 9 prompts, the first"


@pytest.mark.parametrize("content", [b"", b"- a\n", b"a: [1\n", b"\tx: 1\n", b"name: \xe9\n"])
def test_a_runs_damaged_configuration_is_named(script, saved, content):
    """Mutation: a traceback of the parser, or an empty configuration."""
    run = saved("a")
    (run.path / SOURCE).write_bytes(content)
    with pytest.raises(UserError, match=r"source\.yaml is damaged .*; put the file back"):
        script.configure([run], [], None)


class Still(Evaluator):
    """An evaluator of some prompts, for folders that are only opened."""

    def __init__(self, *prompts):
        self.sets = {"own": list(prompts)}


def test_an_evaluation_goes_on_with_the_prompts_it_began_with(tmp_path):
    """Neither another text nor another question, while the path is the same; folders of before tell
    no prompts.

    Mutation: compare the settings alone, which name the file.
    """
    asked = {"vqa_list": [["a?", "Yes"]]}
    Assessment(tmp_path, Still(Prompt("a", "x", asked)), {"evaluation": {"path": "a.jsonl"}})
    Assessment(tmp_path, Still(Prompt("a", "x", asked)), {"evaluation": {"path": "a.jsonl"}})
    for changed in (Prompt("b", "x", asked), Prompt("a", "x", {"vqa_list": [["a?", "No"]]})):
        with pytest.raises(UserError, match=r"other settings \(prompts\); choose another --out"):
            Assessment(tmp_path, Still(changed), {"evaluation": {"path": "a.jsonl"}})
    with pytest.raises(UserError, match=r"other settings \(evaluation\)"):
        Assessment(tmp_path, Still(Prompt("a", "x", asked)), {"evaluation": {"path": "b.jsonl"}})
    (tmp_path / "settings.json").write_text('{"evaluation": {"path": "a.jsonl"}}')
    Assessment(tmp_path, Still(Prompt("b")), {"evaluation": {"path": "a.jsonl"}})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.json", b"{"),
        ("settings.json", b"[]"),
        ("settings.json", b"\xff\xfe"),
        ("own/samples.jsonl", b"{\n{}\n"),
        ("own/samples.jsonl", b"7\n"),
        ("own/samples.jsonl", b'{"row": 0}\n'),
        ("own/samples.jsonl", b"\xff\n"),
        ("own/drift.json", b"[1]"),
    ],
)
def test_damaged_files_of_an_evaluation_are_named(tmp_path, name, content):
    """Mutation: the parser's bare words, or records dropped without one."""
    Assessment(tmp_path, Still(Prompt("a")), {})
    (tmp_path / "own").mkdir()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{tmp_path}/{name}.* is damaged .*; (choose another --out|remove it)"
    ):
        assessment = Assessment(tmp_path, Still(Prompt("a")), {})
        assessment.samples("own")
        assessment.drift("own")


def test_full_fine_tuning_is_loaded_whole(script, saved):
    """What a run of tuning=full exports, in its folder or alone, gives its weights again. Mutation:
    take it for a LoRA, or load constants as weights.
    """
    run = saved("a", "tuning=full")
    policy, _, _ = make("tuning=full")
    with torch.no_grad():
        for parameter in policy.transformer.parameters():
            parameter.add_(0.5)
    policy.tuning.save(policy.model.pipeline, run.path / policy.tuning.folder_name)
    common = script.configure([run], [], None)
    alone = Subject("alone", run.path / "transformer")
    base = Subject("base", None)
    targets = [
        script.subject_config(subject, common, []).tuning._target_ for subject in (run, alone, base)
    ]
    assert targets == [
        "flowrl.tuning.full.Full",
        "flowrl.tuning.full.Full",
        "flowrl.tuning.lora.LoRA",
    ]
    fresh, _, _ = make("tuning=full")
    alone.load_into(fresh)
    own = policy.tuning.parameters()
    assert all(torch.equal(value, own[name]) for name, value in fresh.tuning.parameters().items())
