"""Data regularisation: beside a method's own loss, every update trains on real images by flow
matching, which holds the policy near them in place of a reference penalty.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.errors import UserError
from flowrl.gaussian import mean_square
from flowrl.images.captioned import CaptionedImage, fitted
from flowrl.models.protocol import EncodesImages, FlowModel
from flowrl.noise import DATA, gaussian_noise, on_device
from flowrl.parallel.strategies import synchronised
from flowrl.types import Conditioning, Prompt
from flowrl.values.bounds import Guidance, Positive, Samples
from flowrl.values.check import checked
from flowrl.values.plural import counted

if TYPE_CHECKING:
    from flowrl.training.metric_means import Record
    from flowrl.training.policy import Policy


@dataclass(frozen=True, slots=True)
class Noised:
    """The latents of real images, the noise that takes them to any sigma, and their captions."""

    x0: Float[Tensor, "B *X"]
    noise: Float[Tensor, "B *X"]
    conditioning: Conditioning

    def errors(self, policy: Policy, step: int, guidance_scale: float) -> Float[Tensor, "B"]:
        """Compute mean (v - (eps - x0))^2 of each image, at the sigma of a step of the grid."""
        sigma = policy.algorithm.intervals[step].sigma
        x = torch.lerp(self.x0, self.noise, sigma)
        velocity = policy.model.velocity(x, sigma, self.conditioning, guidance_scale)
        return mean_square(velocity - (self.noise - self.x0))


class DataRegularizer:
    """The flow-matching loss on real images, which is added to the loss of every update:

        weight mean (v(x, sigma, caption) - (eps - x0))^2,    x = (1 - sigma) x0 + sigma eps,

    over latent dimensions, over `batch` images and over the sigmas that the update's samples train
    on. x0 is an image's latents, eps its noise, one for all sigmas as a rollout has one, and
    `guidance_scale` that of v: 1 for a network with classifier-free guidance, whose velocity
    without guidance is the one that data define; a distilled network takes the scale as an input.

    In expectation this is the forward KL from the data to the policy up to a constant, where a
    reference penalty is a reverse one. Paper: DDRL (Ye et al. 2025, arXiv 2512.04332), `weight`
    0.01. Its code noises the video of the rollouts' own prompt by the rollout's own noise; here
    images have captions of their own, which need not be among the training prompts.

    Images pass in an order of their own each time, and each update takes the next ones. Which these
    are, and their noise, is a function of seed, iteration and update, whatever the processes and
    micro-batches. Latents are made of an image when it is first asked for, of it alone, and kept in
    float32 on the host.
    """

    @checked("regularizer")
    def __init__(
        self,
        *,
        images: Sequence[CaptionedImage],
        weight: Positive,
        batch: Samples,
        guidance_scale: Guidance,
    ) -> None:
        self.images = list(images)
        self.weight = weight
        self.batch = batch
        self.guidance_scale = guidance_scale
        self._latents: dict[int, Float[Tensor, "*X"]] = {}
        # Only the newest pass is kept: updates go forward.
        self._orders: dict[int, list[int]] = {}

    @property
    def prompts(self) -> list[Prompt]:
        """The captions as prompts, one for each image, which must be embedded before training."""
        return [Prompt(image.caption) for image in self.images]

    def require_processes(self, num_processes: int) -> None:
        """Raise UserError unless so many processes can share the images of an update evenly."""
        if self.batch % num_processes:
            raise UserError(
                f"regularizer.batch={self.batch} images do not split over {num_processes} "
                f"processes; make it a multiple of {num_processes}"
            )

    def require_size(self, height: int, width: int) -> None:
        """Raise UserError for the first image that would have to be enlarged to a size in
        pixels.
        """
        for image in self.images:
            if image.size[0] < height or image.size[1] < width:
                raise UserError(
                    f"regularizer.images: {image.name}: {image.size[1]} x {image.size[0]} pixels "
                    f"are fewer than the model's {width} x {height} (width x height), and an "
                    "enlarged image would teach blur; leave it out, or lower model.resolution"
                )

    def describe(self, num_sigmas: int) -> str:
        """Return a line of the batch plan."""
        passes = f"{self.batch} of {counted(len(self.images), 'image')}"
        terms = counted(num_sigmas, "sigma")
        return f"  {'data regularisation':<25} {passes} an update x {terms}"

    def add_gradients(self, policy: Policy, record: Record) -> None:
        """Run the backward passes of the weighted loss over this process's share of an update's
        images; gradients of several processes meet later, in the backward pass of the update's own
        last term.
        """
        steps = trained_steps(policy)
        chunks = self.chunks(policy)
        num_pairs = sum(map(len, chunks)) * len(steps)
        for places in chunks:
            noised = self.noised(policy, places)
            for step in steps:
                errors = noised.errors(policy, step, self.guidance_scale)
                record.add("loss/data", errors.mean(), len(places))
                with synchronised(policy, is_last=False):
                    policy.manual_backward(self.weight * errors.sum() / num_pairs)

    def rehearse(self, policy: Policy) -> int:
        """Do one pass of an update, whose gradient is left to the caller to drop; return the number
        of them that an iteration has.
        """
        steps = trained_steps(policy)
        chunks = self.chunks(policy)
        noised = self.noised(policy, chunks[0])
        with synchronised(policy, is_last=False):
            policy.manual_backward(noised.errors(policy, steps[0], self.guidance_scale).sum())
        num_updates = policy.plan.inner_epochs * policy.plan.updates_per_iteration
        return num_updates * len(chunks) * len(steps)

    def chunks(self, policy: Policy) -> list[range]:
        """Return the places, in an update's images, of this process's share, in micro-batches."""
        share = self.batch // policy.plan.num_processes
        start = policy.global_rank * share
        size = policy.plan.max_micro_batch
        return [
            range(first, min(first + size, start + share))
            for first in range(start, start + share, size)
        ]

    def noised(self, policy: Policy, places: Sequence[int]) -> Noised:
        """Return the latents, noise and captions of the images at these places of an update's."""
        first = policy.num_optimizer_steps * self.batch
        numbers = [self._pick(first + place, policy.seed) for place in places]
        noise = gaussian_noise(
            policy.model.latent_shape,
            seed=policy.seed,
            iteration=policy.num_iterations,
            samples=[(0, place) for place in places],
            step=DATA + policy.num_optimizer_steps,
        )
        return Noised(
            x0=self._encoded(numbers, policy.model, policy.device),
            noise=on_device(noise, policy.device),
            conditioning=policy.embed([Prompt(self.images[number].caption) for number in numbers]),
        )

    def _pick(self, position: int, seed: int) -> int:
        """Return the number of the image at a place of the endless sequence of shuffled passes."""
        epoch, place = divmod(position, len(self.images))
        if epoch not in self._orders:
            order = list(range(len(self.images)))
            random.Random(f"regularizer {seed} {epoch}").shuffle(order)
            self._orders = {epoch: order}
        return self._orders[epoch][place]

    def _encoded(
        self, numbers: Sequence[int], model: FlowModel, device: torch.device
    ) -> Float[Tensor, "B *X"]:
        """Return the latents of images, which are made where they have not been yet."""
        assert isinstance(model, EncodesImages)
        for number in dict.fromkeys(numbers):
            if number not in self._latents:
                pixels = fitted(self.images[number].read(), *model.image_size)
                # By itself, so that its latents do not depend on which others an update has.
                latents = model.encode_images(torch.from_numpy(pixels)[None].to(device))
                self._latents[number] = latents[0].cpu()
        return on_device(torch.stack([self._latents[number] for number in numbers]), device)


def trained_steps(policy: Policy) -> list[int]:
    """Choose the steps of the grid whose sigmas an update noises real images to: as many as each
    sample trains on, of those that the samples of one of the iteration's prompts may train on.

    With stochastic steps these are what that prompt's rollouts keep; losses over noised samples and
    reward gradients take any of the grid. The choice is a function of seed and update, whatever the
    processes.
    """
    rng = random.Random(f"regularizer steps {policy.seed} {policy.num_optimizer_steps}")
    objective = policy.objective
    steps: Sequence[int] = range(policy.algorithm.num_steps)
    if policy.algorithm.loss.kind == "reverse":
        prompt = rng.randrange(policy.plan.prompts_per_iteration)
        stochastic = objective.stochastic_steps(policy.num_iterations, prompt)
        steps = objective.kept_steps(stochastic, policy.num_iterations)
    return sorted(rng.sample(steps, min(len(steps), objective.num_trained())))
