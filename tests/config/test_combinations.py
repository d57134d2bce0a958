"""Options together: each combination that needs no weights instantiates or is refused, and some
options set values of other groups.
"""

import itertools
import json

import pytest
from conf_options import options, select
from hydra.utils import instantiate
from omegaconf import OmegaConf
from runs import composed

from flowrl.algorithm import Algorithm
from flowrl.evaluation.evaluator import Evaluator
from flowrl.launch.compose import register_resolvers
from flowrl.launch.errors import explain
from flowrl.objectives import check_method, stochastic_steps
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.ema import EMA
from flowrl.training.prompt_data import PromptData
from flowrl.tuning.lora import LoRA
from flowrl.types import Prompt

NEEDED = {"guard": "flow_sde", "cps": "cps"}
PATHS = (("data.prompts.path", "mine"), ("evaluation.sets.held_in.path", "others"))
FORMS = {"cps": "unnormalised"}
"""The log-probability form that a loss's YAML brings along."""
FORWARD = ("awm", "dgpo", "epg", "flow_dpo", "forward_dppo", "nft", "par", "pepg")
"""Losses over samples that are noised again."""
UNSHARED = (*FORWARD, "draft")
"""These and a direct loss: their rollouts are deterministic."""
TWICE_SHIFTED = ("schedule=diffusers", "grid.shift=3")
"""diffusers' grid for SD3.5, whose last step begins at a sigma of .0089."""


@pytest.fixture(scope="module")
def base():
    return composed()


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


def is_legal(sampler, loss, penalty, steps):
    """The rules between sampler, loss, penalty and steps, written down once more."""
    if loss == "cppo" and steps == "branch":
        return False
    is_deterministic = sampler in ("ode", "dpm2")
    if loss in UNSHARED:
        return is_deterministic and penalty in ("none", "velocity")
    if loss in NEEDED:
        return sampler == NEEDED[loss]
    return not is_deterministic


@pytest.mark.parametrize("loss", options("loss"))
@pytest.mark.parametrize("sampler", options("sampler"))
def test_every_combination_instantiates_or_is_refused_by_name(base, nodes, sampler, loss):
    """Mutation: lose a rule between sampler, loss and penalty, or refuse a good combination."""
    rest = [nodes[group].items() for group in ("steps", "penalty", "advantage")]
    for (steps, steps_node), (penalty, penalty_node), (_, advantage) in itertools.product(*rest):
        chosen = {"steps": steps_node, "penalty": penalty_node, "advantage": advantage}
        cfg = combine(base, sampler=nodes["sampler"][sampler], loss=nodes["loss"][loss], **chosen)
        cfg.likelihood.form = FORMS.get(loss, "gaussian")
        cfg.rollout.shared_initial_noise = loss not in UNSHARED
        if is_legal(sampler, loss, penalty, steps):
            algorithm = instantiate(cfg.algorithm)
            assert isinstance(algorithm, Algorithm)
            check_method(algorithm)
            assert len(stochastic_steps(algorithm, iteration=0, seed=0, prompt=0)) == (
                0 if loss in UNSHARED else len(algorithm.steps.draw(6, 0, 0, 0))
            )
        else:
            with pytest.raises(
                Exception, match=r"(?s)loss.*(sampler|penalty|steps)|sampler.*loss"
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
    text = composed("data=text", f"data.prompts.path={tmp_path}/prompts.txt")
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
        (("loss=draft",), ("loss=draft", "sampler=cps", "sampler=ode")),
        (
            ("loss=draft", "sampler=ode", "penalty=kl"),
            ("loss=draft", "penalty.form=kl", "penalty=velocity"),
        ),
        (
            ("loss=draft", "sampler=ode", "rollout.shared_initial_noise=true"),
            ("loss=draft", "shared_initial_noise"),
        ),
        (
            ("loss=draft", "sampler=ode", "loss.last_steps=7"),
            ("loss.last_steps=7", "rollout.num_steps=6"),
        ),
        (
            ("loss=draft", "sampler=dpm2", "loss.last_steps=2"),
            ("loss.last_steps=2", "sampler=dpm2", "sampler=ode"),
        ),
        (
            ("loss=draft", "sampler=ode", "loss.last_steps=2", "loss.num_noises=1"),
            ("loss.num_noises=1", "loss.last_steps=1"),
        ),
        (
            ("loss=draft", "sampler=ode", "loss.path=jump", "loss.num_noises=1"),
            ("loss.num_noises=1", "loss.path=steps"),
        ),
        (
            ("loss=draft", "sampler=ode", *TWICE_SHIFTED, "loss.num_noises=2"),
            ("loss.last_steps=1", "loss.num_noises=2", "0.0089 < 0.01", "schedule=linear_shift"),
        ),
        (
            ("loss=draft", "sampler=ode", *TWICE_SHIFTED, "rollout.num_steps=40"),
            ("loss.last_steps=1", "rollout.num_steps=40", "0.0089 < 0.01"),
        ),
        (
            ("steps=branch", "rollout.shared_initial_noise=false"),
            ("steps=branch", "rollout.shared_initial_noise=false", "set it to true"),
        ),
        (
            ("experiment=tempflow_grpo", "rollout.shared_initial_noise=false"),
            ("steps=branch", "rollout.shared_initial_noise=false"),
        ),
        (
            ("experiment=flow_grpo_sd35", "loss=tempflow", "steps=branch"),
            ("steps=branch", "rollout.shared_initial_noise=false"),
        ),
        (
            ("experiment=tempflow_grpo", "loss=cppo"),
            ("loss=cppo looks back", "makes 1", "steps=all_but_last"),
        ),
        (
            ("rollout.guidance_scale=4.5", "rollout.training_guidance_scale=1"),
            ("rollout.training_guidance_scale=1", "rollout.guidance_scale=4.5", "loss=dppo"),
        ),
        (
            ("loss=draft", "sampler=ode", "rollout.training_guidance_scale=2"),
            ("rollout.training_guidance_scale=2", "rollout.guidance_scale=1", "loss=draft"),
        ),
        (("loss=cppo", "steps.count=1"), ("loss=cppo looks back", "makes 1")),
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
        check_method(instantiate(composed(*overrides).algorithm))
    assert all(name in explain(error.value) for name in names), explain(error.value)


def test_more_steps_of_a_grid_that_ends_near_the_data_are_trained():
    """Of its last two steps the first begins far from the data. Mutation: refuse the grid whatever
    is trained.
    """
    words = ("loss=draft", "sampler=ode", *TWICE_SHIFTED, "loss.last_steps=2")
    algorithm = instantiate(composed(*words).algorithm)
    assert algorithm.intervals[-1].sigma < 0.01 < algorithm.intervals[-2].sigma
    check_method(algorithm)


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
    evaluator = instantiate(composed(f"data={data}", *given).evaluation)
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
        assert len(instantiate(composed(f"data={data}", *given, others).evaluation).prompts) == 3
    assert (
        list(instantiate(composed(f"data={data}", *given, "evaluation=shapes").evaluation).sets)[1]
        == "held_out"
    )


def test_compositions_are_evaluated_on_what_training_never_draws():
    """The first 3,000 of training and all 128 of the evaluation, by words and by questions.

    Mutation: one split for both, whatever their seeds.
    """
    cfg = composed("data=compositions", "data.prompts.count=3000", "data.prompts.seed=2")

    def marks(prompts):
        asked = {frozenset(map(tuple, prompt.metadata["vqa_list"])) for prompt in prompts}
        return {prompt.text.replace(",", "") for prompt in prompts}, asked

    train, test = marks(instantiate(cfg.data).prompts), marks(instantiate(cfg.evaluation).prompts)
    assert (len(train[0]), len(test[0])) == (3000, 128)
    assert not train[0] & test[0] and not train[1] & test[1]


def test_a_reward_may_set_the_headline():
    """Mutation: compose the evaluation after the reward, which then loses its headline."""
    assert composed("reward=shapes_mixture").evaluation.headline == "correct_strict"
    assert composed().evaluation.headline == "strict"
