"""Small scorers with random weights, saved as the published ones are."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    SwinConfig,
)

from flowrl.models.loading import resolve

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "circle",
    "two",
    "blue",
    "squares",
    "and",
)


def save_clip(path, length=16):
    """A CLIP of 30,000 parameters in the layout of the hub, with the embedded pipeline's
    tokenizer and texts of `length` tokens; gives its folder.
    """
    tokenizer = CLIPTokenizer.from_pretrained(resolve("embedded:pipeline") + "/tokenizer")
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": length,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=small | text, vision_config=small | vision, projection_dim=24
        )
        config.logit_scale_init_value = 3.0
        model = CLIPModel(config).eval()
        for parameter in model.parameters():
            if parameter.dim():
                nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return str(path)


def save_aesthetic(folder):
    """The predictor for that CLIP as a plain Sequential, and its file."""
    sizes = (24, 1024, 128, 64, 16, 1)
    linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    dropouts = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
    mlp = nn.Sequential(
        linear[0], dropouts[0], linear[1], dropouts[1], linear[2], dropouts[2], linear[3], linear[4]
    )
    file = folder / "mlp.pth"
    torch.save({f"layers.{name}": value for name, value in mlp.state_dict().items()}, file)
    return mlp, str(file)


def save_hps(folder):
    """A network of a registered architecture, tiny-hps, and a checkpoint as the authors wrap
    theirs.
    """
    import open_clip  # of an extra

    small = {"width": 64, "layers": 1, "head_width": 32}
    config = {
        "embed_dim": 16,
        "vision_cfg": small | {"image_size": 32, "patch_size": 8},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 1,
        },
    }
    (folder / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = open_clip.create_model("tiny-hps", pretrained=None).eval()
    torch.save({"epoch": 1, "state_dict": network.state_dict()}, folder / "weights.pt")
    return network, str(folder / "weights.pt")


def save_image_reward(folder):
    """The files of a small ImageReward, by the options that name them."""
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.save(image_reward_checkpoint(), folder / "ImageReward.pt")
    return {"weights": str(folder / "ImageReward.pt"), "tokenizer": str(folder)}


def image_reward_shapes(width=128, depth=2, text_width=128, layers=2):
    """Names and shapes of the authors' checkpoint, in small."""
    names = {"cls_token": (1, 1, width), "pos_embed": (1, 17, width)}
    names |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        block = {
            "norm1": (width,),
            "norm2": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
        }
        block |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        names |= both(f"blocks.{i}", block)
    names |= both("", {"norm": (width,)})
    found = {f"blip.visual_encoder.{name}": shape for name, shape in names.items()}
    wide = 2 * text_width
    text = both("embeddings", {"LayerNorm": (text_width,)})
    text["embeddings.word_embeddings.weight"] = (16, text_width)
    text["embeddings.position_embeddings.weight"] = (40, text_width)
    for i in range(layers):
        block = {
            "intermediate.dense": (wide, text_width),
            "output.dense": (text_width, wide),
            "output.LayerNorm": (text_width,),
        }
        for name, source in (("attention", text_width), ("crossattention", width)):
            block |= {f"{name}.self.query": (text_width, text_width)}
            block |= {f"{name}.self.{part}": (text_width, source) for part in ("key", "value")}
            block |= {
                f"{name}.output.dense": (text_width, text_width),
                f"{name}.output.LayerNorm": (text_width,),
            }
        text |= both(f"encoder.layer.{i}", block)
    found |= {f"blip.text_encoder.{name}": shape for name, shape in text.items()}
    sizes = (text_width, 1024, 128, 64, 16, 1)
    head = {str(n): (b, a) for n, a, b in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False)}
    return found | both("mlp.layers", head)


def both(prefix, shapes):
    """Weight and bias of each layer."""
    found = {}
    for name, shape in shapes.items():
        path = f"{prefix}.{name}" if prefix else name
        found |= {f"{path}.weight": shape, f"{path}.bias": shape[:1]}
    return found


def image_reward_checkpoint():
    """Random weights, each from a seed of its own."""
    state = {}
    for seed, (name, shape) in enumerate(sorted(image_reward_shapes().items())):
        values = np.random.default_rng(seed).normal(size=shape) * (
            0.3 if len(shape) == 1 else 3 / np.sqrt(shape[-1])
        )
        if "norm" in name.lower() and name.endswith("weight"):
            values = 1 + values
        state[name] = torch.tensor(values, dtype=torch.float32)
    return state


def save_owlv2(path):
    """An OWLv2 of 60,000 parameters in the layout of the hub, with 64 patches; gives its folder.

    The embedded pipeline's tokenizer is renumbered, so that the marks of a text's start and end
    have the largest numbers, as in CLIP's own: OWLv2 finds the end by that, and takes 0 for
    padding.
    """
    source = Path(resolve("embedded:pipeline")) / "tokenizer"
    text = (source / "tokenizer.json").read_text()
    data = json.loads(text)
    vocabulary = data["model"]["vocab"]
    last = sorted(vocabulary, key=vocabulary.get)[-2:]
    marks = ("<|startoftext|>", "<|endoftext|>")
    places = {mark: vocabulary[mark] for mark in marks}
    for mark, token in zip(marks, last, strict=True):
        vocabulary[mark], vocabulary[token] = vocabulary[token], places[mark]
    for entry in data["added_tokens"]:
        entry["id"] = vocabulary[entry["content"]]
    Path(path, "tokenizer.json").write_text(json.dumps(data))
    settings = (source / "tokenizer_config.json").read_text()
    Path(path, "tokenizer_config.json").write_text(settings)
    tokenizer = CLIPTokenizer.from_pretrained(path)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    words = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Owlv2Config(
            text_config=small | words,
            vision_config=small | {"image_size": 64, "patch_size": 8},
            projection_dim=32,
        )
        model = Owlv2ForObjectDetection(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    images = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    Owlv2Processor(images, tokenizer).save_pretrained(path)
    return str(path)


def save_mask2former(path, num_labels=80):
    """A Mask2Former of 120,000 parameters in the layout of the hub; gives its folder."""
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    width = 32  # a multiple of the 32 groups that its decoder normalises
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Mask2FormerConfig(
            backbone_config=backbone,
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            encoder_feedforward_dim=width,
            dim_feedforward=width,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=10,
            num_labels=num_labels,
        )
        model = Mask2FormerForUniversalSegmentation(config).eval()
        nn.init.normal_(model.class_predictor.weight, std=1.0)
    model.save_pretrained(path)
    Mask2FormerImageProcessor().save_pretrained(path)
    return str(path)
