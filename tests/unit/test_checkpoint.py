import pytest
import torch

from flowrl.runs import checkpoint


def save(folder, iteration, keep=2, **state):
    weights = {"lora": {"a": torch.full((3,), float(iteration))}, "ema": {"a": torch.zeros(3)}}
    return checkpoint.save(folder, keep=keep, weights=weights, state={"num_iterations": iteration, **state})


def test_round_trip(tmp_path):
    """Mutation: write another dtype, or lose the state."""
    weights = {"lora": {"a": torch.randn(3, 2).t(), "b": torch.tensor(7, dtype=torch.int64)}}
    path = checkpoint.save(tmp_path, keep=1, weights=weights, state={"num_iterations": 12, "record": {"x": [1.5]}})
    loaded, state = checkpoint.load(path)
    assert state == {"num_iterations": 12, "record": {"x": [1.5]}}
    assert loaded["lora"].keys() == {"a", "b"}
    assert all(torch.equal(loaded["lora"][name], value) for name, value in weights["lora"].items())


def test_newest_are_kept_in_order_of_iteration(tmp_path):
    """Mutation: delete the newest, or sort names as text without padding."""
    for iteration in (8, 9, 10, 100):
        save(tmp_path, iteration)
    assert [int(path.name) for path in checkpoint.list_complete(tmp_path)] == [10, 100]
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [10, 100]


def test_a_save_that_dies_is_never_picked_up(tmp_path):
    """The state cannot be written, after the weights were. Mutation: write into the final folder."""
    save(tmp_path, 1)
    with pytest.raises(TypeError):
        save(tmp_path, 2, broken=object())
    assert [path.name for path in checkpoint.list_complete(tmp_path)] == ["000001"]
    save(tmp_path, 2)
    assert [path.name for path in checkpoint.list_complete(tmp_path)] == ["000001", "000002"]
    assert checkpoint.load(tmp_path / "000002")[0]["lora"]["a"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("moment", ["rename", "rmtree"])
def test_a_kill_while_saving_again_leaves_a_complete_checkpoint(tmp_path, monkeypatch, moment):
    """Saving iteration 1 a second time dies half-way: what has a number for a name is whole.

    Mutation: delete the finished folder file by file before the new one stands.
    """

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    def half_delete(path, **kwargs):
        if path.is_dir():
            sorted(path.glob("*.safetensors"))[0].unlink()
            raise KeyboardInterrupt

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        if moment == "rename":
            patch.setattr("pathlib.Path.rename", die)
        else:
            patch.setattr("shutil.rmtree", half_delete)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1)
    for path in checkpoint.list_complete(tmp_path):
        assert checkpoint.load(path)[0].keys() == {"lora", "ema"}


@pytest.mark.parametrize("name", ["lora.safetensors", "state.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    """Mutation: let the reader's own error through."""
    path = save(tmp_path, 1) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=name):
        checkpoint.load(path.parent)


def test_optimizer_continues_bitwise(tmp_path):
    """AdamW saved after 3 of 6 steps ends at the same weights; the new learning rate is the new optimizer's own.

    Mutation: lose `step` (bias correction) or swap the moments.
    """

    def build(start, lr=0.1):
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        return parameters, torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)

    def advance(parameters, optimizer, steps):
        for step in steps:
            for i, parameter in enumerate(parameters):
                parameter.grad = torch.full_like(parameter, 0.5 + step) * (i - 2) + parameter.detach()
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
