"""Values that were once accepted, hung, ended in a traceback or were refused without their key, and
what is right.
"""

import re
from pathlib import Path

import pytest
from conf_options import FILLED, OPTIONS
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from runs import ROOT, composed, make

from flowrl.errors import UserError
from flowrl.launch import scores
from flowrl.launch.build import build
from flowrl.launch.checks import check_rules
from flowrl.launch.compose import compose
from flowrl.launch.errors import explain
from flowrl.launch.schema import Settings
from flowrl.launch.scores import check_parts, parts_of
from flowrl.launch.validate import validate
from flowrl.rewards.specimens import pairs

REFUSED = {
    "trust.clip=-1 loss=grpo": "trust.clip=-1 must be a number from 0 to 1",
    "trust.clip=nan loss=grpo": "trust.clip=nan must be a number from 0 to 1",
    "trust.clip={a:1}": "trust.clip={a: 1} must be a number",
    "trust.cps_clip=[1,2]": "trust.cps_clip=[1, 2] must be a number from 0 to 1",
    "loss=grpo loss.clip_low=1e9": "loss.clip_low=1000000000.0 must be a number from 0 to 1",
    "learning_rate.final=-1": "learning_rate.final=-1 must be a number of at least 0 and at most 1",
    "learning_rate.final=5": "learning_rate.final=5 must be a number of at least 0 and at most 1",
    "lora.alpha=0": "lora.alpha=0 must be null or a number above 0",
    "lora.alpha=-1": "lora.alpha=-1 must be null or a number above 0",
    "lora.rank=1.5": "lora.rank=1.5 must be null or a whole number of at least 1",
    "lora.rank=100000": (
        "lora.rank=100000 must be null or a whole number of at least 1 and at most 16384"
    ),
    "lora.targets='['": "lora.targets=[ must be null or a regular expression",
    "teachers=runs/a": "teachers=runs/a must be null or teachers by their names, as {NAME: {lora",
    "teachers={a:5}": "teachers.a=5 must be keys of a teacher, as {lora: FILE}",
    "teachers={a:{families:[x]}}": "missing configuration key teachers.a.lora",
    "teachers={a:{lora:f,families:x}}": "teachers.a.families=x must be null or a list",
    "teachers={a:{lora:f,families:[]}}": "teachers.a.families=[] must be null or a list",
    "teachers={a:{lora:f,family:[x]}}": (
        "teachers.a.family=[x]: no such key (did you mean 'families'?)"
    ),
    "teachers={a:{lora:f,guidance_scale:-1}}": (
        "teachers.a.guidance_scale=-1 must be null or a number of at least 0"
    ),
    "optimizer.lr=0": (
        "optimizer.lr=0 must be a number above 0 and at most 1: at 0 nothing is trained"
    ),
    "optimizer.lr=-1": "optimizer.lr=-1 must be a number above 0",
    "optimizer._target_=torch.optim.SGD": "optimizer._target_=torch.optim.SGD has no eps",
    "+optimizer.momentum=0.9": "optimizer.momentum=0.9: torch.optim.AdamW has no such key",
    "evaluation.seed=nan": "evaluation.seed=nan must be a whole number of at least 0",
    "evaluation.sampler.noise_level=nan": (
        "evaluation.sampler.noise_level=nan must be a number from 0 to 10"
    ),
    "sampler=flow_sde sampler.noise_level=1e9": (
        "sampler.noise_level=1000000000.0 must be a number from 0 to 10"
    ),
    "sampler.noise_level=1e9": (
        "sampler.noise_level=1000000000.0 must be a number of at least 0 and at most 1"
    ),
    "logger=wandb logger.wandb.mode=onlin": "did you mean 'online'?",
    "logger=wandb logger.wandb.project=a/b": "logger.wandb.project=a/b must be text of at most 128",
    "logger=wandb logger.wandb.log_model=yes": "write logger.wandb.log_model=true",
    "tags=['']": "tags[0]='' must be text of at most 64 characters",
    "grid.shift=1e9": "grid.shift=1000000000.0 must be a number above 0 and at most 100",
    "grid.shift=inf": "grid.shift=inf must be a number above 0 and at most 100",
    "objective=nope": "objective=nope: the reward has no such score; it has reward,",
    "evaluation.headline=nope": (
        "evaluation.headline=nope: the reward has no such score; it has reward, soft, strict"
    ),
    "evaluation.headline=strit": (
        "evaluation.headline=strit: the reward has no such score (did you mean 'strict'?)"
    ),
    "viewing.gold=[nope]": "viewing.gold=nope: the reward has no such score; it has soft,",
    "viewing.every=-1": "viewing.every=-1 must be a whole number of at least 0",
    "viewing.num_shown=0": "viewing.num_shown=0 must be a whole number of at least 1",
    "checkpoint.every=1.5": "checkpoint.every=1.5 must be a whole number of at least 1",
    "checkpoint.keep=1.5": "checkpoint.keep=1.5 must be a whole number of at least 1",
    "ema.every=1e9": "ema.every=1000000000.0 must be a whole number of at least 1",
    "ema.every=1000000000": (
        "ema.every=1000000000 is more than the run's 400 optimizer steps (num_iterations=200)"
    ),
    "max_grad_norm=true": "max_grad_norm=true must be above 0; for no clipping set it to .inf",
    "backend.gradient_checkpointing=abc": (
        "backend.gradient_checkpointing=abc must be true or false"
    ),
    "backend.compile=abc": "backend.compile=abc must be true or false",
    "rollout.shared_initial_noise=abc": "rollout.shared_initial_noise=abc must be true or false",
    "backend.compile=yes": "backend.compile=yes must be true or false; write backend.compile=true",
    "rollout.num_steps=1000000": (
        "rollout.num_steps=1000000 must be a whole number of at least 1 and at most 1000"
    ),
    "seed=1.5": "seed=1.5 must be a whole number of at least 0",
    "seed=abc": "seed=abc must be a whole number of at least 0",
    "seed=null": "seed=null must be a whole number of at least 0",
    "num_iterations=two": "num_iterations=two must be a whole number of at least 1",
    "num_iterations=1e3": (
        "num_iterations=1000.0 must be a whole number of at least 1; write num_iterations=1000"
    ),
    "num_iterations=true": "num_iterations=true must be a whole number of at least 1",
    "matmul_precision=tf32": "matmul_precision=tf32 must be highest, high or medium",
    "num_threads=-1": "num_threads=-1 must be null or a whole number of at least 1",
    "trainer.max_epochs=3": (
        "trainer.max_epochs=3 must be 1: an epoch is a run, and its length num_iterations"
    ),
    "+trainer.max_steps=1": (
        "trainer.max_steps=1 cannot be set: an epoch is a run, and its length num_iterations"
    ),
    "+trainer.gradient_clip_val=0.5": (
        "trainer.gradient_clip_val=0.5 cannot be set: updates are not Lightning's"
    ),
    "trainer.num_nodes=2": (
        "trainer.devices=1 and trainer.num_nodes=2 need batch.num_processes=2, not 1"
    ),
    "trainer.num_nodes=2 batch.num_processes=2": (
        "trainer.num_nodes=2 would wait for processes on other nodes"
    ),
    "trainer.devices=auto": (
        "trainer.devices=auto (as batch.num_processes) must be a whole number of at least 1"
    ),
    "+nonsense=1": "nonsense=1: no such key; nothing refers to it as ${nonsense}",
    "+rollout.nonsense=1": "rollout.nonsense=1: no such key",
    "name='../../x'": "name=../../x must be a name without slashes",
    "name='a/b'": "name=a/b must be a name without slashes",
    "model.resolution=64": (
        "model.resolution=64 must be 32: model.pretrained=embedded:pipeline draws no other size"
    ),
    "model.resolution=[32,64]": (
        "model.resolution=[32, 64] must be 32: model.pretrained=embedded:pipeline draws no other"
    ),
    "model.resolution=[32]": (
        "model.resolution=[32] must be a whole number of at least 8 and at most 8192, or a pair of "
        "them, [height, width]"
    ),
    "model.resolution=[32,7]": "model.resolution[1]=7 must be a whole number of at least 8",
    "model.resolution=4": "model.resolution=4 must be a whole number of at least 8",
    "model.resolution=wide": "model.resolution=wide must be a whole number of at least 8",
    "data.prompts.count=1e9": (
        "data.prompts.count=1000000000.0 must be a whole number of at least 1"
    ),
    "batch.group_size=1000000": (
        "batch.prompts_per_iteration=24 x batch.group_size=1000000 are 24000000 samples"
    ),
    "~callbacks": "callbacks: no option is chosen, and none can be left out; choose one of default",
    "evaluation.solver._target_=flowrl.samplers.cps.CPS": "flowrl.samplers.cps.CPS is no Solver",
    "sampler._target_=flowrl.samplers.cps.CP": (
        "sampler._target_=flowrl.samplers.cps.CP: no such class or function"
    ),
    "data=text": "data.prompts.path has no value yet; give one: data.prompts.path=VALUE",
    "reward.score=sof": (
        "reward.score=sof must be soft, geometric, strict or clean (did you mean 'soft'?)"
    ),
    "viewing.gold=soft": (
        "viewing.gold=soft must be a list, each of its entries text that is not empty"
    ),
}
"""The beginning of the line for each."""

ACCEPTED = {
    "trust.delta=inf": "the study of delta has it for no mask",
    "max_grad_norm=inf": "no clipping",
    "max_grad_norm=.inf": "as YAML spells it",
    "loss.delta=auto loss.kl_budget=5e-5 batch.updates_per_iteration=4": "a budget of the KL",
    "seed=0": "a seed",
    "viewing.every=0": "evaluates before and after alone",
    "+mine=3 evaluation.kl_samples='${mine}'": "a key of one's own that something refers to",
    "trainer.devices=2 trainer=ddp": "two processes",
    "trainer.devices=[0,1] batch.num_processes=2 trainer=ddp": "two devices by number",
    "+trainer.deterministic=true": "Lightning's own",
    "optimizer._target_=torch.optim.Adam": "another of Adam's kind",
    "reward=jpeg_compressibility": "whose headline is the reward itself",
    "reward=shapes_jpeg objective=jpeg": "a part of a mixture",
    "name=5": "a whole number is a name",
}


def examine(*overrides):
    cfg = compose(
        [
            "run_dir=run",
            *(() if any("name=" in word for word in overrides) else ("name=test",)),
            *overrides,
        ]
    )
    validate(cfg)
    check_parts(cfg)
    check_rules(cfg)


@pytest.mark.parametrize("words", REFUSED)
def test_a_wrong_value_is_refused_by_its_key(words):
    """Mutation: take the bound out of its hint, or name the parameter where ${...} ends instead of
    the key.
    """
    with pytest.raises(UserError) as error:
        examine(*words.split())
    assert explain(error.value).startswith(REFUSED[words]) or REFUSED[words] in explain(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", ACCEPTED)
def test_a_right_value_is_accepted(words):
    """Mutation: a bound that is too tight, or a key's own that counts as misspelt."""
    examine(*words.split())


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("reward=ocr",), "reward=ocr could judge none of the 2100 prompts of data"),
        (("reward=geneval2",), 'it needs metadata "vqa_list"'),
        (("data=compositions", "data.prompts.count=20"), "it needs captions of the shapes world"),
        (("lora.rank=129",), "lora.rank=129 must be at most 128, the width of the widest layer"),
        (("lora.targets=nowhere",), "lora.targets=nowhere names no linear layer of the model"),
    ],
)
def test_what_only_data_and_model_tell_is_refused_before_the_run(overrides, told):
    """Mutation: let a reward run that can judge no prompt, or peft allocate a rank that no layer
    has.
    """
    with pytest.raises(UserError) as error:
        make(*overrides)
    assert told in explain(error.value)


def test_a_file_that_is_none_is_named():
    """Mutation: say that another key is unknown."""
    with pytest.raises(InstantiationException) as error:
        make("data=text", "data.prompts.path=/dev/null")
    assert "path=/dev/null" in explain(error.value) and "count" not in explain(error.value)


@pytest.mark.parametrize("word", ["callbacks=null", "logger=null", "loss=3", "callbacks={a:1}"])
def test_a_group_without_an_option_is_named(word, monkeypatch):
    """Mutation: print Hydra's sentence, which does not say which group, with its traceback."""
    monkeypatch.setattr("sys.argv", ["train.py", "seed=1", word])
    with pytest.raises(Exception) as error:
        composed(word)
    assert explain(error.value).startswith(
        f"{word}: {word.split('=')[0]} is a group, of which one option is chosen: "
    )


@pytest.mark.parametrize("name", ["../../x", "a/b", ".."])
def test_no_folder_is_made_outside_of_the_outputs(name):
    """Hydra makes the folder before anything of ours runs. Mutation: look at the name only
    later.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra_compose("config", overrides=[f"name='{name}'"], return_hydra_config=True)
    with pytest.raises(Exception, match="must be a name without slashes"):
        cfg.hydra.run.dir  # noqa: B018


def test_a_new_key_needs_a_type():
    """Mutation: a key in conf/config.yaml that no signature and no line of the schema knows."""
    cfg = composed("run_dir=run")
    assert set(Settings.__annotations__) == set(cfg) - {"experiment", "debug"}
    OmegaConf.set_struct(cfg, False)
    for key in ("fresh", "trust.fresh", "lora.fresh"):
        changed = cfg.copy()
        OmegaConf.update(changed, key, 1, force_add=True)
        with pytest.raises(UserError, match=rf"{re.escape(key)}=1: .*no such key"):
            validate(changed)


@pytest.mark.parametrize("option", [name for group, name in OPTIONS if group == "experiment"])
def test_every_recipe_is_valid(option):
    """Mutation: as above."""
    examine(f"experiment={option}", *FILLED.get(("experiment", option), ()))


def test_a_run_of_another_version_may_lack_and_have_keys_of_the_schema():
    """It is told of what is missing only where that is needed. Mutation: be as strict as with a new
    run.
    """
    cfg = composed("run_dir=run")
    OmegaConf.set_struct(cfg, False)
    del cfg.trust.guard_clip
    cfg.forgotten = 1
    validate(cfg, allows_other_keys=True)
    with pytest.raises(UserError):
        validate(cfg)
    cfg.seed = "abc"
    with pytest.raises(UserError, match="seed=abc must be"):
        validate(cfg, allows_other_keys=True)


@pytest.mark.parametrize("path", sorted(Path(ROOT / "outputs").glob("*/*/source.yaml")))
def test_runs_that_are_there_can_be_resumed(path):
    """Mutation: refuse what an earlier version wrote."""
    validate(OmegaConf.load(path), allows_other_keys=True)


def test_the_parts_that_rewards_name_are_what_they_give():
    """Mutation: misspell a part, or forget one."""
    shown = [pair for pair in pairs() if pair.kind == "shapes"]
    pictures, prompts = [pair.good for pair in shown], [pair.prompt for pair in shown]
    for target in ("shapes.ShapesReward", "jpeg.JPEG", "brisque.BRISQUE"):
        node = {"_target_": f"flowrl.rewards.{target}"}
        options = {
            "shapes.ShapesReward": {"score": "soft"},
            "jpeg.JPEG": {"quality": 95, "scale": 1.0},
        }
        output = instantiate(node | options.get(target, {}))(pictures, prompts)
        assert list(output.parts) == parts_of(node), target
    assert parts_of({"_target_": "flowrl.rewards.geneval2.GenEval2"}) is None
    mixture = OmegaConf.to_container(composed("reward=shapes_mixture").reward)
    assert parts_of(mixture)[:3] == ["correct", "correct_soft", "correct_strict"]


def test_build_checks_too():
    """Whoever starts from a configuration, as a resumed run does. Mutation: check new runs
    alone.
    """
    with pytest.raises(UserError, match="seed=-1 must be"):
        build(composed("seed=-1", "model.pretrained=/nowhere"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("++lora._partial_=true", "lora._partial_=true cannot be set"),
        ("++sampler._args_=[1]", "sampler._args_ cannot be set: give each argument by its name"),
    ],
)
def test_hydras_own_words_are_refused_where_they_would_break_a_node(words, told):
    """Both ended in an unexpected AttributeError or TypeError. Mutation: let either through."""
    with pytest.raises(UserError) as error:
        examine(words)
    assert told in explain(error.value)


def test_an_evaluation_without_training_prompts_is_not_judged():
    """scripts/evaluate.py trains on nothing. Mutation: look at the first of no prompts."""
    scores.check_prompts(compose(["name=test"]), [])
