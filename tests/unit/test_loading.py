import pytest
import torch

from flowrl.rewards.loading import load_pretrained, load_weights, require


def test_a_missing_package_names_its_extra():
    """Mutation: let ModuleNotFoundError through."""
    with pytest.raises(ValueError, match=r"'no_such_package'.*pip install 'flowrl\[ocr\]'"):
        require("no_such_package", "ocr")


def test_weights_of_a_file(tmp_path):
    """With or without the training script's wrapper. Mutation: return the wrapper."""
    weights = {"a": torch.arange(3.0)}
    for name, content in (("plain.pt", weights), ("wrapped.pt", {"epoch": 3, "state_dict": weights})):
        torch.save(content, tmp_path / name)
        assert torch.equal(load_weights(str(tmp_path / name), "weights")["a"], weights["a"])


def test_weights_run_no_code(tmp_path):
    """Mutation: weights_only=False."""
    torch.save({"a": require}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"reward.weights=.*no readable weights"):
        load_weights(str(tmp_path / "evil.pt"), "weights")


@pytest.mark.parametrize("source", ["/no/such/file.pt", "file.pt", "./a/b/c.pt"])
def test_a_path_that_is_not_there(source):
    """Mutation: ask the hub for a local path."""
    with pytest.raises(ValueError, match=f"reward.weights={source}: no such file"):
        load_weights(source, "weights")


def test_a_model_that_is_not_there():
    """Mutation: a message of many lines, or without the key."""
    from transformers import CLIPModel

    with pytest.raises(ValueError, match=r"reward.pretrained=/no/such.*local folder or a hub id") as error:
        load_pretrained(CLIPModel, "/no/such", "pretrained")
    assert len(str(error.value).splitlines()) == 1
