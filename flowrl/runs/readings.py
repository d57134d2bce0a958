"""What a rise or a fall of each logged metric means, and what to do about it.

The metrics themselves are defined in `flowrl/runs/glossary.py`; a test holds the names together.
"""

READINGS = {
    "iteration": "Rises by one. The progress bar and all charts count it.",
    "samples": "Compare methods at equal samples, not at equal iterations.",
    "reward/mean": (
        "Should rise. Flat from the start: look at `advantage/constant_groups` and "
        "`update/grad_norm`. Rising, then falling: the learning rate is too high for a policy that "
        "has changed; lower it, or take learning_rate=cosine. Rising while the pictures get worse: "
        "the reward is being cheated; see the hacking panel."
    ),
    "scouting/reward_mean": (
        "Should rise: with scouting this is the policy's own curve, as `reward/mean` is without. "
        "Fewer steps shift it, so compare it with itself."
    ),
    "scouting/reward_std": (
        "Much larger than 0: the extremes stand out, and scouting has something to find."
    ),
    "scouting/missing": "Should be 0. Above `max_missing` the run stops, as for the rewards.",
    "scouting/constant_groups": (
        "High: candidates are chosen by their numbers alone, and scouting costs without gain; a "
        "softer score, harder prompts, or more `scouting.candidates`."
    ),
    "scouting/agreement": (
        "1: scores tell what the rewards will be, as they do where candidates take all steps of a "
        "rollout. Near 0.5: they tell nothing; more `scouting.num_steps`, or less noise in the "
        "rollouts' steps."
    ),
    "reward/std": (
        "Falls as the policy settles. Near 0, nothing is left to compare: harder prompts, or a "
        "larger group."
    ),
    "reward/missing": (
        "Should be 0. Above `max_missing` the run stops; the first reason stands in `train.log`."
    ),
    "reward/part/*": (
        "A part that falls while the reward rises is what the policy pays with: add it to the "
        "reward, or watch it with `viewing.gold`."
    ),
    "advantage/largest": (
        "Grows where one sample of a group stands out, as where a reward is nearly always 0; "
        "losses clip it at `loss.advantage_clip`."
    ),
    "advantage/constant_groups": (
        "High at the start: the prompts are too hard, or the reward too coarse; take a larger "
        "`batch.group_size` or a softer score. High at the end: the prompts are learned."
    ),
    "advantage/dropped_groups": (
        "Rises with `reward/missing`; mend the scorer. 1 with `batch.group_size=1`, for losses "
        "that compare no samples."
    ),
    "loss/policy": (
        "Tells little: with ratio losses it is near 0, since the advantages of a group cancel. "
        "Follow the reward and the KL."
    ),
    "loss/penalty": (
        "Rises as the policy leaves the reference. Too fast for the reward gained: a larger "
        "`penalty.beta`."
    ),
    "loss/data": (
        "Starts at what the base model was trained to and should stay near it, or fall; single "
        "iterations differ by their images and noise. Rising: the policy leaves the data for the "
        "reward; a larger `regularizer.weight`."
    ),
    "teacher/kl/*": (
        "Should fall. One teacher's falls and another's rises: the student gives up one for the "
        "other; more of the latter's prompts, or a larger `lora.rank`. All flat: a higher learning "
        "rate."
    ),
    "trust/kl_old": (
        "How far an iteration's updates went. Rising over the run: updates get larger; lower the "
        "learning rate, the threshold or the number of updates an iteration. Near 0 with a flat "
        "reward: a higher learning rate."
    ),
    "trust/kl_old_max": (
        "Far above the mean: a few samples are pushed hard. A mask drops these; without one, lower "
        "the learning rate."
    ),
    "trust/tv_old": "As `trust/kl_old`, as a probability; near 1 the two steps hardly overlap.",
    "trust/delta": (
        "Constant, unless `loss.final_delta` or `loss.delta=auto` moves it. At a hundredth of the "
        "budget or a hundred times it, the mask cannot hold the budget."
    ),
    "trust/kl_floor/*": (
        "Far below the threshold: the mask sees the policy move. Near it or above, as in bfloat16 "
        "at published thresholds: rounding decides what is dropped; `trust.above_floor=true`, or "
        "float32."
    ),
    "trust/kl_old/*": "Shows which steps move. One step far above the others uses up the mask.",
    "trust/tv_old/*": "As the KL of that step, as a probability.",
    "trust/velocity_old": (
        "As `trust/kl_old`, for losses without a likelihood: a rise means larger updates; lower "
        "the learning rate, or let the old policy follow faster (`loss.decay_rate`)."
    ),
    "trust/divergence_old": (
        "Compare with `trust/delta`: far below it the mask drops nothing. A rise means larger "
        "updates, or an old policy that is left behind."
    ),
    "preference/margin": (
        "Rises from 0. Far above 3 the sigmoid is flat and little is learned: lower `loss.beta`. "
        "Below 0.1 the loss is nearly linear, and the anchor holds nothing: raise it."
    ),
    "preference/accuracy": (
        "At a half the policy has not taken up the preferences. Near 1 while the reward stands "
        "still, it fits the pairs of the moment: lower the learning rate."
    ),
    "trust/tv_old_max": "As `trust/kl_old_max`, as a probability.",
    "trust/ratio_std": (
        "Small against the clip range, a clip does nothing; far above it, the clip decides by "
        "noise. The range belongs to model and resolution."
    ),
    "trust/masked_fraction": (
        "0 throughout: the trust region is not at work, and could be smaller or the learning rate "
        "higher. Above a half: most samples teach nothing; a lower learning rate or a larger "
        "region."
    ),
    "trust/masked_positive": (
        "More than the negative side: good samples are reinforced past the region."
    ),
    "trust/masked_negative": "More than the positive side: bad samples are pushed away past it.",
    "trust/clip_false_alarms": (
        "High: ratio clipping at that range throws away updates that are near; a wider range, or "
        "loss=dppo."
    ),
    "trust/clip_misses": (
        "High: ratio clipping at that range lets updates through that are far; a narrower range, "
        "or loss=dppo."
    ),
    "trust/log_ratio_noise": (
        "Compare with `trust/kl_old`: where it is several times as large, a clip decides by chance."
    ),
    "bound/surrogate": "Above 0 where the updates favour better samples. Noisy by nature.",
    "bound/penalty": (
        "Usually far above the surrogate: the bound holds and says nothing. Compare runs by it, do "
        "not steer by it."
    ),
    "update/learning_rate": "Follows `learning_rate`; what it should be.",
    "update/grad_norm": (
        "Rises suddenly: an unstable update; lower the learning rate or `max_grad_norm`. Falls to "
        "0: everything is masked, or all groups are constant."
    ),
    "update/grad_rms_over_eps": (
        "Below 1: a smaller `optimizer.eps`, or every step is damped whatever the learning rate."
    ),
    "perf/images_per_second": (
        "Falls: another program on the machine, or a scorer that has become slow."
    ),
    "perf/scouting_seconds": (
        "Grows with `scouting.candidates` and `scouting.num_steps`; what scouting gains must be "
        "worth it, so compare runs at equal `samples` or seconds."
    ),
    "perf/rollout_seconds": "Most of an iteration; fewer steps, or a larger micro-batch.",
    "perf/reward_seconds": (
        "Should be near 0, since scoring goes on beside rollouts. Above: the scorer is the "
        "bottleneck; give it a device or a server of its own."
    ),
    "perf/update_seconds": "Grows with the trained steps and with gradient checkpointing.",
    "eval/*/reward": (
        "The number to compare runs by. Well below `reward/mean`: other prompts, an average that "
        "lags behind, or a policy that needs its noise. Held-in up and held-out flat: it learns "
        "the prompts by heart; take more prompts."
    ),
    "eval/*/part/*": "As `reward/part/*`, on fixed prompts and noise.",
    "eval/*/family/*": "A family that falls is forgotten; add its prompts to the training set.",
    "eval/*/kl_ref": (
        "Rises with training; it is what the reward was bought with. Rising while the reward is "
        "flat: drift without gain; a penalty, a smaller region or fewer iterations."
    ),
    "eval/*/diversity": (
        "Falls: modes collapse. A penalty, a smaller region, or an earlier checkpoint."
    ),
    "eval/*/panel/*": (
        "Moves away from its first value while the reward rises: look at the pictures; the reward "
        "may be cheated. Motion that falls towards 0 is the first hack of a reward that looks at "
        "frames: a still picture. Motion that rises with its variation is flicker or a cut."
    ),
    "eval/*/alarms": "Above 0: look at the pictures, and stop where they are worse.",
    "eval/*/missing": "Should be 0; the means leave these samples out.",
}
"""By the glossary's names."""
