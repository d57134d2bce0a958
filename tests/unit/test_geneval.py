"""GenEval's reward over a detector that finds what it is told, and over small real networks."""

import numpy as np
import pytest
import torch
from PIL import Image
from scorers import save_clip, save_mask2former, save_owlv2
from servers import answering, remote, scorer
from transformers import CLIPModel, CLIPProcessor, Owlv2ForObjectDetection, Owlv2Processor

from flowrl.cli import doctor
from flowrl.errors import UserError
from flowrl.rewards import mask2former
from flowrl.rewards.colours import GREY, TEMPLATES, Colours, cut_out
from flowrl.rewards.detection import COCO, Detection, Detector
from flowrl.rewards.geneval import GenEval
from flowrl.rewards.geneval_task import COLOURS
from flowrl.rewards.images import to_tensor
from flowrl.rewards.mask2former import Mask2Former
from flowrl.rewards.owlv2 import OWLv2
from flowrl.training.reward import RewardModule
from flowrl.types import Prompt

BOX = (8, 8, 24, 24)
COUNTING = {"tag": "counting", "include": [{"class": "cup", "count": 2}]}
PLAIN = {"tag": "single_object", "include": [{"class": "cup", "count": 2}]}
RED = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]}


class Told:
    """A detector that finds two cups in a picture whose first pixel is bright, and none else."""

    names = COCO

    def __init__(self):
        self.calls = []

    def __call__(self, pictures, min_score):
        self.calls.append((len(pictures), min_score))
        cups = [Detection("cup", 0.95, BOX), Detection("cup", 0.5, (30, 30, 40, 40))]
        return [cups if picture.getpixel((0, 0))[2] > 128 else [] for picture in pictures]


class Seen:
    """A classifier that calls what is red in the middle red, and all else white."""

    def __call__(self, crops, names):
        assert len(crops) == len(names)
        middles = [crop.getpixel((crop.width // 2, crop.height // 2)) for crop in crops]
        return ["red" if pixel == (255, 0, 0) else "white" for pixel in middles]


def reward(score="strict", **options):
    options = {"detector": Told(), "colours": Seen(), "max_overlap": 1.0} | options
    return GenEval(score=score, threshold=0.3, counting_threshold=0.9, **options)


def picture(*colours, background="white"):
    """A square of 48 pixels with a patch in the box of the surest cup."""
    drawn = Image.new("RGB", (48, 48), background)
    for colour in colours:
        drawn.paste(colour, BOX)
    return drawn


def test_counting_asks_for_surer_detections():
    """Two cups, one of them surer than 0.9. Mutation: one threshold for all tags, or show the
    detector's lower limit as the higher one.
    """
    genuine = reward()
    assert isinstance(genuine.detector, Detector)
    prompts = [Prompt("a", "", COUNTING), Prompt("a", "", PLAIN)]
    output = genuine([picture()] * 2, prompts)
    assert output.values.tolist() == [0, 1]
    assert output.parts["graded"].tolist() == [0.5, 1]
    assert [entry["fault"] for entry in output.info] == ["cup: 1 found, 2 wanted", None]
    assert genuine.detector.calls == [(2, 0.3)]


def test_what_is_trained_on():
    """The same parts under either. Mutation: the other one."""
    prompts = [Prompt("a", "", COUNTING)]
    strict, graded = (reward(score)([picture()], prompts) for score in ("strict", "graded"))
    assert (strict.values.item(), graded.values.item()) == (0, 0.5)
    assert {name: part.item() for name, part in strict.parts.items()} == {
        "strict": 0,
        "graded": 0.5,
    }


def test_colours_are_those_of_each_pictures_object():
    """Mutation: the first picture's for all, or the whole picture."""
    pictures = [picture("red"), picture(), picture("red", background="black"), picture("red")]
    output = reward()(pictures, [Prompt("a", "", RED)] * 4)
    assert output.values.tolist() == [1, 0, 0, 1]


def test_a_prompt_without_a_task_is_missing_and_says_why():
    """And is not shown to the detector. Mutation: 0 for it, or a raise for all."""
    unknown = {"tag": "single_object", "include": [{"class": "unicorn", "count": 1}]}
    prompts = [Prompt("a"), Prompt("b", "", {"tag": "x", "include": []}), Prompt("c", "", unknown)]
    genuine = reward()
    output = genuine([picture()] * 4, [*prompts, Prompt("d", "", PLAIN)])
    assert output.is_valid.tolist() == [False, False, False, True]
    reasons = [output.info[row]["missing"] for row in range(3)]
    assert reasons[0].startswith("prompt 'a': its metadata lack `tag` or `include`")
    assert reasons[1].startswith("prompt 'b': tag='x' is none of single_object, two_object")
    assert reasons[2] == "prompt 'c': 'unicorn' is none of the 80 classes of Told"
    assert genuine.detector.calls == [(1, 0.3)]
    alone = reward()([picture()] * 3, prompts)
    assert not alone.is_valid.any()


def test_metadata_reach_a_server():
    """Positions, colours and exclusions over HTTP. Mutation: send the text alone."""
    excluded = PLAIN | {"exclude": [{"class": "cup", "count": 2}]}
    prompts = [Prompt("a", "f", data) for data in (PLAIN, COUNTING, RED, excluded)]
    prompts.append(Prompt("none"))
    images = to_tensor([picture("red")] * 5)
    with answering(scorer(reward())) as url:
        output = remote(url)(images, prompts)
    assert output.is_valid.tolist() == [True] * 4 + [False]
    assert output.values[:4].tolist() == [1, 0, 1, 0]
    assert output.parts["graded"][:4].tolist() == [1, 0.5, 0, 1]
    assert output.info[4]["missing"].startswith("prompt 'none': its metadata lack")


def test_cutting_an_object_out():
    """What the mask leaves out is grey, and a box is at least a pixel of the picture. Mutation: the
    mask's negative, or an empty crop.
    """
    mask = np.zeros((48, 48), dtype=bool)
    mask[8:24, 8:16] = True
    crop = cut_out(picture("red"), Detection("cup", 1.0, BOX, mask))
    assert crop.size == (16, 16)
    assert [crop.getpixel((x, 8)) for x in (0, 7, 8, 15)] == [(255, 0, 0)] * 2 + [GREY] * 2
    assert GREY == (153, 153, 153)
    for box in ((10.2, 10.2, 10.4, 10.4), (47.9, 0, 48, 48), (-5, -5, -1, -1), (60, 60, 70, 70)):
        assert min(cut_out(picture(), Detection("cup", 1.0, box)).size) >= 1


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"), length=64)


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory):
    return save_owlv2(tmp_path_factory.mktemp("owlv2"))


@pytest.fixture(scope="module")
def instances(tmp_path_factory):
    return save_mask2former(tmp_path_factory.mktemp("mask2former"))


def noise(seed, width=64, height=64):
    levels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3))
    return Image.fromarray(levels.astype(np.uint8)).resize((width, height))


@torch.no_grad()
def test_colours_are_the_nearest_texts(clip, monkeypatch):
    """The texts by transformers' own class, the pictures' features random. Mutation: the first
    template alone, a mean of vectors that are not unit ones, or the first object's class for all.
    """
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    features = {}
    for name in ("car", "bus"):
        texts = [
            template.format(colour=colour, name=name)
            for colour in COLOURS
            for template in TEMPLATES
        ]
        tokens = processor(text=texts, return_tensors="pt", padding="max_length", max_length=64)
        embeds = model.get_text_features(**tokens).pooler_output
        means = torch.nn.functional.normalize(embeds, dim=-1).view(10, 3, -1).mean(1)
        features[name] = means / means.norm(dim=-1, keepdim=True)
    options = {"dtype": "float32", "batch_size": 3}
    classifier = Colours(pretrained=clip, processor=clip, **options)
    torch.testing.assert_close(
        classifier._features_of_colours(["car", "bus"]),
        torch.stack([features["car"], features["bus"]]),
    )
    seen = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(classifier, "image_features", lambda crops: seen)
    names = ["car", "bus"] * 20
    nearest = {name: (seen @ texts.T).argmax(-1).tolist() for name, texts in features.items()}
    expected = [COLOURS[nearest[name][row]] for row, name in enumerate(names)]
    assert classifier([noise(0)] * 40, names) == expected
    assert nearest["car"] != nearest["bus"]


@torch.no_grad()
def test_the_texts_of_a_class_are_encoded_once(clip, monkeypatch):
    """Whatever classes stand beside it, and with the bits of a scorer that knows none.

    Mutations: encode them in every call, or all classes of a call together.
    """
    options = {"pretrained": clip, "processor": clip, "dtype": "float32", "batch_size": 3}
    classifier = Colours(**options)
    encoded = []
    encode = classifier.text_features

    def counting(texts):
        encoded.append(texts)
        return encode(texts)

    monkeypatch.setattr(classifier, "text_features", counting)
    for names in (["car"], ["bus", "car", "bus"], ["car", "bus"], ["car"]):
        classifier([noise(0)] * len(names), names)
    assert [len(texts) for texts in encoded] == [len(COLOURS) * len(TEMPLATES)] * 2
    assert all("car" in text or "object" in text for text in encoded[0])
    assert all("bus" in text or "object" in text for text in encoded[1])
    together = classifier._features_of_colours(["bus", "car"])
    assert torch.equal(together, Colours(**options)._features_of_colours(["bus", "car"]))
    assert len(encoded) == 2


def test_nothing_to_be_coloured_and_no_weights(clip):
    """Mutation: hand an empty batch to the network, or name another key."""
    options = {"dtype": "float32", "batch_size": 3}
    assert Colours(pretrained=clip, processor=clip, **options)([], []) == []
    with pytest.raises(UserError, match=r"reward\.colours\.pretrained=/nowhere/a"):
        Colours(pretrained="/nowhere/a", processor=clip, **options)


def open_vocabulary(folder, names=None, **options):
    options = {"revision": None, "dtype": "float32", "batch_size": 2} | options
    return OWLv2(pretrained=folder, names=names, **options)


@torch.no_grad()
def test_owlv2_is_transformers_own(owlv2):
    """By its processor's reading of the output, a picture at a time. Mutation: boxes of the
    picture's own sides in place of the padded square's, or centres taken for corners.
    """
    names = ["dog", "clock", "stop sign"]
    pictures = [noise(0, 96, 48), noise(1, 96, 48), noise(2, 48, 96)]
    model = Owlv2ForObjectDetection.from_pretrained(owlv2).eval()
    processor = Owlv2Processor.from_pretrained(owlv2)
    texts = [[f"a photo of a {name}" for name in names]]
    found = open_vocabulary(owlv2, names)(pictures, 0.4)
    for picture, detections in zip(pictures, found, strict=True):
        inputs = processor(text=texts, images=picture, return_tensors="pt", max_length=32)
        (read,) = processor.post_process_grounded_object_detection(
            model(**inputs), threshold=0.4, target_sizes=[(picture.height, picture.width)]
        )
        limits = torch.tensor([*picture.size, *picture.size])
        boxes = read["boxes"].clamp(min=0).minimum(limits)
        # Those in the padding are nowhere in the picture.
        is_there = (boxes[:, 2:] > boxes[:, :2]).all(-1)
        assert 0 < is_there.sum() < len(is_there)
        assert [detection.name for detection in detections] == [
            names[label] for label in read["labels"][is_there].tolist()
        ]
        scores = torch.tensor([detection.score for detection in detections])
        torch.testing.assert_close(scores, read["scores"][is_there])
        torch.testing.assert_close(
            torch.tensor([detection.box for detection in detections]), boxes[is_there]
        )
    assert len({detection.name for detections in found for detection in detections}) > 1


def test_owlv2_looks_for_cocos_classes_by_default(owlv2):
    """Mutation: other names."""
    assert open_vocabulary(owlv2).names == COCO
    with pytest.raises(UserError, match=r"reward\.detector\.pretrained=/nowhere/a"):
        open_vocabulary("/nowhere/a")


def test_instances_by_hand():
    """A mask on the right column of a picture 3 wide and 2 high, its pixels 0.8 likely. Mutation:
    leave the mask's certainty out, the box's last pixel, or one class a query.
    """
    probabilities = torch.tensor([[0.6, 0.35, 0.0], [0.1, 0.1, 0.1]])
    on = torch.tensor(4.0).log()  # of sigmoid 0.8
    masks = torch.full((2, 2, 3), -9.0)
    masks[0, :, 2] = on
    drawn = Image.new("RGB", (3, 2))
    first, second = mask2former._instances(probabilities, masks, drawn, 0.25)
    assert (first.name, second.name) == ("person", "bicycle")
    assert (first.score, second.score) == pytest.approx((0.48, 0.28))
    assert first.box == (2, 0, 3, 2)
    assert first.mask.tolist() == [[False, False, True]] * 2
    # 0.35 is above the limit, times 0.8 it is not.
    (alone,) = mask2former._instances(probabilities, masks, drawn, 0.3)
    assert alone.name == "person"
    assert mask2former._instances(probabilities, masks - 20, drawn, 0.0) == []
    assert mask2former._instances(probabilities, masks, drawn, 0.7) == []


@torch.no_grad()
def test_mask2former_reads_its_network(instances):
    """Masks have the picture's size; the class of no object is none. Mutation: another side, or the
    last class among the others.
    """
    detector = Mask2Former(pretrained=instances, revision=None, shorter_side=64, dtype="float32")
    seen = []
    detector.model.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((kwargs["pixel_values"].shape, output)),
        with_kwargs=True,
    )
    drawn = noise(3, 128, 96)
    (found,) = detector([drawn], 0.2)
    shape, output = seen[0]
    assert shape == (1, 3, 64, 96)  # 64 x 85, to multiples of 32
    assert found and all(detection.mask.shape == (96, 128) for detection in found)
    classes = output.class_queries_logits[0].softmax(-1)[:, :80]
    expected = mask2former._instances(classes, output.masks_queries_logits[0], drawn, 0.2)
    assert [(d.name, d.score) for d in found] == [(d.name, d.score) for d in expected]


def test_a_network_of_other_classes_is_refused(tmp_path):
    """A panoptic one has 133. Mutation: name the first 80 of them."""
    folder = save_mask2former(tmp_path, num_labels=133)
    with pytest.raises(UserError, match=r"reward\.detector\.pretrained=.*133 classes and not COCO"):
        Mask2Former(pretrained=folder, revision=None, shorter_side=64, dtype="float32")


def test_the_doctor_examines_it(owlv2, clip, capsys):
    """Small random networks find anything, and repeat. Mutation: pairs without metadata."""
    overrides = (
        "reward=geneval",
        f"reward.detector.pretrained={owlv2}",
        "reward.detector.names=[clock,stop sign]",
        f"reward.colours.pretrained={clip}",
        f"reward.colours.processor={clip}",
    )
    with pytest.raises(UserError, match=r"checks? failed"):  # their order means nothing
        doctor.run(overrides, None, 60.0)
    table = capsys.readouterr().out
    for check in ("scored", "range", "determinism", "batch of one", "tensor input", "latency"):
        assert f"{check:<13} ok" in table, table
    assert "3 pairs of objects" in table


def test_it_is_scored_in_a_run_of_its_own(owlv2, clip):
    """The module that a run asks. Mutation: a network that trains."""
    colours = Colours(pretrained=clip, processor=clip, dtype="float32", batch_size=4)
    options = {"detector": open_vocabulary(owlv2, ["cup", "dog"]), "colours": colours}
    module = RewardModule(reward=reward("graded", **options), max_missing=0.0)
    output = module.score([noise(0), noise(1)], [Prompt("a", "", RED)] * 2)
    assert output.is_valid.all() and (output.values <= 1).all()
    assert sum(parameter.numel() for parameter in module.parameters()) > 50_000
    assert not any(parameter.requires_grad for parameter in module.parameters())
