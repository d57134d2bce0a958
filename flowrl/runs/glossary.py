"""The glossary: every scalar that is ever logged, with what it means. Logging an unknown name is an
error.

Names ending in `/*` stand for a family whose last part is a reward part, a task family or a
teacher.
`docs/metrics.md` is this table, rendered by `scripts/metrics_page.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

from flowrl.runs.readings import READINGS

GLOSSARY: dict[str, str] = {
    "iteration": (
        "Number of finished iterations (rollout, reward and updates): the x axis of every chart."
    ),
    "samples": (
        "Images generated for training so far, over all processes, those of scouting included."
    ),
    "reward/mean": (
        "Mean training reward of the iteration's valid samples, under stochastic sampling; samples "
        "whose prompt no reward judges are left out. With scouting of the kept ones alone, which "
        "are extremes."
    ),
    "reward/std": "Population standard deviation of the same rewards.",
    "reward/missing": "Share of samples whose reward failed; they are left out of all statistics.",
    "reward/part/*": (
        "Mean of a named part of the reward over the iteration's valid samples; never trained on. "
        "With reward=shapes: soft (mean over the caption's atoms), strict (1 where all hold), "
        "off_palette (share of pixels that no blend of background and one colour explains), "
        "clean_objects (share of found objects that fit a shape)."
    ),
    "scouting/reward_mean": (
        "Mean reward of all candidates with a score, in the steps of `scouting.num_steps`."
    ),
    "scouting/reward_std": "Population standard deviation of the same rewards.",
    "scouting/missing": (
        "Share of candidates without a score: it failed, or no reward judges their prompt."
    ),
    "scouting/constant_groups": (
        "Share of prompts whose candidates have fewer than two different scores."
    ),
    "scouting/agreement": (
        "Share of the pairs of a kept best and a kept worst candidate, of different scores, whose "
        "rewards have the same order when they are drawn in full; equal rewards count a half."
    ),
    "advantage/largest": (
        "Largest absolute advantage of the iteration: xi of the improvement bound."
    ),
    "advantage/constant_groups": "Share of groups whose rewards are all equal: they teach nothing.",
    "advantage/dropped_groups": (
        "Share of groups with fewer than two valid rewards, or that no reward judges."
    ),
    "loss/policy": (
        "The policy loss, without the reference penalty, averaged over the iteration's updates."
    ),
    "loss/penalty": "The reference penalty before its weight beta; missing where beta is 0.",
    "loss/data": (
        "Flow-matching loss mean (v - (eps - x0))^2 on real images, before `regularizer.weight`, "
        "mean over the updates' images and sigmas (with a `regularizer` only)."
    ),
    "teacher/kl/*": (
        "Exact KL(current || teacher) per step under the configured reduction, to the teacher of "
        "that name, mean over the trained pairs of a sample of its prompts and a step (`loss=opd` "
        "only)."
    ),
    "trust/kl_old": (
        "Exact KL(old || current) per step under the configured reduction, mean over updates' "
        "samples."
    ),
    "trust/kl_old_max": "The largest such KL of the iteration.",
    "trust/tv_old": (
        "Exact total variation between old and current step Gaussians (full dimension), mean."
    ),
    "trust/delta": (
        "Threshold of the divergence mask that is in force; it starts at `loss.delta` (Flow-DPPO "
        "and Forward DPPO only)."
    ),
    "trust/kl_floor/*": (
        "KL of one step, by its number, between the rollout and a replay under weights moved by "
        "1e-5, mean over a micro-batch: what rounding alone gives. Measured once, before a run's "
        "first update, and logged with its first iteration."
    ),
    "trust/kl_old/*": "The same KL at one step of the grid, by its number.",
    "trust/tv_old/*": "The same total variation at one step of the grid, by its number.",
    "trust/velocity_old": "Mean (v - old_v)^2 at noised samples (forward-process losses only).",
    "trust/divergence_old": (
        "Mean w (v - old_v)^2 at noised samples, with the weight w of `loss.weighting`: what the "
        "mask compares with its threshold (Forward DPPO only)."
    ),
    "preference/margin": (
        "Mean by which preferred samples are fitted better than the anchor, beside those that they "
        "are preferred to, times `loss.beta`: the logit of the loss's sigmoid (Flow-DPO, by pairs; "
        "DGPO, by groups)."
    ),
    "preference/accuracy": "Share of these pairs or groups with a margin above 0.",
    "trust/tv_old_max": "The largest such total variation of the iteration.",
    "trust/ratio_std": (
        "Root mean square of the probability ratio minus 1 over all samples of a step and update, "
        "mean over those."
    ),
    "trust/masked_fraction": (
        "Share of the pairs of sample and step that the clip or the mask removes from the "
        "gradient; with forward losses of those of sample and sigma that are trained on."
    ),
    "trust/masked_positive": "The share masked on the side of positive advantages.",
    "trust/masked_negative": "The share masked on the side of negative advantages.",
    "trust/clip_false_alarms": (
        "Share of the pairs of sample and step that ratio clipping at `algorithm.diagnostics.clip` "
        "would drop and the exact divergence would keep, at the loss's own threshold on the KL, or "
        "without one at `algorithm.diagnostics.delta`, under the configured reduction."
    ),
    "trust/clip_misses": (
        "Share of the pairs that the exact divergence would drop and ratio clipping would keep."
    ),
    "trust/log_ratio_noise": (
        "Root mean square of the log-ratio's noise part, eps (mean - old_mean) / std, reduced as "
        "the log-probability is, over all samples of a step and update, mean over those (Gaussian "
        "form only)."
    ),
    "bound/surrogate": (
        "Mean of A (r - 1), summed over the stochastic steps: the gain that the surrogate claims. "
        "r is the full Gaussian's ratio (full dimension, as in trust/tv_old), whatever the "
        "likelihood; cut off at exp(60)."
    ),
    "bound/penalty": (
        "What the policy-improvement bound subtracts: 2 xi n (n-1) (max TV)^2 over n stochastic "
        "steps, with xi the largest absolute advantage and TV of the full Gaussian."
    ),
    "update/learning_rate": "The learning rate of the iteration's updates.",
    "update/grad_norm": (
        "Global norm of the trained weights' gradient before clipping, mean over updates."
    ),
    "update/grad_rms_over_eps": (
        "Root mean square gradient over Adam's epsilon: below 1, epsilon damps every step."
    ),
    "perf/images_per_second": (
        "Training images, those of scouting included, over the wall time of the whole iteration."
    ),
    "perf/scouting_seconds": (
        "Wall time of drawing, decoding and scoring all candidates, before the rollout."
    ),
    "perf/rollout_seconds": (
        "Wall time of sampling and decoding, with the scoring that goes on beside it."
    ),
    "perf/reward_seconds": "Wall time of waiting for scores after the last rollout.",
    "perf/update_seconds": "Wall time of all optimizer steps, replay included.",
    "eval/*/reward": (
        "Mean reward of an evaluation set: ODE sampling, EMA weights, fixed prompts and initial "
        "noise."
    ),
    "eval/*/part/*": "Mean of a reward part on that set.",
    "eval/*/family/*": (
        "Mean of the headline part (`evaluation.headline`) within one task family of that set."
    ),
    "eval/*/kl_ref": (
        "Mean over samples and steps of the exact per-step KL(average || reference) of the EMA "
        "weights, mean-reduced, of the evaluation's Gaussian steps at the states that the ODE "
        "visits; missing where `evaluation.kl_samples` is 0 or `evaluation.sampler` has no "
        "stochastic step."
    ),
    "eval/*/diversity": (
        "Root mean square pixel distance between images of the same prompt, where it has several: "
        "falls when modes collapse."
    ),
    "eval/*/panel/*": (
        "The hacking panel (`flowrl/images/`), mean over the set's images: edge_density, "
        "colour_entropy, brightness, high_frequency. It moves when a reward is cheated, whatever "
        "the reward says. Of clips the mean over their frames, and motion (mean absolute change of "
        "a pixel from a frame to the next) and motion_variation (the standard deviation over time "
        "of a clip's changes, over their mean)."
    ),
    "eval/*/alarms": (
        "Gold metrics (`viewing.gold`) that fell since the start while the reward rose, both "
        "beyond their 95 % intervals over prompts."
    ),
    "eval/*/missing": "Share of the set's samples whose reward failed.",
}


def is_known(name: str, private: Iterable[str] = ()) -> bool:
    """Tell whether the glossary, or a loss of one's own in `private`, defines a metric.

    Each `*` of a defined name stands for exactly one segment of the path.
    """
    # Most metrics are defined by their own name, without a `*`.
    return name in GLOSSARY or any(_matches(name, known) for known in (*GLOSSARY, *private))


def _matches(name: str, defined: str) -> bool:
    """Tell whether a metric's name is one of those that a defined name stands for."""
    segments = name.split("/")
    pattern = defined.split("/")
    if len(segments) != len(pattern):
        return False
    pairs = zip(segments, pattern, strict=True)
    return all(expected in ("*", segment) for segment, expected in pairs)


def check(names: Iterable[str], private: Iterable[str] = ()) -> None:
    """Raise KeyError for a metric that neither the glossary nor `private` defines."""
    # An iterator could be read for the first name only.
    private = tuple(private)
    unknown = sorted(name for name in names if not is_known(name, private))
    if unknown:
        words = ", ".join(unknown)
        raise KeyError(f"metrics missing from flowrl.runs.glossary.GLOSSARY: {words}")


def page() -> str:
    """Write the glossary as a Markdown page."""
    rows = []
    for name, meaning in GLOSSARY.items():
        # A bar in a cell, as that of a divergence, would end it.
        cells = [text.replace("|", r"\|") for text in (meaning, READINGS.get(name, ""))]
        rows.append(f"| `{name}` | {cells[0]} | {cells[1]} |")
    head = (
        "# Logged metrics\n\nGenerated from `flowrl/runs/glossary.py` and "
        "`flowrl/runs/readings.py` by `make docs`.\n"
    )
    table = "\n".join(["| name | meaning | what to make of it |", "|---|---|---|", *rows])
    return f"{head}\n{table}\n"
