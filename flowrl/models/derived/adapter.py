"""The `FlowModel` that is derived from a pipeline of diffusers, whatever its family."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flowrl.errors import UserError
from flowrl.models.conditioning import join
from flowrl.models.derived import arguments as call_arguments
from flowrl.models.derived import planning
from flowrl.models.derived.cutting import watching
from flowrl.models.derived.edits import (
    encoding_on,
    flatten_edit,
    probe_edit,
    probe_either,
    record_edit,
)
from flowrl.models.derived.leaving import Refused, refusing
from flowrl.models.derived.networks import check_networks
from flowrl.models.derived.recording import PROBE, Probe, flatten_texts, record, state_of
from flowrl.models.derived.standin import flow_settings
from flowrl.models.derived.stock import Asked, Sampling, Stock
from flowrl.models.derived.trees import LAYOUT, Layout, groups, read, to_tensor
from flowrl.models.experts import as_one, components_of
from flowrl.models.loading import META, Source, autoencoder, read_index, resolve
from flowrl.models.protocol import Use
from flowrl.models.text import TextEncoders, device
from flowrl.models.weights import DTYPES
from flowrl.types import Conditioning
from flowrl.values.bounds import Dtype, Quantization, Text
from flowrl.values.wording import meant

FORMAT = 1
"""The version of what is recorded of a prompt; rows of another one are not read."""


class Derived:
    """Any rectified-flow pipeline of diffusers, from a local folder or a hub id.

    `without` names components that are left out, such as a text encoder that the pipeline can do
    without. `call` holds arguments of the pipeline's own call, such as height, width and
    num_frames.

    The guidance scale is handed to the argument `guidance` as it is, and means what it means there;
    null takes `guidance_scale`, or `true_cfg_scale` where the former has no number as its default.
    With `has_guidance` False it must stay 1, and negative prompts are not encoded; else the
    negative prompt is `call.negative_prompt`, empty by default. `channels_last` is the memory
    layout of an autoencoder of images, which matters to its speed.

    Raises UserError, in one line, for a pipeline that cannot be derived from, with the reason.
    """

    negative_prompt = None  # it is a part of what is recorded of each prompt

    def __init__(
        self,
        *,
        pretrained: Text,
        revision: Text | None,
        dtype: Dtype,
        without: Sequence[Text],
        call: Mapping[str, Any] | None,
        guidance: Text | None,
        has_guidance: bool,
        channels_last: bool,
        quantization: Quantization | None = None,
    ) -> None:
        self.pretrained = pretrained
        self.dtype = dtype
        is_planned = pretrained.startswith(META)
        if is_planned:
            index = planning.index_of(pretrained.removeprefix(META))
        else:
            index = read_index(resolve(pretrained), pretrained, revision)
        source = Source(
            class_of(index, pretrained), pretrained, revision, dtype, quantization=quantization
        )
        with refusing(pretrained, source.kind):
            self.arguments = call_arguments.read(source.kind, call or {}, guidance, has_guidance)
        check_without(without, source.kind)
        text_side = _text_side(index)
        self.pipeline: Any = (
            planning.pipeline_on_meta(source, index)
            if is_planned
            else source.load(**dict.fromkeys(text_side))
        )
        with refusing(pretrained, source.kind):
            check_networks(self.pipeline)
            self.settings = flow_settings(self.pipeline.scheduler)
        self.transformer = as_one(components_of(self.pipeline)).requires_grad_(False).eval()
        self.vae = autoencoder(self.pipeline, channels_last)
        kept = {
            name: part
            for name, part in self.pipeline.components.items()
            if name not in (*text_side, *without)
        }
        left_out = dict.fromkeys(without)

        def with_texts() -> Any:
            if is_planned:
                return planning.reading_blanks(self.pipeline)
            return source.load(**kept, **left_out)

        self.text = TextEncoders(with_texts, text_side)
        settings = [
            f"derived {FORMAT}",
            json.dumps(dict(self.arguments.fixed), sort_keys=True, default=str),
            f"{has_guidance} {sorted(without)}",
        ]
        self.use = call_arguments.use_of(source.kind)
        # The autoencoder embeds pictures.
        encoders = text_side if self.use == "never" else [*text_side, "vae"]
        self.embedding_key = " ".join([source.identity(encoders), *settings])
        components = [name for name, entry in index.items() if isinstance(entry, list)]
        # What texts are embedded to does not depend on the transformer's bits; the check does.
        bits = [] if quantization is None else [quantization]
        self.identity = " ".join([source.identity(components), *settings, *bits])
        with refusing(pretrained, source.kind):
            texts = self.text.pipeline()
            with watching(texts) as cuts:
                self._probe, self.use = probe_either(
                    texts, self.settings, self.arguments, device(), self.use
                )
            self._cuts = [cut for cut in dict.fromkeys(cuts) if PROBE in cut.text]
            self.stock = Stock(
                self.pipeline, self.settings, self.arguments, self._probe, DTYPES[dtype]
            )
        if is_planned:
            self.to(torch.device("meta"))
        self.kind = source.kind
        self._grouped: tuple[Tensor, dict[bytes, list[int]]] | None = None
        self._edit_probe: Probe | None = self._probe if self.use == "always" else None
        self.latent_shape = self._probe.state_shape
        row = self._row(self._probe.texts, self._probe.text_layout)
        self.conditioning_shapes = {name: tuple(value.shape) for name, value in row.items()}
        self.conditioning_dtypes = {name: value.dtype for name, value in row.items()}

    @classmethod
    def picture_use(cls, pretrained: str, revision: str | None) -> tuple[str, Use]:
        """Return the class of a pipeline, by its index alone, and how it uses prompts' pictures."""
        index = read_index(resolve(pretrained), pretrained, revision)
        kind = class_of(index, pretrained)
        return kind.__name__, call_arguments.use_of(kind)

    @property
    def is_mirrored(self) -> bool:
        """True where the pipeline's own time runs from 0, noise, to 1, data."""
        return self.stock.times.is_mirrored

    def to(self, device: torch.device) -> None:
        self.pipeline.to(device)
        self.stock.to(device)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Record each prompt by itself, whatever the batch: padded to the longest of others, it
        would be embedded otherwise beside them.
        """
        return join([self._record(prompt) for prompt in prompts])

    def _record(self, prompt: str) -> dict[str, Tensor]:
        """Return the row of one prompt."""
        found = self._probe
        scale = self.arguments.recorded_scale
        with refusing(self.pretrained, self.kind):
            tape = record(
                self.text.pipeline(),
                self.settings,
                self.arguments.of(prompt, 1, scale),
                device(),
                found.num_texts,
            )
            tensors, layout = flatten_texts(tape, found.axes)
            if tensors.keys() != found.texts.keys():
                raise Refused(f"it returns other tensors for the prompt {prompt!r} than for others")
        return self._row(tensors, layout)

    @torch.no_grad()
    def encode_edits(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> Conditioning:
        """Record each prompt with its picture by itself, as `encode_prompts` does: what the
        pipeline's own preparation and encoders make of both, and all that follows from the picture.
        """
        pairs = zip(prompts, pictures, strict=True)
        with encoding_on(self.text.pipeline(), device()):
            return join([self._record_edit(prompt, picture) for prompt, picture in pairs])

    def _record_edit(self, prompt: str, picture: Image.Image) -> dict[str, Tensor]:
        """Return the row of one prompt and its picture."""
        text = self.text.pipeline()
        with refusing(self.pretrained, self.kind):
            if self._edit_probe is None:
                self._edit_probe = probe_edit(text, self.settings, self.arguments, device())
            found = self._edit_probe
            tape = record_edit(text, self.settings, self.arguments, device(), prompt, picture)
            state = state_of(tape, found.axes, is_alone=found.is_alone)
            if tuple(state.shape[1:]) != self.latent_shape:
                raise Refused(
                    f"its state is {tuple(state.shape[1:])} for a picture of "
                    f"{picture.width} x {picture.height}, and {self.latent_shape} for another: set "
                    "height and width in model.call"
                )
            tensors, layout = flatten_edit(tape, found.axes, picture, is_alone=found.is_alone)
            if tensors.keys() != found.texts.keys():
                raise Refused(f"it returns other tensors for the prompt {prompt!r} than for others")
        return self._row(tensors, layout)

    def _row(self, tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
        """Return a row: its tensors and its layout, on one device."""
        values = {name: value.contiguous() for name, value in tensors.items()}
        place = next(iter(values.values())).device
        return {**values, LAYOUT: to_tensor(layout).to(place)}

    def truncated_part(self, prompt: str) -> str:
        """Return what the first tokenizer to cut a prompt leaves out of it, in words, by the calls
        that were noted for the probe's; empty where none does.
        """
        for cut in self._cuts:
            text = cut.text.replace(PROBE, prompt)
            lost = self.text.truncated_part(text, {cut.tokenizer: cut.limit})
            if lost:
                return lost
        return ""

    def drop_text_encoders(self) -> None:
        self.text.drop()

    def velocity(
        self,
        x: Float[Tensor, "B *X"],
        sigma: float,
        conditioning: Conditioning,
        guidance_scale: float,
    ) -> Float[Tensor, "B *X"]:
        if guidance_scale != 1 and not self.arguments.has_guidance:
            raise UserError(f"guidance_scale={guidance_scale} needs model.has_guidance=true")
        tensors = conditioning.tensors
        numbers_of = self._groups(tensors[LAYOUT])
        with refusing(self.pretrained, self.kind):
            if len(numbers_of) == 1:
                layout = read(next(iter(numbers_of)))
                return self.stock.velocity(Asked(x, sigma, tensors, layout, guidance_scale))
            # Rows whose shapes differ would need masks that not every network has.
            parts = []
            order: list[int] = []
            for text, numbers in numbers_of.items():
                rows = torch.tensor(numbers, device=x.device)
                some = conditioning[rows].tensors
                asked = Asked(x[rows], sigma, some, read(text), guidance_scale)
                parts.append(self.stock.velocity(asked))
                order += numbers
        place = torch.tensor(order, device=x.device).argsort()
        return torch.cat(parts).index_select(0, place)

    def _groups(self, layouts: Tensor) -> dict[bytes, list[int]]:
        """Return the rows of each layout; of the tensor before it is known, as for a rollout's
        steps, without waiting for the device. On the meta device, where there is nothing to read,
        all rows have the probe's.
        """
        if layouts.is_meta:
            layout = to_tensor(self._probe.text_layout).numpy().tobytes()
            return {layout: list(range(len(layouts)))}
        if self._grouped is None or self._grouped[0] is not layouts:
            self._grouped = (layouts, groups(layouts))
        return self._grouped[1]

    @torch.no_grad()
    def decode(self, x0: Float[Tensor, "B *X"]) -> Float[Tensor, "B *F 3 H W"]:
        return self.decode_with_graph(x0)

    def decode_with_graph(self, x0: Float[Tensor, "B *X"]) -> Float[Tensor, "B *F 3 H W"]:
        with refusing(self.pretrained, self.kind):
            return self.stock.decode(x0)

    def sample_stock(
        self,
        conditioning: Conditioning,
        guidance_scale: float,
        num_steps: int,
        seed: int,
        picture: Image.Image | None = None,
        *,
        last: Tensor | None = None,
    ) -> Sampling:
        """Sample one row by the pipeline's own loop, for comparison, from its prompt's picture;
        `last` takes the place of the state of its last step.
        """
        tensors = conditioning.tensors
        (layout,) = groups(tensors[LAYOUT])
        with refusing(self.pretrained, self.kind):
            return self.stock.sample(
                tensors, read(layout), guidance_scale, num_steps, seed, picture, last=last
            )

    def grid(self, num_steps: int) -> tuple[float, ...]:
        """Return the sigmas of the pipeline's own grid, `num_steps + 1` values from 1 to 0."""
        with refusing(self.pretrained, self.kind):
            return self.stock.grid(num_steps)


def class_of(index: Mapping[str, Any], pretrained: str) -> type[Any]:
    """Return the pipeline's class. Raises UserError where diffusers has none of its name."""
    name = index.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise UserError(
            f"model.pretrained={pretrained} holds a {name}, which diffusers "
            f"{diffusers.__version__} does not have; update it, or give another pipeline"
        )
    return kind


def check_without(names: Sequence[str], kind: type[Any]) -> None:
    """Raise UserError, naming the key, for a component that the pipeline does not have."""
    known = kind._get_signature_keys(kind)[0]
    for name in names:
        if name not in known:
            raise UserError(
                f"model.without={list(names)}: a {kind.__name__} has no component "
                f"{name}{meant(name, known)}, but {', '.join(sorted(known))}"
            )


def _text_side(index: Mapping[str, Any]) -> list[str]:
    """Return the components that embed prompts: all that are transformers' own."""
    names = []
    for name, entry in index.items():
        match entry:
            case ["transformers", str()]:
                names.append(name)
    return names
