"""Evaluation on fixed prompts from fixed initial noise, by ODE sampling with the EMA weights, which
leaves the training state untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.errors import UserError
from flowrl.evaluation.set_metrics import set_metrics
from flowrl.evaluation.shares import Share, Spreads, merge
from flowrl.gaussian import MEAN_KL
from flowrl.images.motion import looks_of
from flowrl.models.grids import follow
from flowrl.models.protocol import FlowModel
from flowrl.models.weights import require_finite
from flowrl.noise import INITIAL, gaussian_noise
from flowrl.parallel.collectives import gather
from flowrl.parallel.sharding import is_divided
from flowrl.prompts.subsets import WAYS, chosen, same_texts
from flowrl.samplers.ode import ODE
from flowrl.samplers.protocol import Sampler, Solver
from flowrl.schedule import Interval, Schedule, intervals
from flowrl.training.policy import Policy
from flowrl.tuning.weights import swapped
from flowrl.types import Conditioning, Prompt, RewardOutput
from flowrl.values.bounds import Count, Guidance, Natural, Samples, Seed, StepCount, Subset, Text
from flowrl.values.check import checked
from flowrl.values.plural import counted

_NOISE_ITERATION = 2**32 - 1
"""The noise iteration of evaluations, which no training iteration reaches."""


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Metrics as in the glossary and scores, the same in every process, and of each set the images
    by row number that this process drew and kept, on the CPU.
    """

    metrics: Mapping[str, float]
    images: Mapping[str, Mapping[int, Float[Tensor, "*F 3 H W"]]]
    scores: Mapping[str, RewardOutput]


def _be_silent(text: str) -> None:
    pass


class Evaluator:
    """Evaluates a policy on named prompt sets, with `images_per_prompt` images for every prompt,
    drawn by `solver` in batches of `batch_size`.

    - `schedule` and `num_steps` make the grid of sigmas, which may be another one than training's.
    - Of a set with more than `max_prompts` prompts a subset is taken, as `subset` says: `even` over
      the set, or the `first` ones, as in runs from before there was this key.
    - `headline` names the reward part that is broken down by task family and written under the
      images; a name that is no part, such as `reward`, stands for the reward's value.
    - `sampler` gives the Gaussian steps whose divergence from the reference's is measured, on
      `kl_samples` samples of a set, taken in the same way, where these are not 0.
    - `seed` decides the initial noise, the same for every policy.
    """

    @checked("evaluation")
    def __init__(
        self,
        *,
        sets: Mapping[str, Sequence[Prompt]],
        schedule: Schedule,
        num_steps: StepCount,
        guidance_scale: Guidance,
        max_prompts: Count | None,
        images_per_prompt: Samples,
        batch_size: Count,
        headline: Text,
        solver: Solver,
        sampler: Sampler,
        kl_samples: Natural,
        seed: Seed,
        subset: Subset = "first",
    ) -> None:
        if not sets:
            raise UserError("evaluation.sets must name at least one prompt set")
        self.subset = subset
        self.sizes = {name: len(prompts) for name, prompts in sets.items()}
        self.sets: dict[str, list[Prompt]] = {}
        for name, prompts in sets.items():
            places = chosen(len(prompts), max_prompts, subset)
            self.sets[name] = [prompts[place] for place in places]
        self.schedule = schedule
        self.num_steps = num_steps
        self.guidance_scale = guidance_scale
        self.images_per_prompt = images_per_prompt
        self.batch_size = batch_size
        self.headline = headline
        self.sampler = sampler
        self.kl_samples = kl_samples
        self.seed = seed
        self.solver = solver

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """The steps of the evaluation's sigma grid."""
        return intervals(self.schedule, self.num_steps)

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts of all sets."""
        return [prompt for prompts in self.sets.values() for prompt in prompts]

    def describe(self, name: str) -> str:
        """Tell how many prompts of a set are used, which ones where not all are, and how many texts
        where some repeat.
        """
        count = len(self.sets[name])
        total = self.sizes[name]
        if count == total:
            text = counted(count, "prompt")
        else:
            text = f"{count} of {total} prompts, {WAYS[self.subset]}"
        texts = same_texts(self.sets[name])
        num_texts = len(set(texts.tolist()))
        if num_texts < count:
            text += f"; {num_texts} different texts, each of which counts once in intervals"
        return text

    def places_of(self, total: int, wanted: int) -> list[int]:
        """Return the places of `wanted` of a set's `total` prompts or samples, taken as its prompts
        are from their source.
        """
        return chosen(total, wanted, self.subset)

    @torch.no_grad()
    def evaluate(
        self,
        policy: Policy,
        tell: Callable[[str], None] = _be_silent,
        kept: Mapping[str, Collection[int]] | None = None,
    ) -> EvaluationResult:
        """Generate and score every set under the EMA weights; the trained weights come back
        bitwise. `tell` is given a text whenever more images are drawn. `kept` has by set the rows
        whose images are returned, None for all: clips of a whole set may not fit into memory.

        Raises TooManyMissingRewards as training does, and NotFinite where a weight is no number.
        """
        require_finite(policy.weights())
        metrics: dict[str, float] = {}
        images: dict[str, dict[int, Tensor]] = {}
        scores: dict[str, RewardOutput] = {}
        with swapped(policy.tuning.parameters(), policy.ema.weights):
            for name, prompts in self.sets.items():
                repeated = [prompt for prompt in prompts for _ in range(self.images_per_prompt)]
                wanted = None if kept is None else kept.get(name, ())
                images[name], share = self._share_of_set(policy, repeated, name, tell, wanted)
                scores[name] = share.scores
                assert share.scores.terms is not None
                # Before any metric: a mean over what few samples have a reward would mislead.
                policy.reward.check(share.scores.is_valid, share.scores.terms, share.scores.info)
                told = set_metrics(name, repeated, share, self.headline, self.images_per_prompt)
                metrics |= {f"eval/{name}/{key}": value for key, value in told.items()}
                kl = self.kl_to_reference(policy, repeated)
                if kl is not None and math.isfinite(kl):
                    metrics[f"eval/{name}/kl_ref"] = kl
        return EvaluationResult(metrics, images, scores)

    def initial_noise(self, policy: Policy, num_samples: int, first: int = 0) -> Tensor:
        """Return the fixed initial noise of a set's samples from row `first` on, the same in every
        evaluation of every run.
        """
        return self._noise(policy, range(first, first + num_samples))

    def _noise(self, policy: Policy, rows: Sequence[int]) -> Tensor:
        """Return the initial noise of these rows of a set, [rows, *X]."""
        # A sample is known by the number of its prompt, and its number within the prompt's images.
        samples = [divmod(row, self.images_per_prompt) for row in rows]
        noise = gaussian_noise(
            policy.model.latent_shape,
            seed=self.seed,
            iteration=_NOISE_ITERATION,
            samples=samples,
            step=INITIAL,
        )
        return noise.to(policy.device)

    def _batch_starts(self, prompts: Sequence[Prompt]) -> range:
        """Return the first row of each batch of these prompts."""
        return range(0, len(prompts), self.batch_size)

    @torch.no_grad()
    def draw_and_score(
        self, policy: Policy, prompts: Sequence[Prompt], first: int
    ) -> tuple[Float[Tensor, "B *F 3 H W"], Share]:
        """Draw and score a set's samples from row `first` on, whose prompts are given and whole,
        under the weights as they are; return the images, on the CPU, and what they say, by their
        rows among these.
        """
        batches = self._batches(policy, prompts, first, self._batch_starts(prompts))
        images, share = self._score(policy, prompts, batches, lambda num_drawn: None)
        assert share is not None
        return torch.stack(list(images.values())), share

    def _share_of_set(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        name: str,
        tell: Callable[[str], None],
        kept: Collection[int] | None,
    ) -> tuple[dict[int, Tensor], Share]:
        """Draw and score this process's share of a set; return its images by their rows, those in
        `kept` or all, and what the rows of all processes say.
        """

        def tell_drawn(num_drawn: int) -> None:
            # Other processes have drawn about as many.
            num_drawn = min(num_drawn * policy.plan.num_processes, len(prompts))
            tell(f"{name}: {num_drawn} of {len(prompts)} images")

        tell_drawn(0)
        batches = self._share_of_batches(policy, prompts)
        images, share = self._score(policy, prompts, batches, tell_drawn, kept)
        # Every process takes part in gathering, also one that drew nothing.
        shares = [other for other in gather(share) if other is not None]
        return images, merge(shares)

    def _score(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        batches: Iterable[tuple[slice, Tensor]],
        tell_drawn: Callable[[int], None],
        kept: Collection[int] | None = None,
    ) -> tuple[dict[int, Tensor], Share | None]:
        """Score batches of images, which come with their rows of `prompts`; return the images by
        their rows, those in `kept` or all, on the CPU, and what they say, None without any.

        `tell_drawn` is given how many there are, whenever there are more.
        """
        images: dict[int, Tensor] = {}
        drawn: list[int] = []
        scores = []
        looks = []
        spreads = Spreads(self.images_per_prompt)
        for rows, batch in batches:
            # Scored in the background, while the next batch is drawn.
            score = policy.reward.submit(
                batch, prompts[rows], first=rows.start, group_size=self.images_per_prompt
            )
            scores.append(score)
            looks.append(looks_of(batch))
            on_cpu = batch.cpu()
            spreads.add(on_cpu)
            numbers = range(len(prompts))[rows]  # the last batch may be short
            drawn += numbers
            images |= _kept(numbers, on_cpu, kept)
            tell_drawn(len(drawn))
        if not drawn:  # there may be fewer batches than processes
            return images, None
        share = Share(
            rows=drawn,
            scores=policy.reward.collect(scores),
            looks=_join_looks(looks),
            spread=spreads.so_far(),
        )
        return images, share

    def _share_of_batches(
        self, policy: Policy, prompts: Sequence[Prompt]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Draw this process's share of the batches; yield their rows and images.

        Batches stay whole, so that the share changes no image, and so do prompts, so that no image
        has to leave its process.
        """
        # The least number of batches that ends where a prompt ends.
        block = math.lcm(self.batch_size, self.images_per_prompt) // self.batch_size
        num_processes = policy.plan.num_processes
        shares: list[list[int]] = [[] for _ in range(num_processes)]
        for i, start in enumerate(self._batch_starts(prompts)):
            # Blocks go to the processes in turn.
            rank = i // block % num_processes
            shares[rank].append(start)
        starts = shares[policy.global_rank]
        num_idle = 0
        if is_divided(policy.transformer):
            # Divided weights are gathered in every pass, so all processes make equally many, some
            # for nothing.
            num_idle = max(map(len, shares)) - len(starts)
        batches = self._batches(policy, prompts, 0, [*starts, *[0] * num_idle])
        for number, batch in enumerate(batches):
            if number < len(starts):
                yield batch

    def _batches(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        first: int,
        starts: Sequence[int],
    ) -> Iterator[tuple[slice, Tensor]]:
        """Draw the batches that begin at `starts`; yield their rows and images.

        `prompts` are those of the rows from `first` on, from which `starts` count.
        """
        noise = self.initial_noise(policy, len(prompts), first)
        for start in starts:
            rows = slice(start, start + self.batch_size)
            yield rows, self.draw(policy.model, policy.embed(prompts[rows]), noise[rows])

    @torch.no_grad()
    def draw(
        self, model: FlowModel, conditioning: Conditioning, noise: Float[Tensor, "B *X"]
    ) -> Float[Tensor, "B *F 3 H W"]:
        """Draw images or clips from initial noise, under the model's weights as they are."""
        follow(self.schedule, model)
        x = noise
        history = None
        for interval in self.intervals:
            velocity = model.velocity(x, interval.sigma, conditioning, self.guidance_scale)
            # A solver of higher order looks back at the steps before.
            x, history = self.solver.advance(x, velocity, interval, history)
        return model.decode(x)

    @torch.no_grad()
    def kl_to_reference(self, policy: Policy, prompts: Sequence[Prompt]) -> float | None:
        """Return the mean exact KL(current || reference) per step and dimension, over `kl_samples`
        of a set's samples.

        The states are those of Euler's deterministic path, whatever draws the images. None where
        nothing is measured: without samples, or without a stochastic step.
        """
        rows = self.places_of(len(prompts), self.kl_samples)
        prompts = [prompts[row] for row in rows]
        follow(self.schedule, policy.model)
        is_stochastic = any(self.sampler.std(interval) > 0 for interval in self.intervals)
        if not prompts or not is_stochastic:
            return None
        noise = self._noise(policy, rows)
        batches = []
        for start in self._batch_starts(prompts):
            rows_of_batch = slice(start, start + self.batch_size)
            batches.append(self._divergences(policy, prompts[rows_of_batch], noise[rows_of_batch]))
        # From one list of steps a batch to all samples of one step; batches may differ in size.
        of_steps = [torch.cat(divergences).mean() for divergences in zip(*batches, strict=True)]
        return float(torch.stack(of_steps).mean())

    def _divergences(
        self, policy: Policy, prompts: Sequence[Prompt], x: Tensor
    ) -> list[Float[Tensor, "B"]]:
        """Return for each stochastic step the samples' KL between the current policy's Gaussian and
        the reference's, from initial noise `x` on.
        """
        conditioning = policy.embed(prompts)
        divergences = []
        for interval in self.intervals:
            velocity = policy.model.velocity(x, interval.sigma, conditioning, self.guidance_scale)
            step = self.sampler.step(x, velocity, interval)
            if step.std > 0:
                with policy.tuning.at_reference():
                    ref_velocity = policy.model.velocity(
                        x,
                        interval.sigma,
                        conditioning,
                        self.guidance_scale,
                    )
                ref_step = self.sampler.step(x, ref_velocity, interval)
                divergences.append(MEAN_KL.kl(step, ref_step.mean))
            # On the current policy's way without noise, which makes the number a fixed one.
            x = ODE().step(x, velocity, interval).mean
        return divergences


def _kept(numbers: Sequence[int], batch: Tensor, kept: Collection[int] | None) -> dict[int, Tensor]:
    """Return the images of a batch by their rows: all, or copies of those that are kept, since a
    view would keep the batch.
    """
    pairs = zip(numbers, batch, strict=True)
    if kept is None:
        return dict(pairs)
    return {number: image.clone() for number, image in pairs if number in kept}


def _join_looks(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Float[Tensor, "B"]]:
    """Join the statistics of one batch or more, on the CPU."""
    looks = {}
    for stat in batches[0]:
        looks[stat] = torch.cat([batch[stat].cpu() for batch in batches])
    return looks
