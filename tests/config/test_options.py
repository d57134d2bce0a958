"""Every YAML under conf/ composes, and a name that is none of its keys or options is told."""

import inspect

import pytest
from conf_options import BASE, OPTIONS, options, select
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from runs import CONF, composed

from flowrl.launch.errors import explain
from flowrl.values.wording import meant


def targets(node, path=""):
    """(path, node) of every `_target_`, from the unresolved configuration."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in node:
            if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
                yield from targets(node[key], f"{path}.{key}")


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
        assert select(BASE, name).keys() == composed().keys()


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
        composed(override)
    assert override.split("=")[0] in explain(error.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "loss=dpoo",
            "loss=dpoo: no such option (did you mean 'dppo'?); choose one of awm, cppo, cps, dgpo",
        ),
        ("loss=zzzz", "loss=zzzz: no such option; choose one of awm, cppo, cps, dgpo"),
        ("model=sd35", "model=sd35: no such option (did you mean 'sd35_large' or 'sd35_medium'?)"),
        ("lr=1e-4", "lr: unknown configuration key (did you mean 'optimizer.lr'?)"),
        (
            "noise_level=1",
            "noise_level: unknown configuration key (did you mean 'sampler.noise_level'?)",
        ),
        (
            "model.lora.targets=x",
            "model.lora.targets: unknown configuration key (did you mean 'lora.targets'?)",
        ),
        ("trust.dleta=1", "trust.dleta: unknown configuration key (did you mean 'trust.delta'?)"),
        # Nothing below `trainer` is like it, though a key of another group is.
        ("trainer.precision=16", "trainer.precision: unknown configuration key;"),
        ("lor=1", "lor: unknown configuration key (did you mean 'lora'?)"),
        ("seed=0,1", "seed=0,1: several values are a sweep, add -m"),
    ],
)
def test_what_was_meant_is_said_first(override, told):
    """Mutation: suggest nothing, or whatever is first; show Hydra's own paragraph."""
    with pytest.raises(HydraException) as error:
        composed(override)
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
    cfg = composed("data=compositions", "tuning=full", *remote)
    OmegaConf.set_struct(cfg, False)
    del OmegaConf.select(cfg, group)[key]
    with pytest.raises(InstantiationException) as error:
        instantiate(cfg[group.split(".")[0]])
    assert f"missing configuration key '{key}'" in explain(error.value)
    assert f"++{group.split('.')[-1]}.{key}=VALUE" in explain(error.value).replace(
        "data.", ""
    ).replace("reward.", "")
