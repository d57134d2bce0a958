"""What a resumed run starts from: its files after accidents, and changes that are told."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowrl.errors import UserError
from flowrl.launch.changes import overridden, refuse_without_iterations
from flowrl.launch.compose import compose
from flowrl.launch.harmless import HARMLESS, is_harmless
from flowrl.launch.resume import _lacking, read_config, read_source, write_config
from flowrl.runs.changes import Change
from flowrl.runs.files import SOURCE


@pytest.fixture
def run(tmp_path):
    """A run's folder with the configuration of debug=smoke."""
    write_config(compose(["name=test", "debug=smoke", f"run_dir={tmp_path}"]), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\n",
        b"- a\n- b\n",
        b"seed: 0\n\tname: x\n",
        b"seed: [0\n",
        bytes(range(256)),
        b"a: ${b\n",
    ],
)
def test_a_damaged_source_is_named_with_the_remedy(damage, tmp_path):
    """Mutation: let the parser's error through, or go on with an empty configuration."""
    (tmp_path / SOURCE).write_bytes(damage)
    expected = r"source.yaml is damaged \(.*\); restore it, or copy config.yaml over it"
    with pytest.raises(UserError, match=expected) as told:
        read_source(tmp_path)
    assert "\n" not in str(told.value)
    (tmp_path / SOURCE).unlink()
    with pytest.raises(UserError, match=r"source.yaml is missing; restore it"):
        read_source(tmp_path)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_half_a_source_is_never_a_smaller_run(run, data):
    """Cut at any place or with a byte changed: told as damaged, as keys that it lacks, as a change,
    or harmless.

    Mutation: resume with the keys that are left and the defaults of the others.
    """
    before = read_config(run)
    whole = (run / SOURCE).read_bytes()
    content = bytearray(whole)
    place = data.draw(st.integers(0, len(content) - 2))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    try:
        (run / SOURCE).write_bytes(content)
        saved = read_source(run)
        resolved = OmegaConf.to_container(saved, resolve=True)
    except (UserError, OmegaConfBaseException) as error:
        assert str(error)
        return
    finally:
        (run / SOURCE).write_bytes(whole)
    if resolved != before:
        is_interpolation_changed = OmegaConf.to_container(saved) != OmegaConf.to_container(
            read_source(run)
        )
        assert (
            _lacking(before, OmegaConf.to_container(saved))
            or overridden(before, saved)
            or is_interpolation_changed
        )


def test_what_decides_the_numbers_is_told_and_the_rest_is_not(run):
    """A changed number once, under the key that was given, and a new key; none that only says where
    or how fast.

    Mutation: tell of num_iterations alone, or of every copy of a value.
    """
    before, saved = read_config(run), read_source(run)
    same = [
        "num_threads=1",
        "checkpoint.keep=9",
        "batch.max_micro_batch=2",
        "viewing.every=7",
        "trainer.devices=2",
    ]
    changed = [
        "seed=1",
        "lora.alpha=64",
        "ema.decay=0.9",
        "batch.group_size=8",
        "num_iterations=3",
    ]
    assert overridden(before, saved) == []
    assert overridden(before, OmegaConf.merge(saved, OmegaConf.from_dotlist(same))) == []
    texts = overridden(
        before, OmegaConf.merge(saved, OmegaConf.from_dotlist([*changed, "loss.fresh=1"]))
    )
    assert sorted(map(str, texts)) == [
        "batch.group_size 4 -> 8",
        "ema.decay 0.95 -> 0.9",
        "lora.alpha 32 -> 64",
        "loss.fresh none -> 1",
        "num_iterations 2 -> 3",
        "seed 0 -> 1",
    ]


def test_a_finished_run_keeps_its_record():
    """Only `num_iterations` gives it more to do; lowered, it ends a run where it stands.

    Mutation: write keys into its record that no iteration was done with.
    """
    seed = Change("seed", "0", "5")
    lowered = Change("num_iterations", "9", "4")
    refuse_without_iterations(Path("run"), [], 4, 4)
    refuse_without_iterations(Path("run"), [lowered], 4, 4)
    refuse_without_iterations(Path("run"), [seed], 4, 5)
    expected = (
        "^run is finished after 4 iterations; raise num_iterations to go on, or leave out seed=5, "
        "which would change nothing but its record$"
    )
    with pytest.raises(UserError, match=expected):
        refuse_without_iterations(Path("run"), [lowered, seed], 4, 4)


def test_harmless_keys_exist_and_have_a_reason():
    """Mutation: rename a key of conf/ without this list."""
    cfg = compose(["name=test"])
    assert all(
        OmegaConf.select(cfg, key, throw_on_missing=False) is not None or key in cfg
        for key in HARMLESS
    )
    assert all(reason for reason in HARMLESS.values())


def test_how_a_server_is_asked_is_harmless():
    """Mutation: tell of a time-out or an address, or pass over a judge's model."""
    for key in (
        "reward.url",
        "reward.client.timeout",
        "reward.rewards.first.judge.client.retries",
        "scorer_timeout",
    ):
        assert is_harmless(key)
    assert is_harmless("trust_folder") and is_harmless("evaluation.batch_size")
    for key in ("reward.judge.model", "reward.weights", "evaluation.seed", "data.url"):
        assert not is_harmless(key)
