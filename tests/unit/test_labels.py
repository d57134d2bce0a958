"""The labels by which trackers tell runs apart."""

import pytest
from omegaconf import OmegaConf

from flowrl.launch.labels import HYDRAS, choices_of, columns, condition, fill, swept_keys


def config(**keys):
    base = {
        "name": "shapes-cps-dppo",
        "seed": 0,
        "loss": {"delta": 1e-6},
        "num_iterations": 2,
        "condition": None,
        "sweep": None,
        "choices": None,
    }
    return OmegaConf.create(base | keys)


def of_hydra(*overrides, **choices):
    return OmegaConf.create(
        {"overrides": {"task": list(overrides)}, "runtime": {"choices": dict(choices)}}
    )


def test_a_condition_is_named_by_what_was_asked_for():
    """Not by the seed, by what has no effect on its numbers, nor twice by an option.

    Mutation: keep the seed, the logger, or an option that the name has.
    """
    overrides = ["loss=dppo", "+debug=smoke", "loss.delta=1e-6", "seed=3", "logger=csv", "~ema"]
    label, _, digest = condition(config(), overrides).partition(" #")
    assert label == "shapes-cps-dppo debug=smoke loss.delta=1e-6 ~ema"
    assert len(digest) == 6
    assert condition(config(name="mine"), ["loss=dppo"]).startswith("mine loss=dppo #")


def test_a_condition_stands_for_all_that_decides_the_numbers():
    """Mutation: let the digest follow the seed or the folder, or only the overrides."""
    same = condition(config(), [])
    assert condition(config(seed=7, run_dir="x", logger={"a": 1}, tags=["x"]), []) == same
    assert condition(config(loss={"delta": 1e-5}), []) != same
    assert condition(config(num_iterations=3), []) != same


def test_a_sweeps_jobs_are_told_apart_by_what_it_varies(tmp_path):
    """Mutation: name what all jobs have in common, or forget the sweeper's own parameters."""
    hydra = {
        "overrides": {"task": ["num_iterations=5", "loss.delta=1e-6,1e-5", "seed=range(2)"]},
        "sweeper": {"params": {"+optimizer.lr": "1e-3,1e-4"}},
    }
    OmegaConf.save(OmegaConf.create({"hydra": hydra}), tmp_path / HYDRAS)
    assert swept_keys(tmp_path) == {"loss.delta", "seed", "optimizer.lr"}
    cfg = config(num_iterations=5)
    fill(cfg, of_hydra("num_iterations=5", "loss.delta=1e-6", "seed=1"), tmp_path)
    assert cfg.condition.startswith("shapes-cps-dppo loss.delta=1e-6 #")
    assert cfg.sweep == tmp_path.name
    (tmp_path / HYDRAS).write_text("{")
    assert swept_keys(tmp_path) == swept_keys(tmp_path / "none") == set()


def test_labels_that_were_given_stay(tmp_path):
    """Mutation: name a resumed run by the launch that resumes it, or add keys."""
    cfg = config(condition="mine", sweep="before", choices={"loss": "x"})
    fill(cfg, of_hydra("seed=1", loss="dppo"), tmp_path)
    assert (cfg.condition, cfg.sweep, cfg.choices) == ("mine", "before", {"loss": "x"})
    private = OmegaConf.create({"name": "x"})
    fill(private, of_hydra("seed=1", loss="dppo"), tmp_path)
    assert private == {"name": "x"}


def test_choices_are_those_of_the_configuration():
    """Mutation: keep Hydra's own groups, or those without an option."""
    hydra = of_hydra(**{"loss": "dppo", "debug": None, "hydra/launcher": "pool"})
    assert choices_of(hydra) == {"loss": "dppo"}


@pytest.mark.parametrize("key", ["algorithm.loss", "algorithm.num_steps", "tuning"])
def test_no_column_repeats_another(key):
    """Mutation: log copies of nodes, or leave out a key that runs override."""
    cfg = OmegaConf.create(
        {
            "loss": {"delta": "${trust.delta}", "clip": 1},
            "trust": {"delta": 1e-6},
            "lora": {"rank": 4},
            "tuning": "${lora}",
            "num_steps": 6,
            "algorithm": {"_target_": "A", "loss": "${loss}", "num_steps": "${num_steps}", "x": 1},
        }
    )
    logged = columns(cfg)
    assert OmegaConf.select(OmegaConf.create(logged), key) is None
    assert logged["loss"] == {"delta": 1e-6, "clip": 1}
    assert logged["algorithm"] == {"_target_": "A", "x": 1}


def test_a_condition_shows_no_secret_and_no_address():
    """And nothing in it is resolved. Mutation: show all that was typed, or cut an interpolation."""
    cfg = config()
    words = ["reward.api_key=S3cret", "reward.base_url=http://gpu1:8000", "a=${" + "b" * 90 + "}"]
    text = condition(cfg, words)
    assert "S3cret" not in text and "gpu1" not in text
    assert OmegaConf.create({"condition": text}).condition.startswith(f"{cfg.name} a=${{bbb")
