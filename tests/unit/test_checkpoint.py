import errno
import os
import shutil
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

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
