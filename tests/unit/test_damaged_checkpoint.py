import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowrl.errors import UserError
from flowrl.runs import checkpoint

STEMS = ("lora", "ema")


def save(folder, iteration, keep=2, **state):
    weights = {"lora": {"a": torch.full((3,), float(iteration))}, "ema": {"a": torch.zeros(3)}}
    return checkpoint.save(
        folder, keep=keep, weights=weights, state={"num_iterations": iteration, **state}
    )


def test_of_two_leftovers_that_of_the_later_iteration_is_taken(tmp_path):
    """Mutation: compare their numbers as texts."""
    for iteration in (999_999, 1_000_000):
        save(tmp_path, iteration, keep=9)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_suffix(".partial"))
    path, _, _ = checkpoint.load_newest(tmp_path, STEMS)
    assert path.name == "1000000.partial"


@pytest.mark.parametrize("step", range(1, 5))
@pytest.mark.parametrize("moment", ["before", "half-way", "after"])
def test_a_kill_while_saving_again_leaves_a_whole_checkpoint(tmp_path, monkeypatch, step, moment):
    """With the only checkpoint saved a second time, a kill at each rename and deletion, and then a
    sweep.

    Mutation: delete the old folder before the new one stands, pass leftovers over, or sweep the
    only whole one away.
    """
    rename, rmtree, count = Path.rename, shutil.rmtree, 0

    def killed(operation):
        def run(path, *args, **kwargs):
            nonlocal count
            count += 1
            if count == step and moment == "before":
                raise KeyboardInterrupt
            if count == step and moment == "half-way" and operation is rmtree and path.is_dir():
                sorted(path.glob("*.safetensors"))[0].unlink()
                raise KeyboardInterrupt
            result = operation(path, *args, **kwargs)
            if count == step:
                raise KeyboardInterrupt
            return result

        return run

    save(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", killed(rename))
        patch.setattr("shutil.rmtree", killed(rmtree))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1, keep=1)
    for path in checkpoint.list_with_state(tmp_path):
        checkpoint.load(path, STEMS)
    path, weights, state = checkpoint.load_newest(tmp_path, STEMS)
    assert state == {"num_iterations": 1} and weights["lora"]["a"].tolist() == [1, 1, 1]
    checkpoint.set_aside_after(path)
    checkpoint.remove_leftovers(tmp_path)
    assert checkpoint.load_newest(tmp_path, STEMS)[0] == path and len(list(tmp_path.iterdir())) == 1
    save(tmp_path, 2)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["000001", "000002"]


def test_a_whole_leftover_is_not_lost_to_a_damaged_checkpoint(tmp_path):
    """Of the same iteration, which is saved again. Mutation: look only whether there is a numbered
    folder.
    """
    save(tmp_path, 1).rename(tmp_path / "000001.deleted")
    (save_damaged(tmp_path) / "state.json").write_text("{}")
    assert checkpoint.load_newest(tmp_path, STEMS)[0].name == "000001.deleted"
    checkpoint.remove_leftovers(tmp_path)
    checkpoint.set_aside_after(tmp_path / "000001.deleted")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["000001.damaged", "000001.deleted"]


def save_damaged(folder):
    """A folder with the number of a checkpoint that a copy has cut short."""
    path = folder / "000001"
    path.mkdir()
    return path


@pytest.mark.parametrize("name", ["lora.safetensors", "state.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    """Mutation: let the reader's own error through."""
    path = save(tmp_path, 1) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=name):
        checkpoint.load(path.parent)


@pytest.mark.parametrize(
    "accident",
    [
        lambda path: (path / "state.json").write_text("{}"),
        lambda path: (path / "state.json").write_text("[]"),
        lambda path: (path / "state.json").write_bytes(bytes(range(256))),
        lambda path: (path / "state.json").unlink(),
        lambda path: [file.unlink() for file in path.glob("*.safetensors")],
        lambda path: (path / "lora.safetensors").write_bytes(b""),
        lambda path: (path / "ema.safetensors").unlink(),
    ],
)
@pytest.mark.parametrize("has_sums", [True, False])
def test_the_newest_whole_one_is_taken(tmp_path, caplog, accident, has_sums):
    """With digests and, as earlier versions wrote them, without; what is passed over is said and
    set aside.

    Mutation: take the newest folder that has a state.json, or let the damaged one count among those
    to keep.
    """
    for iteration in (1, 2):
        save(tmp_path, iteration)
    accident(tmp_path / "000002")
    if not has_sums:
        (tmp_path / "000002" / checkpoint.SUMS).unlink()
    path, weights, state = checkpoint.load_newest(tmp_path, STEMS)
    assert (
        path == tmp_path / "000001"
        and state == {"num_iterations": 1}
        and weights["lora"]["a"].tolist() == [1, 1, 1]
    )
    (message,) = caplog.messages
    assert (
        str(tmp_path / "000002") in message
        and "is damaged" in message
        and "going on from" in message
    )
    checkpoint.set_aside_after(path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["000001", "000002.damaged"]
    save(tmp_path, 2, keep=1)
    assert [each.name for each in checkpoint.list_with_state(tmp_path)] == ["000002"]


def test_two_damaged_ones_are_told_and_none_is_a_start(tmp_path):
    """Mutation: start from the beginning where no checkpoint is whole."""
    assert checkpoint.load_newest(tmp_path, STEMS) is None
    for iteration in (1, 2):
        (save(tmp_path, iteration) / "state.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"000002/state.json is damaged .* as are the 1 before it; restore one"
    ):
        checkpoint.load_newest(tmp_path, STEMS)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), has_sums=st.booleans())
def test_any_damage_is_found(tmp_path, data, has_sums):
    """Any file cut or with a byte changed: another checkpoint, or one line, and with digests never
    other weights.

    Mutation: let an error of json, unicode or safetensors through, or leave the digests unread.
    """
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    path = save(folder, 3, record={"seconds": 12.5})
    whole = checkpoint.load(path)
    if not has_sums:
        (path / checkpoint.SUMS).unlink()
    file = path / data.draw(st.sampled_from(sorted(each.name for each in path.iterdir())))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    try:
        weights, state = checkpoint.load(path, STEMS, {"num_iterations": int, "record": dict})
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    if has_sums:
        assert state == whole[1] and torch.equal(weights["lora"]["a"], whole[0]["lora"]["a"])


@pytest.mark.parametrize("cut", ["", "first line", "one more file"])
def test_a_list_of_digests_names_every_file(tmp_path, cut):
    """Mutation: compare only the files that SHA256SUMS names, so that an empty one turns the
    comparison off.
    """
    path = save(tmp_path, 1)
    sums = path / checkpoint.SUMS
    if cut == "one more file":
        (path / "optimizer.safetensors").write_bytes((path / "ema.safetensors").read_bytes())
    else:
        sums.write_text(sums.read_text().splitlines(keepends=True)[0] if cut else "")
    with pytest.raises(UserError, match=r"000001 is damaged \(SHA256SUMS lacks [a-z.]+\)"):
        checkpoint.load(path)


@pytest.mark.parametrize("record", [None, [], 3])
def test_a_state_of_another_kind_is_damage(tmp_path, record):
    """As its reader would fail on it. Mutation: ask only whether the key is there."""
    save(tmp_path, 1, record={})
    save(tmp_path, 2, record=record)
    assert checkpoint.load_newest(tmp_path, STEMS, {"record": dict})[0].name == "000001"
    with pytest.raises(
        UserError, match=r"000002/state.json is damaged \(record is a (NoneType|list|int)\)"
    ):
        checkpoint.load(tmp_path / "000002", STEMS, {"record": dict})
