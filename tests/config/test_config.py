"""Every YAML under conf/ composes, resolves, and instantiates in every combination that needs no
weights.
"""

import inspect
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from flowrl.algorithm import Algorithm
from flowrl.evaluation.evaluator import Evaluator
from flowrl.launch.build import build, prepare
from flowrl.launch.checks import check_deadlines, check_trainer
from flowrl.launch.compose import register_resolvers
from flowrl.launch.errors import explain
from flowrl.launch.validate import validate
from flowrl.objectives import check_method, stochastic_steps
from flowrl.parallel.strategies import clip, norm_limit
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.ema import EMA
from flowrl.training.prompt_data import PromptData
from flowrl.tuning.lora import LoRA
from flowrl.types import Prompt
from flowrl.values.wording import meant

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = sorted(
    (path.parent.relative_to(CONF).as_posix(), path.stem) for path in CONF.glob("*/**/*.yaml")
)
FILE = "data.prompts.path=prompts.txt"
TABLE = "data.prompts.path=prompts.parquet"
FILLED = {
    ("model", "derived"): ("model.pretrained=org/name",),
    ("data", "text"): (FILE,),
    ("data", "jsonl"): (FILE,),
    ("data", "geneval"): (FILE,),
    ("data", "geneval2"): (FILE,),
    ("data", "hub"): (TABLE,),
    ("evaluation", "text"): ("data=text", FILE),
    ("evaluation", "hub"): ("data=hub", TABLE),
    ("evaluation", "jsonl"): ("data=jsonl", FILE),
    ("evaluation", "geneval2"): ("evaluation.sets.held_in.path=prompts.jsonl",),
    ("reward", "remote"): ("reward.url=http://localhost:8000",),
}
"""Values that an option leaves to the user."""
PARTS = {
    "http": ("reward.client", "reward=remote", "reward.url=http://localhost:8000"),
    "detector": ("reward.detector", "reward=geneval"),
}
"""Groups below an option of another group: the place, and what brings it."""
BASE = "experiment/base"
"""What recipes take into their defaults: nothing that a user chooses."""
NEEDED = {"guard": "flow_sde", "cps": "cps"}
PATHS = (("data.prompts.path", "mine"), ("evaluation.sets.held_in.path", "others"))
FORMS = {"cps": "unnormalised"}
"""The log-probability form that a loss's YAML brings along."""
FORWARD = ("awm", "nft", "pepg")
"""Losses over samples that are noised again."""


def options(group):
    return [name for other, name in OPTIONS if other == group]


def config(*overrides):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=["name=test", *overrides])


def select(group, option, *others):
    if group in PARTS:
        place, *needed = PARTS[group]
        return config(*needed, f"{group}@{place}={option}", *others)
    if group == BASE:
        return config(f"+{group}={option}", *others)
    return config(f"{group}={option}", *FILLED.get((group, option), ()), *others)


def targets(node, path=""):
    """(path, node) of every `_target_`, from the unresolved configuration."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in node:
            if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
                yield from targets(node[key], f"{path}.{key}")


@pytest.fixture(scope="module")
def base():
    return config()


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_fits_its_target(group, option):
    """Each key is a parameter of its target, each parameter has a key. Mutation: rename a key in
    any YAML.
    """
    cfg = select(group, option)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    found = list(targets(cfg))
    assert len(found) > 8
    for path, node in found:
        target = get_object(node["_target_"])
        signature = inspect.signature(target)
        keys = {str(key): None for key in node if key not in ("_target_", "_partial_", "_convert_")}
        bind = signature.bind_partial if node.get("_partial_") else signature.bind
        bind(**keys)
        if node["_target_"].startswith("flowrl."):
            kinds = {parameter.kind for parameter in signature.parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds, f"{path} swallows misspelt keys"
        if node.get("_partial_") and node["_target_"].startswith("flowrl."):
            required = {p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
            assert required == keys.keys(), path


def test_a_base_of_recipes_is_no_recipe():
    """Mutation: keep it among the options of `experiment=`, or let it make a key."""
    bases = options(BASE)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        recipes = GlobalHydra.instance().config_loader().get_group_options("experiment")
    assert bases and recipes == options("experiment") and not set(bases) & set(recipes)
    for name in bases:
        assert select(BASE, name).keys() == config().keys()


def test_every_yaml_is_small_and_says_what_it_is():
    """Mutation: a group file without a head line, or one that outgrows 17 lines."""
    for group, option in OPTIONS:
        lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
        assert len(lines) <= 17, (group, option)
        assert any(
            line.startswith("# ") and not line.startswith("# @package") for line in lines[:2]
        ), (group, option)


@pytest.mark.parametrize(
    "override",
    ["sampler.noise_levl=0.5", "loss.delta_max=1", "batch.groups=3", "seeed=1", "penalty.betas=1"],
)
def test_an_unknown_key_fails_and_is_named(override):
    """Mutation: switch struct mode off."""
    with pytest.raises(ConfigCompositionException) as error:
        config(override)
    assert override.split("=")[0] in explain(error.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "loss=dpoo",
            "loss=dpoo: no such option (did you mean 'dppo'?); choose one of awm, cps, dppo",
        ),
        ("loss=zzzz", "loss=zzzz: no such option; choose one of awm, cps, dppo"),
        ("model=sd35", "model=sd35: no such option (did you mean 'sd35_large' or 'sd35_medium'?)"),
        ("lr=1e-4", "lr: unknown configuration key (did you mean 'optimizer.lr'?)"),
        (
            "noise_level=1",
            "noise_level: unknown configuration key (did you mean 'sampler.noise_level'?)",
        ),
        ("lor=1", "lor: unknown configuration key (did you mean 'lora'?)"),
        ("seed=0,1", "seed=0,1: several values are a sweep, add -m"),
    ],
)
def test_what_was_meant_is_said_first(override, told):
    """Mutation: suggest nothing, or whatever is first; show Hydra's own paragraph."""
    with pytest.raises(HydraException) as error:
        config(override)
    assert explain(error.value).startswith(told)
    # What it begins comes before what only holds it.
    assert (
        meant("sd35", ["sd35_large_turbo", "my_sd35_lora"]) == " (did you mean 'sd35_large_turbo'?)"
    )


@pytest.mark.parametrize(
    ("group", "key"),
    [("data.prompts", "split"), ("reward.client", "deadline"), ("tuning", "dtype")],
)
def test_a_key_that_another_versions_run_lacks_is_named_with_the_remedy(group, key):
    """Mutation: print the call that failed instead of where its argument belongs."""
    remote = ("reward=remote", "reward.url=http://localhost:8000")
    cfg = config("data=compositions", "tuning=full", *remote)
    OmegaConf.set_struct(cfg, False)
    del OmegaConf.select(cfg, group)[key]
    with pytest.raises(InstantiationException) as error:
        instantiate(cfg[group.split(".")[0]])
    assert f"missing configuration key '{key}'" in explain(error.value)
    assert f"++{group.split('.')[-1]}.{key}=VALUE" in explain(error.value).replace(
        "data.", ""
    ).replace("reward.", "")


def combine(base, **chosen):
    """`base` with other options of some groups, without composing anew."""
    cfg = base.copy()
    OmegaConf.set_struct(cfg, False)
    for group, node in chosen.items():
        cfg[group] = node
    return cfg


@pytest.fixture(scope="module")
def nodes():
    groups = ("sampler", "loss", "steps", "penalty", "advantage")
    return {
        group: {option: select(group, option)[group] for option in options(group)}
        for group in groups
    }


def is_legal(sampler, loss, penalty):
    """The rules between sampler, loss and penalty, written down once more."""
    is_deterministic = sampler in ("ode", "dpm2")
    if loss in FORWARD:
        return is_deterministic and penalty in ("none", "velocity")
    if loss in NEEDED:
        return sampler == NEEDED[loss]
    return not is_deterministic


@pytest.mark.parametrize("loss", options("loss"))
@pytest.mark.parametrize("sampler", options("sampler"))
def test_every_combination_instantiates_or_is_refused_by_name(base, nodes, sampler, loss):
    """Mutation: lose a rule between sampler, loss and penalty, or refuse a good combination."""
    rest = [nodes[group].items() for group in ("steps", "penalty", "advantage")]
    for (_, steps), (penalty, penalty_node), (_, advantage) in itertools.product(*rest):
        chosen = {"steps": steps, "penalty": penalty_node, "advantage": advantage}
        cfg = combine(base, sampler=nodes["sampler"][sampler], loss=nodes["loss"][loss], **chosen)
        cfg.likelihood.form = FORMS.get(loss, "gaussian")
        cfg.rollout.shared_initial_noise = loss not in FORWARD
        if is_legal(sampler, loss, penalty):
            algorithm = instantiate(cfg.algorithm)
            assert isinstance(algorithm, Algorithm)
            check_method(algorithm)
            assert len(stochastic_steps(algorithm, iteration=0, seed=0, prompt=0)) == (
                0 if loss in FORWARD else len(algorithm.steps.draw(6, 0, 0, 0))
            )
        else:
            with pytest.raises(
                Exception, match=r"(?s)loss.*(sampler|penalty)|sampler.*loss"
            ) as error:
                check_method(instantiate(cfg.algorithm))
            assert "loss" in explain(error.value)


def test_the_other_nodes_instantiate(base, tmp_path):
    """Mutation: an interpolation to a moved key."""
    register_resolvers()
    assert isinstance(instantiate(base.batch), BatchPlan)
    assert isinstance(instantiate(base.lora), LoRA)
    assert isinstance(instantiate(base.ema), EMA)
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \n")
    text = config("data=text", f"data.prompts.path={tmp_path}/prompts.txt")
    data = instantiate(text.data)
    assert isinstance(data, PromptData)
    assert [prompt.text for prompt in data.prompts] == ["a cat", "a dog"]
    evaluator = instantiate(base.evaluation)
    assert isinstance(evaluator, Evaluator)
    for prompts in evaluator.sets.values():
        assert {type(prompt) for prompt in prompts} == {Prompt}, (
            "hydra turned prompts into DictConfigs"
        )
    assert len(evaluator.prompts) == sum(node["count"] for node in base.evaluation.sets.values())
    seen = instantiate(base.data).prompts
    assert {type(prompt) for prompt in seen} == {Prompt}
    assert len(seen) == base.data.prompts["count"]


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (
            ("sampler=flow_sde", "rollout.num_steps=3"),
            ("steps may pick step 3", "rollout.num_steps=3"),
        ),
        (
            ("sampler=dance_sde", "steps=window", "steps.high=9"),
            ("steps may pick step 6", "rollout.num_steps=6"),
        ),
        (("steps.high=6",), ("step 5", "sampler=cps", "zero-variance", "steps.high")),
        (("sampler.noise_level=0",), ("sampler=cps", "deterministic", "loss=nft")),
        (("rollout.num_steps=1", "steps=all_but_last"), ("rollout.num_steps=1",)),
        (("sampler=flow_sde", "sampler.noise_level=-1"), ("sampler.noise_level=-1",)),
        (("steps.count=9",), ("steps.count=9",)),
        (("likelihood.reduction=max",), ("reduction", "max")),
        (("loss=nft",), ("loss=nft", "sampler=cps", "sampler=ode")),
        (
            ("loss=nft", "sampler=ode", "penalty=kl"),
            ("loss=nft", "penalty.form=kl", "penalty=velocity"),
        ),
        (
            ("loss=nft", "sampler=ode", "rollout.shared_initial_noise=true"),
            ("loss=nft", "shared_initial_noise"),
        ),
        (("loss=cps", "sampler=flow_sde"), ("loss=cps", "sampler=cps", "flow_sde")),
        (("loss.divergence=tv",), ("loss.divergence=tv", "loss.calibrated_for=kl")),
        (
            ("likelihood.reduction=sum",),
            ("loss.calibrated_for=kl", "likelihood.reduction=sum", "sum_kl"),
        ),
        (
            ("loss=grpo", "likelihood.reduction=sum"),
            ("loss.calibrated_for=gaussian", "likelihood.reduction=sum"),
        ),
        (("loss=guard",), ("loss=guard", "sampler=flow_sde", "cps")),
        (("loss=grpo", "trust.clip=-1"), ("loss.clip_low=-1",)),
        (("loss=cps", "sampler=cps", "loss.clip_high=-1"), ("loss.clip_high=-1",)),
        (("loss=guard", "sampler=flow_sde", "loss.advantage_clip=0"), ("loss.advantage_clip=0",)),
        (("loss.advantage_clip=-5",), ("loss.advantage_clip=-5",)),
        (
            ("loss=grpo", "likelihood.form=unnormalised"),
            ("loss.calibrated_for=gaussian", "likelihood.form"),
        ),
        (
            ("loss=guard", "sampler=flow_sde", "likelihood.reduction=sum"),
            ("loss=guard", "likelihood.reduction"),
        ),
    ],
)
def test_rules_between_components_name_their_keys(overrides, names):
    """Mutation: drop a rule, or name one key of two."""
    with pytest.raises(Exception) as error:
        check_method(instantiate(config(*overrides).algorithm))
    assert all(name in explain(error.value) for name in names), explain(error.value)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (("trainer=fsdp",), ("trainer=fsdp", "tuning=full", "trainer=ddp")),
        (
            ("trainer=fsdp", "tuning=full", "backend.compile=true"),
            ("trainer=fsdp", "backend.compile=true"),
        ),
        (
            ("trainer=fsdp", "tuning=full", "trainer.num_nodes=2"),
            ("trainer.num_nodes=2", "batch.num_processes=4"),
        ),
        (
            ("+trainer.precision=bf16-mixed",),
            ("trainer.precision=bf16-mixed", "model.dtype=bfloat16"),
        ),
        (("model.dtype=float16",), ("model.dtype=float16", "take bfloat16")),
        (
            ("+trainer.precision=bf16-true",),
            ("trainer.precision=bf16-true", "model.dtype=bfloat16"),
        ),
    ],
)
def test_ways_to_spread_a_run_that_would_go_wrong_are_refused(overrides, names):
    """Mutation: divide weights that are not trained, count one node's processes only, or let
    autocast keep old ones.
    """
    check_trainer(config("trainer=fsdp", "tuning=full"))
    check_trainer(
        config("trainer=fsdp", "tuning=full", "trainer.num_nodes=2", "batch.num_processes=4")
    )
    with pytest.raises(ValueError) as error:
        check_trainer(config(*overrides))
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("data", ["text", "jsonl", "geneval", "geneval2", "compositions"])
def test_prompts_of_another_kind_are_evaluated_on_their_own_kind(data, tmp_path):
    """The training file unless told otherwise, at most `max_prompts`, spread over it, with their
    metadata; or another.

    Mutation: take the first lines, leave the evaluation on captions of the shapes world, or let
    Hydra turn metadata into its own containers.
    """
    row = {
        "prompt": "a cow",
        "tag": "single",
        "include": [{"n": 1}],
        "atom_count": 1,
        "vqa_list": [["a?", "Yes"]],
    }
    for name, count in (("mine", 400), ("others", 3)):
        texts = [f"{name} {i}" for i in range(count)]
        rows = texts if data == "text" else [json.dumps(row | {"prompt": text}) for text in texts]
        (tmp_path / name).write_text("\n".join(rows))
    mine, others = (f"{key}={tmp_path / name}" for key, name in PATHS)
    given = ("reward=jpeg_compressibility", *(() if data == "compositions" else (mine,)))
    evaluator = instantiate(config(f"data={data}", *given).evaluation)
    assert list(evaluator.sets) == ["held_in"] and evaluator.headline == "reward"
    assert len(evaluator.prompts) == (128 if data == "compositions" else 256)
    prompt = evaluator.prompts[0]
    assert type(prompt) is Prompt
    if data in ("geneval2", "compositions"):
        assert type(prompt.metadata["vqa_list"]) is list and prompt.family.startswith("atom_count_")
    if data != "compositions":
        places = [int(prompt.text.removeprefix("mine ")) for prompt in evaluator.prompts]
        assert (
            max(places) >= 398
            and [sum(i // 100 == part for i in places) for part in range(4)] == [64] * 4
        )
        assert len(instantiate(config(f"data={data}", *given, others).evaluation).prompts) == 3
    assert (
        list(instantiate(config(f"data={data}", *given, "evaluation=shapes").evaluation).sets)[1]
        == "held_out"
    )


def test_compositions_are_evaluated_on_what_training_never_draws():
    """The first 3,000 of training and all 128 of the evaluation, by words and by questions.

    Mutation: one split for both, whatever their seeds.
    """
    cfg = config("data=compositions", "data.prompts.count=3000", "data.prompts.seed=2")

    def marks(prompts):
        asked = {frozenset(map(tuple, prompt.metadata["vqa_list"])) for prompt in prompts}
        return {prompt.text.replace(",", "") for prompt in prompts}, asked

    train, test = marks(instantiate(cfg.data).prompts), marks(instantiate(cfg.evaluation).prompts)
    assert (len(train[0]), len(test[0])) == (3000, 128)
    assert not train[0] & test[0] and not train[1] & test[1]


def test_a_reward_may_set_the_headline():
    """Mutation: compose the evaluation after the reward, which then loses its headline."""
    assert config("reward=shapes_mixture").evaluation.headline == "correct_strict"
    assert config().evaluation.headline == "strict"


def test_scores_are_given_up_before_other_processes_are():
    """The collective's 20 minutes are 1200 s: 3 x 300 s is less, 3 x 400 s is not, nor is 3 x 300 s
    for two services.

    One process waits for nobody. Mutation: compare a single deadline, look at the reward's own
    client only, or at each of a mixture's alone.
    """
    remote = ("reward=remote", "reward.url=http://localhost:8000")
    check_deadlines(config("trainer=ddp", *remote))
    check_deadlines(config(*remote, "reward.client.deadline=4000"))
    with pytest.raises(
        ValueError, match=r"reward\.client\.deadline=400 .* trainer\.strategy\.timeout_minutes=20"
    ):
        check_deadlines(config("trainer=ddp", *remote, "reward.client.deadline=400"))
    cfg = config("trainer=ddp", "reward=shapes_jpeg", "+http@reward.rewards.judge.client=default")
    cfg.trainer.strategy.timeout_minutes = 15
    with pytest.raises(ValueError, match=r"reward\.rewards\.judge\.client\.deadline=300"):
        check_deadlines(cfg)
    cfg.trainer.strategy.timeout_minutes = 20
    check_deadlines(cfg)
    OmegaConf.set_struct(cfg, False)
    cfg.reward.rewards.second = cfg.reward.rewards.judge
    with pytest.raises(
        ValueError, match=r"judge\.client.* \+ reward\.rewards\.second\.client\.deadline=300"
    ):
        check_deadlines(cfg)


def test_a_hanging_scorer_is_given_up_before_other_processes_are():
    """900 s are less than 20 minutes; 1200 s are not. One process waits for nobody, and null is the
    user's choice.

    Mutation: compare minutes with seconds, or allow equality.
    """
    check_deadlines(config("trainer=ddp"))
    check_deadlines(config("trainer=ddp", "scorer_timeout=null"))
    check_deadlines(config("scorer_timeout=1200"))
    with pytest.raises(
        ValueError, match=r"scorer_timeout=1200 seconds .* trainer\.strategy\.timeout_minutes=20"
    ):
        check_deadlines(config("trainer=ddp", "scorer_timeout=1200"))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "null", "none"])
def test_a_norm_that_would_break_gradients_is_refused(value):
    """Lightning's 0 and null for no clipping are not ours; the remedy is told. Mutation: take any
    number.
    """
    with pytest.raises(
        ValueError, match=r"max_grad_norm=.* must be above 0; for no clipping set it to \.inf"
    ):
        validate(config(f"max_grad_norm={value}"))


@pytest.mark.parametrize("value", ["inf", ".inf"])
def test_gradients_need_not_be_clipped(value):
    """As Hydra and as YAML spell it, also where a resumed run takes an override. Mutation: know one
    spelling only.
    """
    weight = torch.nn.Parameter(torch.zeros(2))
    for cfg in (
        config(f"max_grad_norm={value}"),
        OmegaConf.from_dotlist([f"max_grad_norm={value}"]),
    ):
        weight.grad = torch.tensor([3e9, 4e9])
        assert clip([weight], norm_limit(cfg.max_grad_norm)) == 5e9
        assert weight.grad.tolist() == [3e9, 4e9]
    assert norm_limit(config().max_grad_norm) == 1


def test_a_run_refuses_a_bad_norm_before_weights_load():
    """Mutation: read the configuration unchecked."""
    with pytest.raises(ValueError, match="max_grad_norm=0 must"):
        build(config("max_grad_norm=0", "model.pretrained=/nowhere"))


@pytest.mark.parametrize("value", ["inf", ".inf"])
def test_a_run_takes_either_spelling_of_no_clipping(value):
    """Mutation: refuse one, or hand on the word."""
    cfg = config(f"max_grad_norm={value}")
    validate(cfg)
    assert prepare(cfg).max_grad_norm == math.inf
