import logging

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from flowrl.rewards.loading import load_pretrained, load_weights, require


def test_a_missing_package_names_its_extra():
    """Mutation: let ModuleNotFoundError through."""
    with pytest.raises(
        ValueError, match=r"'no_such_package'.*pip install 'flowrl-lightning\[ocr\]'"
    ):
        require("no_such_package", "ocr")


def test_weights_of_a_file(tmp_path):
    """With or without the training script's wrapper. Mutation: return the wrapper."""
    weights = {"a": torch.arange(3.0)}
    for name, content in (
        ("plain.pt", weights),
        ("wrapped.pt", {"epoch": 3, "state_dict": weights}),
    ):
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

    with pytest.raises(
        ValueError, match=r"reward.pretrained=/no/such.*local folder or a hub id"
    ) as error:
        load_pretrained(CLIPModel, "/no/such", "pretrained")
    assert len(str(error.value).splitlines()) == 1


@pytest.fixture
def clip(tmp_path):
    """A CLIP of a few thousand parameters, saved whole."""
    from transformers import CLIPConfig, CLIPModel

    small = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    text, vision = (
        {"vocab_size": 16, "max_position_embeddings": 8},
        {"image_size": 8, "patch_size": 4},
    )
    CLIPModel(
        CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=4)
    ).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda weights: weights.pop("text_projection.weight"),
            "weights are missing, the first 'text_projection.weight'",
        ),
        (
            lambda weights: weights["logit_scale"].fill_(torch.inf),
            "its weight 'logit_scale' holds NaN or infinity",
        ),
        (
            lambda weights: weights.update({"text_projection.weight": torch.zeros(2, 2)}),
            "the first 'text_projection.weight' (2, 2) instead of (4, 8)",
        ),
    ],
    ids=["missing", "infinite", "other shape"],
)
def test_a_scorer_of_random_weights_is_refused(clip, edit, words):
    """transformers draws what it lacks at random and scores go on. Mutation: take the network as it
    comes.
    """
    from safetensors.torch import load_file, save_file
    from transformers import CLIPModel

    assert load_pretrained(CLIPModel, str(clip), "pretrained").config.projection_dim == 4
    weights = load_file(clip / "model.safetensors")
    edit(weights)
    save_file(weights, clip / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"^reward.pretrained=.*: CLIPModel: .*download it again$"
    ) as caught:
        load_pretrained(CLIPModel, str(clip), "pretrained")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": torch.tensor([1.0, torch.nan])}, "its weight 'a' holds NaN"),
        ([torch.zeros(1)], "holds a list and no"),
    ],
)
def test_a_file_of_no_usable_weights(tmp_path, content, words):
    """Mutation: score with NaN, or an AttributeError."""
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"^reward.weights=.*{words}"):
        load_weights(str(tmp_path / "weights.pt"), "weights")


class FromHub:
    """Fails as transformers does, with its own error from that of the hub's library."""

    def __init__(self, cause):
        self.cause = cause
        self.__name__ = "Scorer"

    def from_pretrained(self, place, **options):
        try:
            raise self.cause
        except Exception as error:
            raise OSError(f"cannot find {place}") from error


def test_a_hub_out_of_reach_is_not_the_names_fault(tmp_path):
    """Other errors are; a local folder's never has to do with the hub. The library's log, which has
    a handler of its own, goes to no other.

    Mutation: blame the name for a missing network, print retries twice.
    """
    logging.getLogger("huggingface_hub").propagate = True
    expected = (
        r"^reward.pretrained=org/name: not in the local hub cache, and the hub cannot be reached; "
        "download it first, or give a folder$"
    )
    for cause in (LocalEntryNotFoundError("offline"), ConnectionError("no route")):
        with pytest.raises(ValueError, match=expected):
            load_pretrained(FromHub(cause), "org/name", "pretrained")
        with pytest.raises(ValueError, match="give a local folder or a hub id"):
            load_pretrained(FromHub(cause), str(tmp_path), "pretrained")
    with pytest.raises(ValueError, match="give a local folder or a hub id"):
        load_pretrained(FromHub(KeyError("other")), "org/name", "pretrained")
    assert not logging.getLogger("huggingface_hub").propagate
