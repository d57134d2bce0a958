"""The frozen dataclasses that cross module borders, and the one shape legend.

Shape letters, in jaxtyping annotations everywhere:
    B samples (prompts times group), P prompts, G group, K sampling steps, T trained terms (a
    trajectory's steps, or a grid's sigmas), E earlier ones of them, `*X` the axes of one sample's
    latents, as many as the base model has (C h w, or F C h w of a video, or N Q of packed tokens);
    H W an image's height and width in pixels; F a clip's frames, `*F` where an image has no such
    axis; R rewards; N selected rows. D is the number of latent dimensions, the product of X.

`index` counts a trajectory's steps, which are trained, `step_number` those of its grid.

Time runs from noise to data: sigma 1 is noise, 0 is data, and a step goes from `sigma` to
`sigma_next` < `sigma`. `old_` marks the behaviour policy that produced the rollout, `ref_` the
frozen reference, no prefix the current policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Reduction = Literal["mean", "sum"]
"""How a value of each latent dimension becomes one of the sample."""
LogProbForm = Literal["gaussian", "unnormalised"]
"""What a log-probability is: the log-density, or -(x_next - mean)^2."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The inputs that the velocity field is conditioned on: tensors by name, such as embedded text,
    masks or image latents, each [B, ...] with one row a sample. Which names there are is the base
    model's business, as are dtypes and shapes; `negative` serves classifier-free guidance.

    Rows of different shapes stand padded beside each other, with their true shapes under a name of
    their own: see `flowrl.models.conditioning`. Raises ValueError where there is no tensor, and
    where two have different numbers of rows.
    """

    tensors: Mapping[str, Tensor]
    negative: Conditioning | None = None

    def __post_init__(self) -> None:
        rows = {name: len(tensor) for name, tensor in self.tensors.items()}
        if len(set(rows.values())) != 1:
            raise ValueError(f"conditioning needs tensors of equally many rows, not {rows}")

    def __getitem__(self, rows: slice | Int[Tensor, "N"]) -> Conditioning:
        """Return these rows of every tensor, and of the negative."""
        negative = None if self.negative is None else self.negative[rows]
        return Conditioning({name: value[rows] for name, value in self.tensors.items()}, negative)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.tensors.values())))

    @property
    def device(self) -> torch.device:
        """The device that the rows are on."""
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        """The bytes of all rows, without the negative's."""
        return sum(value.nbytes for value in self.tensors.values())

    def to(self, device: torch.device) -> Conditioning:
        """Return the same rows on a device."""
        negative = None if self.negative is None else self.negative.to(device)
        tensors = {name: value.to(device) for name, value in self.tensors.items()}
        return Conditioning(tensors, negative)


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture on disk, which is known by the digest of its file's content, wherever it lies."""

    path: str = field(compare=False)
    digest: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, the task family it is reported under (may be empty), and whatever its reward needs
    to know.

    `image` is the picture that the text says how to edit, None where there is none; `mask` is white
    where an edit should keep it. `flowrl.images.pictures.read_upright` reads either.
    """

    text: str
    family: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    image: PictureFile | None = None
    mask: PictureFile | None = None

    @property
    def digests(self) -> list[str]:
        """The digests of its pictures: none, the image's, or the image's and the mask's."""
        return [picture.digest for picture in (self.image, self.mask) if picture is not None]

    @property
    def key(self) -> str:
        """A text that is equal for prompts of one text and picture, whose images are drawn from one
        distribution: the prompt's own where it has no picture.
        """
        # No text holds a NUL.
        return self.text if self.image is None else f"{self.text}\0{self.image.digest}"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A rollout of B samples: final latents, and the states of its T trained steps, which are
    stochastic ones that any of its samples may train on; or that of the one deterministic step from
    which a direct loss goes on once more, whose mean is the next state.

    `old_mean` is kept in float32: in bfloat16 its rounding alone gives divergences of 3e-6 to 1e-5.
    `shares_start` says that samples of one group are equal in the state of the first trained step:
    they began from the same noise, and no step before it was stochastic. An iteration's
    trajectories are the largest thing that a run of many steps keeps, so that of each one all but
    `x0` may be on the host.
    """

    steps: tuple[int, ...]
    shares_start: bool
    x: Float[Tensor, "B T *X"]
    x_next: Float[Tensor, "B T *X"]
    old_mean: Float[Tensor, "B T *X"]
    x0: Float[Tensor, "B *X"]

    def on_host(self) -> Trajectory:
        """Return it with its states on the host, in pinned memory; on a CPU it is itself.

        The copies run beside the host's work, in the order of the device's: `at` may be called at
        once, and nothing else may read them before the device is waited for.
        """
        if self.x0.device.type == "cpu":
            return self
        states = {
            name: getattr(self, name).to("cpu", non_blocking=True)
            for name in ("x", "x_next", "old_mean")
        }
        return replace(self, **states)

    def at(self, name: Literal["x", "x_next", "old_mean"], index: int) -> Float[Tensor, "B *X"]:
        """Return the states of that name at the `index`-th trained step, on the device of `x0`."""
        states: Tensor = getattr(self, name)
        return states[:, index].to(self.x0.device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class RewardOutput:
    """Scores of B samples. A failed sample is missing (`is_valid` False), never a number; its value
    is ignored.

    `parts` are further scores by name, which are logged and evaluated and never trained on. `info`
    is empty or has one entry a sample; that of a missing one may say why under `missing`.

    A mixture of R rewards gives its `terms` and `weights` too, and their weighted sum as `values`.
    `RewardModule` completes every output: `terms` and `applies` are there, and `values` and `terms`
    are NaN where `applies` is False.
    `applies` says which rewards have anything to say about a sample's prompt, and must follow from
    the prompt alone; None means all of them. Where none applies, the sample is neither missing nor
    zero: it has no value, and belongs to no statistic.
    """

    values: Float[Tensor, "B"]
    is_valid: Bool[Tensor, "B"]
    parts: Mapping[str, Float[Tensor, "B"]] = field(default_factory=dict)
    info: Sequence[Mapping[str, Any]] = ()
    terms: Float[Tensor, "B R"] | None = None
    weights: tuple[float, ...] = (1.0,)
    applies: Bool[Tensor, "B R"] | None = None

    @property
    def has_value(self) -> Bool[Tensor, "B"]:
        """Tell, on the CPU, which samples are valid and have a reward that applies."""
        return self.is_valid.cpu() & self.is_judged

    @property
    def is_judged(self) -> Bool[Tensor, "B"]:
        """Tell, on the CPU, to which samples at least one of the rewards applies."""
        if self.applies is None:
            return torch.ones(len(self.values), dtype=torch.bool)
        return self.applies.cpu().any(1)


@dataclass(frozen=True, slots=True)
class LossInputs:
    """All that a reverse loss may look at, for one step of B samples.

    `log_ratio` is the logarithm of the policies' ratio, log_prob - old_log_prob of the state that
    was drawn. `kl` and `tv` are the exact divergences KL(old || current) and TV(old, current) of
    the step. `log_ratio` and `kl` follow the configured reduction and carry a gradient, `tv` is
    that of the full Gaussian, `velocity_change` is mean (v - old_v)^2, both without one. `std` and
    `dt` are those of the step; `form` and `reduction` say how log-probabilities were taken (see
    `flowrl.gaussian.Likelihood`), over D = `dimensions`. `kl_floor` is the part of the KL, in its
    own units, that a mask does not count, since rounding alone gives it at this step; 0 unless
    `trust.above_floor`. `teacher_kl` is KL(current || teacher) of the step, reduced as `kl` and
    with a gradient; None unless the loss needs teachers. `pair_log_ratio` says how far the velocity
    has gone from a sample's partner towards the sample itself (`flowrl.objectives.pair`), with a
    gradient; None unless the loss `compares`, and `advantage` then is the pair's.

    A loss that looks back is given `earlier_kl`, the KLs of the trajectory's E earlier steps above
    their floors, in sampling order and without a gradient, under the weights of the same update;
    `num_steps` counts the steps of the trajectory that are trained.
    """

    log_ratio: Float[Tensor, "B"]
    advantage: Float[Tensor, "B"]
    kl: Float[Tensor, "B"]
    tv: Float[Tensor, "B"]
    velocity_change: Float[Tensor, "B"]
    std: float
    dt: float
    form: LogProbForm
    reduction: Reduction
    dimensions: int
    kl_floor: float = 0.0
    earlier_kl: Float[Tensor, "B E"] | None = None
    num_steps: int = 1
    teacher_kl: Float[Tensor, "B"] | None = None
    pair_log_ratio: Float[Tensor, "B"] | None = None

    def of_rows(self, rows: Int[Tensor, "N"]) -> LossInputs:
        """Return the inputs of some of the samples, in the order of `rows`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        # index_select, not indexing: its backward adds in a fixed order on the CPU.
        chosen: dict[str, Any] = {
            name: value.index_select(0, rows)
            for name, value in values.items()
            if torch.is_tensor(value)
        }
        return replace(self, **chosen)


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """All that a forward-process loss may look at: B generated samples x0, noised again to `sigma`.

    `x = (1 - sigma) x0 + sigma eps`; the velocities are the current and the old policy's at x, the
    latter NaN unless the loss `needs_old`, and the reference's where it `needs_reference` or a
    penalty does. `group` numbers the samples' prompts; for a loss that `compares` samples, those of
    a prompt have one `eps` and `sigma`, and `group_size` of them were drawn, of whom the loss may
    have selected some. `is_used` is False for a sample without an advantage, whose reward is
    missing or which is alone in its group: it counts in the mean and gives no gradient, whatever
    its numbers are (see `flowrl.losses.used`).
    """

    x0: Float[Tensor, "B *X"]
    x: Float[Tensor, "B *X"]
    sigma: Float[Tensor, "B"]
    velocity: Float[Tensor, "B *X"]
    old_velocity: Float[Tensor, "B *X"]
    advantage: Float[Tensor, "B"]
    is_used: Bool[Tensor, "B"]
    ref_velocity: Float[Tensor, "B *X"] | None = None
    group: Int[Tensor, "B"] | None = None
    group_size: int | None = None


@dataclass(frozen=True, slots=True)
class DirectInputs:
    """All that a direct loss may look at: the rewards of B samples, with a graph that leads through
    the scorer, the autoencoder and steps of the rollout to the trained weights.

    `is_used` is False for a sample that has no score of its own: it counts in the mean and gives no
    gradient, whatever its reward is.
    """

    reward: Float[Tensor, "B"]
    is_used: Bool[Tensor, "B"]


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A scalar loss to minimise, and metrics named as in `flowrl.runs.glossary` or in the loss's
    own `metrics`; whoever records them detaches them.

    `counts` has the number of samples behind a metric that is a mean over some of them alone.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Float[Tensor, ""]]
    counts: Mapping[str, int] = field(default_factory=dict)
