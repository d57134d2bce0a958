import errno
import os
import shutil
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from flowrl.errors import UserError
from flowrl.runs import checkpoint
from flowrl.runs.disk import DiskFull
from flowrl.runs.files import grant_usual_mode
from flowrl.tuning.lora_file import LoRAFile
from flowrl.tuning.writer import write


def save(folder, iteration, keep=2, **state):
    weights = {"lora": {"a": torch.full((3,), float(iteration))}, "ema": {"a": torch.zeros(3)}}
    return checkpoint.save(
        folder, keep=keep, weights=weights, state={"num_iterations": iteration, **state}
    )


def test_round_trip(tmp_path):
    """Mutation: write another dtype, or lose the state."""
    weights = {"lora": {"a": torch.randn(3, 2).t(), "b": torch.tensor(7, dtype=torch.int64)}}
    path = checkpoint.save(
        tmp_path, keep=1, weights=weights, state={"num_iterations": 12, "record": {"x": [1.5]}}
    )
    loaded, state = checkpoint.load(path)
    assert state == {"num_iterations": 12, "record": {"x": [1.5]}}
    assert loaded["lora"].keys() == {"a", "b"}
    assert all(torch.equal(loaded["lora"][name], value) for name, value in weights["lora"].items())


def test_whoever_may_read_new_files_may_read_weights(tmp_path):
    """The files of a checkpoint, of an exported LoRA and of a whole pipeline's folder alike.

    Mutation: leave safetensors' files as the library makes them, for their owner alone.
    """
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    lora_file = LoRAFile({"to_q": torch.ones(1, 2)}, {"to_q": torch.ones(2, 1)}, {"to_q": 1.0})
    paths = [*save(tmp_path, 1).iterdir(), write(lora_file, tmp_path / "lora", "comfy")]
    folder = tmp_path / "pipeline" / "vae"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch(0o600)
    grant_usual_mode(tmp_path / "pipeline")
    paths.append(folder / "model.safetensors")
    assert {path.name: path.stat().st_mode for path in paths} == {
        path.name: usual for path in paths
    }


def test_newest_are_kept_in_order_of_iteration(tmp_path):
    """Mutation: delete the newest, or sort names as text without padding."""
    for iteration in (8, 9, 10, 100):
        save(tmp_path, iteration)
    assert [int(path.name) for path in checkpoint.list_with_state(tmp_path)] == [10, 100]
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [10, 100]


def test_a_million_comes_after_what_has_six_digits(tmp_path):
    """Mutation: sort names as text, which would delete the newest checkpoint, or take the old one
    for newer.
    """
    for iteration in (999_999, 1_000_000):
        save(tmp_path, iteration, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["1000000"]
    for iteration in (999_999, 1_000_001):
        save(tmp_path, iteration, keep=9)
    names = [path.name for path in checkpoint.list_with_state(tmp_path)]
    assert names == ["999999", "1000000", "1000001"]
    checkpoint.set_aside_after(tmp_path / "1000000")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["1000000", "1000001.damaged", "999999"]


def test_of_two_leftovers_that_of_the_later_iteration_is_taken(tmp_path):
    """Mutation: compare their numbers as texts."""
    for iteration in (999_999, 1_000_000):
        save(tmp_path, iteration, keep=9)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_suffix(".partial"))
    path, _, _ = checkpoint.load_newest(tmp_path, STEMS)
    assert path.name == "1000000.partial"


def test_the_disk_has_a_checkpoint_before_another_one_goes(tmp_path, monkeypatch):
    """Files, the names of them, and after the rename the folder's; only then old ones are deleted.

    Mutation: wait for the files alone, before the rename, or after the deletion.
    """
    save(tmp_path, 1, keep=1)
    events, names = [], {}
    original = {"open": os.open, "fsync": os.fsync, "rename": Path.rename, "rmtree": shutil.rmtree}

    def open_and_note(path, *args, **options):
        descriptor = original["open"](path, *args, **options)
        names[descriptor] = Path(path).name
        return descriptor

    def note(event, name, result):
        events.append((event, name))
        return result

    monkeypatch.setattr(os, "open", open_and_note)
    monkeypatch.setattr(os, "fsync", lambda file: note("sync", names[file], None))
    monkeypatch.setattr(
        Path, "rename", lambda path, to: note("rename", path.name, original["rename"](path, to))
    )
    monkeypatch.setattr(
        shutil,
        "rmtree",
        lambda path, *args, **options: note(
            "remove", Path(path).name, original["rmtree"](path, *args, **options)
        ),
    )
    save(tmp_path, 2, keep=1)
    files = {"lora.safetensors", "ema.safetensors", "state.json", "SHA256SUMS"}
    assert {name for _, name in events[:4]} == files
    assert events[4:7] == [
        ("sync", "000002.partial"),
        ("rename", "000002.partial"),
        ("sync", tmp_path.name),
    ]
    assert ("rename", "000001") in events[7:]
    assert ("remove", "000001.deleted") in events[7:]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_a_file_system_that_cannot_wait_for_a_folder_takes_checkpoints(
    number, tmp_path, monkeypatch
):
    """Another error is one. Mutation: refuse to save where there is no such promise, or let a disk
    that fails pass.
    """
    sync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with pytest.raises(OSError) if number == errno.EIO else nullcontext():
        save(tmp_path, 1)
    names = [path.name for path in checkpoint.list_with_state(tmp_path)]
    assert names == ([] if number == errno.EIO else ["000001"])


def test_a_save_that_dies_is_never_picked_up(tmp_path):
    """The state cannot be written, after the weights were. Mutation: write into the final
    folder.
    """
    save(tmp_path, 1)
    with pytest.raises(TypeError):
        save(tmp_path, 2, broken=object())
    assert [path.name for path in checkpoint.list_with_state(tmp_path)] == ["000001"]
    save(tmp_path, 2)
    assert [path.name for path in checkpoint.list_with_state(tmp_path)] == ["000001", "000002"]
    assert checkpoint.load(tmp_path / "000002")[0]["lora"]["a"].tolist() == [2, 2, 2]


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


def test_optimizer_continues_bitwise(tmp_path):
    """AdamW saved after 3 of 6 steps ends at the same weights; the new learning rate is the new
    optimizer's own.

    Mutation: lose `step` (bias correction) or swap the moments.
    """

    def build(start, lr=0.1):
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        return parameters, torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)

    def advance(parameters, optimizer, steps):
        for step in steps:
            for i, parameter in enumerate(parameters):
                parameter.grad = (
                    torch.full_like(parameter, 0.5 + step) * (i - 2) + parameter.detach()
                )
            optimizer.step()

    start = [torch.ones(2, 2), torch.full((3,), -1.0)]
    whole, optimizer = build(start)
    advance(whole, optimizer, range(3))
    tensors = {"optimizer": checkpoint.optimizer_tensors(optimizer)}
    path = checkpoint.save(tmp_path, keep=1, weights=tensors, state={"num_iterations": 3})
    resumed, fresh = build(whole)
    checkpoint.load_optimizer_tensors(fresh, checkpoint.load(path)[0]["optimizer"])
    advance(whole, optimizer, range(3, 6))
    advance(resumed, fresh, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    _, slower = build(start, lr=0.01)
    checkpoint.load_optimizer_tensors(slower, tensors["optimizer"])
    assert slower.param_groups[0]["lr"] == 0.01


STEMS = ("lora", "ema")


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


def test_what_kills_left_behind_is_removed(tmp_path):
    """Mutation: remove only the folder that is written next."""
    save(tmp_path, 5)
    for name in ("000006.deleted", "000007.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lora.safetensors").write_bytes(b"half")
    save(tmp_path, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000005", "000008"]


@pytest.mark.parametrize("place", ["safetensors", "state.json", "fsync"])
def test_a_full_disk_is_told_with_what_is_needed(tmp_path, monkeypatch, place):
    """The checkpoint before stays, and what was half written gives its space back.

    Mutation: delete the old checkpoint first, leave the half-written one, or let the library's
    error through.
    """

    def full(*args, **kwargs):
        if place == "safetensors":
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"safetensors": "flowrl.runs.checkpoint.save_file", "fsync": "os.fsync"}.get(place)
    save(tmp_path, 1, keep=1)
    monkeypatch.setattr(target or "pathlib.Path.write_text", full)
    with pytest.raises(DiskFull, match=r"000002: a checkpoint takes 24 bytes, and .* are free"):
        save(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["000001"]
    assert checkpoint.load(tmp_path / "000001")[0]["lora"]["a"].tolist() == [1, 1, 1]


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
