"""What scripts/evaluate.py takes from a run's configuration."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from runs import CONF, load_script, make

from flowrl.assessment.subjects import Subject
from flowrl.launch.compose import register_resolvers
from flowrl.launch.resume import write_config
from flowrl.models import lora


@pytest.fixture(scope="module")
def script():
    return load_script("evaluate")


@pytest.fixture
def saved(script, tmp_path):
    """A subject with the configuration of a run, which has not run."""
    register_resolvers()

    def build(label, *overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", overrides=["name=x", "run_dir=x", "tags=[]", "logger=none", *overrides])
        (tmp_path / label).mkdir()
        write_config(cfg, tmp_path / label)
        return Subject(label, tmp_path / label)

    return build


def test_each_run_on_its_own_grid(script, saved):
    """A run on diffusers' grid beside one on the default. Mutation: the grid of the first run, or of the defaults."""
    runs = [saved("a", "schedule=diffusers"), saved("b", "rollout.num_steps=8", "grid.shift=3.0")]
    common = script.configure(runs, [], None)
    first, second = (script.own_config(run, common, []) for run in runs)
    assert first.evaluation.schedule == {"_target_": "flowrl.schedule.DiffusersDefault", "shift": 2.0}
    assert second.evaluation.schedule == {"_target_": "flowrl.schedule.LinearShift", "shift": 3.0}
    assert instantiate(first.evaluation).intervals != instantiate(second.evaluation).intervals
    base = script.own_config(Subject("base", None), common, [])
    assert base.evaluation.schedule == first.evaluation.schedule and base.tuning == base.lora


def test_overrides_reach_every_run(script, saved):
    """Mutation: the run's value over the command line's."""
    run, words = saved("a", "schedule=diffusers"), ["schedule=linear_shift", "grid.shift=5.0", "evaluation.num_steps=3"]
    cfg = script.own_config(run, script.configure([run], words, None), words)
    assert cfg.evaluation.schedule == {"_target_": "flowrl.schedule.LinearShift", "shift": 5.0}
    assert cfg.evaluation.num_steps == 3


def test_a_flux_run_keeps_what_it_was_drawn_with(script, saved):
    """Mutation: lose the schedule, the backend, the cache, or a scale taken from the rollout."""
    scale = "evaluation.guidance_scale=${rollout.guidance_scale}"
    run = saved("a", "model=flux2_klein_base_4b", "rollout.guidance_scale=2.5", scale)
    cfg = script.own_config(run, script.configure([run], [], None), [])
    assert cfg.evaluation.schedule == {"_target_": "flowrl.schedule.DynamicShift", "rule": "empirical", "tokens": 1024}
    assert cfg.backend.slice_decoding and cfg.embeddings.folder == "~/.cache/flowrl"
    assert cfg.evaluation.guidance_scale == 2.5


@pytest.mark.parametrize(("data", "line"), [("text", "a cat"), ("jsonl", '{"prompt": "a cat"}')])
def test_the_training_prompts_as_evaluation(script, saved, tmp_path, data, line):
    """Mutation: drop the training prompts before the evaluation has found their file."""
    (tmp_path / "prompts").write_text(line + "\n")
    run = saved("a", f"data={data}", f"data.prompts.path={tmp_path}/prompts")
    cfg = script.own_config(run, script.configure([run], [], None), [])
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
    """GenEval's, GenEval2's, our own and plain ones. Mutation: read the file as text, or lose the family."""
    path = tmp_path / "others.jsonl"
    path.write_text(line + "\n")
    cfg = script.own_config(Subject("base", None), script.configure([], [], str(path)), [])
    evaluator = instantiate(cfg.evaluation)
    (prompt,) = evaluator.sets["others"]
    assert (prompt.text, prompt.family) == ("a cat", family) and "prompt" not in prompt.metadata
    path.write_text("a cat\n")
    with pytest.raises(ValueError, match=r"others\.jsonl line 1: not JSON"):
        script.configure([], [], str(path))


def test_full_fine_tuning_is_loaded_whole(script, saved):
    """What a run of tuning=full exports, in its folder or alone, gives its weights again. Mutation: take it for a LoRA,
    or load constants as weights.
    """
    run = saved("a", "tuning=full")
    policy, _, _ = make("tuning=full")
    with torch.no_grad():
        for parameter in policy.transformer.parameters():
            parameter.add_(0.5)
    policy.model.save_lora(run.folder / lora.folder_name(policy.transformer))
    common = script.configure([run], [], None)
    alone = Subject("alone", run.folder / "transformer")
    base = Subject("base", None)
    targets = [script.own_config(subject, common, []).tuning._target_ for subject in (run, alone, base)]
    assert targets == ["flowrl.models.full.Full", "flowrl.models.full.Full", "flowrl.models.lora.LoRA"]
    fresh, _, _ = make("tuning=full")
    alone.load_into(fresh)
    own = lora.parameters(policy.transformer)
    assert all(torch.equal(value, own[name]) for name, value in lora.parameters(fresh.transformer).items())
